"""Sharded state files: resharding between any numbers of processes, safetensors format, checks of damaged files."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.checksums import with_checksum
from common.errors import UserError
from trainer import state_files
from trainer.state_files import CopiedPiece, SavedState, TensorPiece, copy_to_cpu, select_written_tensors, write_state

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def fsdp_shard(tensor, rank, world):
    """Return the rows of a tensor that FSDP2 gives to a rank, and their position."""
    rows = -(-len(tensor) // world)
    start = min(rank * rows, len(tensor))
    local = tensor[start : start + rows]
    return local, TensorPiece((start, *[0] * (tensor.dim() - 1)), tuple(local.shape))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(1, 7), max_size=3))
def test_state_is_resharded_between_any_world_sizes(tmp_path_factory, data, writers, readers, shape):
    """Includes processes without rows, scalars, and all dtypes."""
    folder = tmp_path_factory.mktemp("state")
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) % 2
    dtype = data.draw(st.sampled_from(DTYPES))
    state = {"a": numbers.to(dtype), "b": torch.tensor(3.0), "c": -numbers.float()}
    for rank in range(writers):
        parts = {"b": CopiedPiece(state["b"], (), TensorPiece((), ()))} if rank == writers - 1 else {}
        for name in ("a", "c"):
            local, piece = fsdp_shard(state[name], rank, writers) if shape else (state[name], TensorPiece((), ()))
            if local.numel() and (shape or rank == 0):
                parts[name] = CopiedPiece(local.contiguous(), tuple(state[name].shape), piece)
        write_state(folder, rank, parts)
    saved = SavedState(folder, writers, "advice")
    whole = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    saved.load(whole)
    assert all(torch.equal(whole[name], state[name]) for name in state)
    if not shape:
        return
    pieces = [fsdp_shard(torch.zeros_like(state["a"]), rank, readers) for rank in range(readers)]
    with pytest.MonkeyPatch.context() as patch:
        for local, piece in pieces:
            patch.setattr(state_files, "local_piece", lambda tensor, here=(local, piece): here)
            saved.load({"a": state["a"]})
    assert torch.equal(torch.cat([local for local, _ in pieces]), state["a"])


def test_state_files_are_safetensors(tmp_path):
    from safetensors.torch import load_file

    state = {"half": torch.ones(3, dtype=torch.bfloat16), "double": torch.rand(2, 2, dtype=torch.float64)}
    write_state(tmp_path, 0, copy_to_cpu(state, {}))
    found = load_file(tmp_path / "rank_00000.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_00000.json", "rank_00000.safetensors"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_replicated_tensors_are_written_once_and_evenly(world):
    state = {f"t{i}": torch.zeros(10 * (i + 1)) for i in range(12)}
    parts = [select_written_tensors(state, rank, world, replicated=True) for rank in range(world)]
    assert sorted(name for part in parts for name in part) == sorted(state)
    sizes = [sum(tensor.numel() for tensor in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= 120
    assert select_written_tensors(state, 0, world, replicated=False) == state


def test_cpu_copy_is_independent_and_reuses_memory():
    weight = torch.ones(4)
    first = copy_to_cpu({"w": weight}, {})
    weight.zero_()
    assert first["w"].data.tolist() == [1, 1, 1, 1]
    second = copy_to_cpu({"w": weight, "new": torch.ones(2)}, first)
    assert second["w"].data.data_ptr() == first["w"].data.data_ptr() and second["w"].data.sum() == 0
    assert copy_to_cpu({"w": torch.ones(5)}, second)["w"].data.shape == (5,)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(with_checksum(content)))


INVALID_EDITS = {
    "no tensor of that name": lambda content: content["tensors"].pop("w"),
    "another shape": lambda content: content["tensors"]["w"].update(shape=[4, 3], size=[4, 3]),
    "a piece outside": lambda content: content["tensors"]["w"].update(offset=[1, 0]),
    "an incomplete tensor": lambda content: content["tensors"]["w"].update(size=[1, 4]),
    "an impossible size": lambda content: content["tensors"]["w"].update(shape=[2**70, 4]),
    "a negative offset": lambda content: content["tensors"]["w"].update(offset=[-1, 0]),
    "too many dimensions": lambda content: content["tensors"]["w"].update(shape=[1] * 99),
    "another dtype": lambda content: content["tensors"]["w"].update(dtype="float64"),
    "no description": lambda content: content["tensors"].update(w=7),
    "a list": lambda content: content.update(tensors=[]),
    "file of another rank": lambda content: content.update(rank=1),
    "format of another version": lambda content: content.update(format=1),
}


@pytest.mark.parametrize("change", INVALID_EDITS.values(), ids=INVALID_EDITS)
def test_invalid_tensor_description_is_one_line(tmp_path, change):
    write_state(tmp_path, 0, copy_to_cpu({"w": torch.ones(3, 4)}, {}))
    edit_json(tmp_path / "rank_00000.json", change)
    with pytest.raises(UserError, match=r"^\S.*: the advice$"):
        SavedState(tmp_path, 1, "the advice").load({"w": torch.zeros(3, 4)})


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"[" * 100_000, b"\xff", b'{"crc32": "00000000"}'])
def test_invalid_state_json_is_one_line(tmp_path, content):
    write_state(tmp_path, 0, copy_to_cpu({"w": torch.ones(3, 4)}, {}))
    (tmp_path / "rank_00000.json").write_bytes(content)
    with pytest.raises(UserError, match=r"rank_00000\.json is damaged .*: the advice$"):
        SavedState(tmp_path, 1, "the advice")


@pytest.mark.parametrize("size", [0, 7, 50, -1])
def test_truncated_state_file_is_one_line(tmp_path, size):
    write_state(tmp_path, 0, copy_to_cpu({"w": torch.ones(3, 4)}, {}))
    path = tmp_path / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"rank_00000\.safetensors .*: the advice$"):
        SavedState(tmp_path, 1, "the advice").load({"w": torch.zeros(3, 4)})
