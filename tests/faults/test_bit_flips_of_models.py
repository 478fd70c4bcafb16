"""Promise: a flipped bit in a model or in the state of an interrupted run is refused in one line or changes nothing.

Half of the bits are anywhere in the file, half outside the weights: headers, names, metadata, the zip directory.
"""

import json
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from common.checksums import with_checksum
from common.errors import UserError
from model.checkpoint import load_model, read_checkpoint, record_parent, save_model
from model.lora import LoRAConfig, attach
from tests.helpers import EXACT_FLAGS, TINY_MODEL_FLAGS, run_script
from tests.trainer.test_resume import stop_after
from trainer.config import TrainConfig
from trainer.state_files import SavedState, read_checked_json
from trainer.train_state import complete_steps, read_train_state, recovery_advice


def values_equal(one, other):
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(values_equal(one[k], other[k]) for k in one)
        )
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def flip_bit(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def non_weight_offsets(path: Path) -> list[int]:
    """Offsets of the bytes of a .pth that are not tensor data."""
    inside = bytearray(path.stat().st_size)
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            if "/data/" in record.filename:
                file.seek(record.header_offset + 26)
                lengths = file.read(4)
                start = record.header_offset + 30
                start += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                inside[start : start + record.file_size] = b"\1" * record.file_size
    return [at for at, taken in enumerate(inside) if not taken]


def flip_bits(path: Path, read, offsets: list[int], number: int, seed: int = 0) -> dict[str, int]:
    """Flip `number` bits anywhere and `number` bits at `offsets`, one at a time; returns counts of the outcomes."""
    data, expected = path.read_bytes(), read()
    rng = random.Random(seed)
    bits = [rng.randrange(8 * len(data)) for _ in range(number)]
    bits += [8 * rng.choice(offsets) + rng.randrange(8) for _ in range(number)]
    outcomes = {"refused": 0, "equal": 0}
    for bit in bits:
        path.write_bytes(flip_bit(data, bit))
        try:
            found = read()
        except UserError as error:
            assert "\n" not in str(error) and path.parent.name in str(error), f"bit {bit}: {error}"
            outcomes["refused"] += 1
        else:
            assert values_equal(found, expected), f"bit {bit} of {path.name} changes what is read"
            outcomes["equal"] += 1
    path.write_bytes(data)
    return outcomes


def test_a_flipped_bit_of_a_model_is_refused_or_harmless(tiny_parent, tmp_path, num_attacks, record_attacks):
    path = Path(shutil.copy(tiny_parent, tmp_path))
    number = num_attacks(100, 1500)
    outcomes = flip_bits(path, lambda: read_checkpoint(path), non_weight_offsets(path), number)
    record_attacks("flipped bits of a .pth", 2 * number, **outcomes)
    assert outcomes["refused"] > number
    with pytest.raises(UserError, match=r"checksum of \S+/data/\d+ differs.*copy it again or train it again"):
        weights = next(at for at in range(path.stat().st_size // 2, path.stat().st_size))
        path.write_bytes(flip_bit(path.read_bytes(), 8 * weights))
        load_model(path)


def test_a_flipped_bit_of_an_adapter_or_its_parent_is_refused_or_harmless(
    tiny_parent, tmp_path, num_attacks, record_attacks
):
    parent, path = Path(shutil.copy(tiny_parent, tmp_path)), tmp_path / "lora_sft_32.pth"
    model, tokenizer, _ = load_model(parent)
    attach(model, LoRAConfig(2, 4.0, 0.0, ("attention",)), 1)
    record_parent(model, parent, path)
    save_model(path, model, "lora_sft", tokenizer, [])
    number = num_attacks(10, 300)
    for file in (path, parent):
        outcomes = flip_bits(file, lambda: load_model(path)[0].state_dict(), non_weight_offsets(file), number)
        record_attacks(f"flipped bits of {'an adapter' if file is path else 'its parent'}", 2 * number, **outcomes)
        assert outcomes["refused"] > number / 2


def test_reading_without_weights_verifies_everything_else(tiny_parent, tmp_path):
    path = Path(shutil.copy(tiny_parent, tmp_path))
    data, outside = path.read_bytes(), set(non_weight_offsets(path))
    path.write_bytes(flip_bit(data, 8 * next(at for at in range(len(data) // 2, len(data)) if at not in outside)))
    assert read_checkpoint(path, weights=False)["stage"] == "pretrain"
    with pytest.raises(UserError, match="checksum"):
        read_checkpoint(path)
    path.write_bytes(data.replace(b"embed_tokens", b"embed_tokenz", 1))
    with pytest.raises(UserError, match="checksum"):
        read_checkpoint(path, weights=False)


@pytest.fixture(scope="module")
def interrupted_run(pretrain_dir, tokenizer_dir, tmp_path_factory):
    """The output folder of a run that stopped after 3 of 24 steps."""
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", out]
        run_script(patch, "1-pretrain.py", *TINY_MODEL_FLAGS, *EXACT_FLAGS, "--epochs", "3", *paths)
    return out


def read_state(path):
    """The complete resume state: progress and all tensors."""
    folder, progress = next(complete_steps(path.with_suffix(".resume")))
    saved = SavedState(folder, progress.ranks, recovery_advice(folder))
    tensors = {
        name: torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in saved.tensors.items()
    }
    saved.load(tensors)
    return {**vars(progress), "tensors": tensors}


def test_a_flipped_bit_of_the_train_state_is_refused_or_harmless(
    interrupted_run, tmp_path, num_attacks, record_attacks
):
    path = tmp_path / "pretrain_32.pth"
    shutil.copytree(interrupted_run / "pretrain_32.resume", path.with_suffix(".resume"))

    def read():
        assert read_train_state(TrainConfig(), path)
        return read_state(path)

    (folder,) = path.with_suffix(".resume").iterdir()
    assert len(read()["tensors"]) > 30
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["progress.json", "rank_00000.json", "rank_00000.safetensors"]
    for file in files:
        number = num_attacks(40, 1000)
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little") if file.suffix == ".safetensors" else 0
        outcomes = flip_bits(file, read, list(range(header or file.stat().st_size)), number)
        record_attacks(f"flipped bits of {file.name}", 2 * number, **outcomes)
        assert outcomes["refused"] > number


def test_resuming_from_a_damaged_state_is_one_line_that_names_the_remedy(
    interrupted_run, pretrain_dir, tokenizer_dir, tmp_path, monkeypatch
):
    shutil.copytree(interrupted_run, tmp_path / "out")
    (folder,) = (tmp_path / "out" / "pretrain_32.resume").iterdir()
    paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out"]
    command = [*TINY_MODEL_FLAGS, *EXACT_FLAGS, "--epochs", "3", *paths, "--max_steps", "4"]
    file = folder / "rank_00000.safetensors"
    expected = file.read_bytes()
    for at in (len(expected) // 2, len(expected) - 1):  # the file has weights and optimizer state
        file.write_bytes(flip_bit(expected, 8 * at))
        with pytest.raises(
            UserError, match=r"rank_00000\.safetensors is damaged \(the checksum of \S+ differs\): start"
        ):
            run_script(monkeypatch, "1-pretrain.py", *command)
    earlier = folder.with_name("step_000000002")
    shutil.copytree(folder, earlier)  # a run keeps the previous step until the next save
    progress = earlier / "progress.json"
    progress.write_text(json.dumps(with_checksum({**read_checked_json(progress), "step": 2})))
    with pytest.raises(UserError, match=r"remove \S+step_000000003 to resume from step 2, or start anew"):
        run_script(monkeypatch, "1-pretrain.py", *command)
