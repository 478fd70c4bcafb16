"""KV cache and checkpoints.

Promises: logits with the cache equal those of the full forward pass, token by token, in chunks and in batches of rows
of different lengths; sequences beyond max_seq_len raise; a saved model loads with equal tensors; an invalid file is a
one-line error.
"""

import functools
import sys

import pytest
import torch
from torch import nn

from common.errors import UserError
from model.checkpoint import (
    find_checkpoint,
    find_parent,
    latest_checkpoint,
    load_model,
    load_state,
    model_state_dict,
    read_checkpoint,
    save_model,
)
from model.transformer import KVCache
from tests.helpers import run_process, tiny_model

CPU = torch.device("cpu")
VARIANTS = {
    "mha": {"n_kv_heads": 4},
    "gqa": {},
    "qk_norm": {"qk_norm": True},
    "untied": {"tie_embeddings": False},
    "moe": {"use_moe": True},
}


make_model = functools.partial(tiny_model, max_seq_len=24)


@pytest.mark.parametrize("chunks", [[1] * 24, [24], [10, 1, 1, 7, 5], [23, 1]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_logits_equal_the_full_forward(variant, chunks):
    model = make_model(**VARIANTS[variant])
    ids = torch.randint(0, 272, (3, 24))
    cache = KVCache(model.config, 3, 24, CPU, torch.float32)
    pieces = [model.logits(chunk, cache) for chunk in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.logits(ids), rtol=1e-5, atol=1e-5)
    assert cache.length == 24


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_of_different_lengths_equal_each_row_alone(variant):
    model = make_model(**VARIANTS[variant])
    lengths, ids = [3, 8, 5], torch.randint(0, 272, (3, 14))
    cache = KVCache(model.config, 3, 14, CPU, torch.float32)
    prompts = model.logits(ids[:, :8], cache)  # right padding: what follows a row's prompt is overwritten
    view = cache.view(0, 3, lengths)
    new = torch.stack([row[length : length + 6] for row, length in zip(ids, lengths, strict=True)])
    together = torch.cat([model.logits(chunk, view) for chunk in new.split([1, 1, 3, 1], dim=1)], dim=1)
    for i, length in enumerate(lengths):
        alone = model.logits(ids[i : i + 1, : length + 6])[0]
        torch.testing.assert_close(prompts[i, :length], alone[:length], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[i], alone[length:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_right_padding_changes_no_real_token():
    model = make_model()
    ids = torch.randint(0, 272, (2, 10))
    padded = torch.cat((ids, torch.full((2, 6), 3)), dim=1)
    torch.testing.assert_close(model.logits(padded)[:, :10], model.logits(ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_caches_share_no_memory():
    model = make_model()
    a, b = (KVCache(model.config, 1, 24, CPU, torch.float32) for _ in range(2))
    first, second = torch.randint(0, 272, (2, 1, 6))
    model.logits(first, a)
    model.logits(second, b)
    again = model.logits(first[:, :1], a)
    torch.testing.assert_close(again, model.logits(torch.cat((first, first[:, :1]), 1))[:, -1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sequences_beyond_max_seq_len_raise():
    model = make_model()
    with pytest.raises(ValueError, match=r"25 tokens do not fit: the limit is 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    cache = KVCache(model.config, 1, 100, CPU, torch.float32)
    model(torch.zeros(1, 24, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="the limit is 24"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)
    small = KVCache(model.config, 1, 4, CPU, torch.float32)
    with pytest.raises(ValueError, match="the limit is 4"):
        model(torch.zeros(1, 5, dtype=torch.long), small)
    assert cache.length == 24 and small.length == 0


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_round_trip(variant, tokenizer, tmp_path):
    model = make_model(**VARIANTS[variant])
    path = tmp_path / "new" / "pretrain_32.pth"
    save_model(path, model, "pretrain", tokenizer, [{"stage": "pretrain", "step": 3}])
    loaded, its_tokenizer, checkpoint = load_model(path)
    assert loaded.config == model.config and not loaded.training
    assert its_tokenizer.fingerprint == tokenizer.fingerprint == checkpoint["tokenizer"]["fingerprint"]
    assert (checkpoint["stage"], checkpoint["lineage"]) == ("pretrain", [{"stage": "pretrain", "step": 3}])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_embeddings
    assert ("lm_head.weight" in read_checkpoint(path)["model"]) != model.config.tie_embeddings
    assert [file.name for file in path.parent.iterdir()] == ["pretrain_32.pth"]  # no temporary file left


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_a_model_does_not_import_dynamo(variant, tokenizer, tmp_path):
    """The import takes a second, and torch makes it for arithmetic on the meta device."""
    save_model(path := tmp_path / "pretrain_32.pth", make_model(**VARIANTS[variant]), "pretrain", tokenizer, [])
    loads = f"import sys; from model.checkpoint import load_model; load_model({str(path)!r})"
    result = run_process(sys.executable, "-c", f"{loads}; print('torch._dynamo' in sys.modules)")
    assert (result.stdout.strip(), result.returncode) == ("False", 0), result.stderr


def test_prefixes_of_wrappers_are_stripped(tokenizer, tmp_path):
    model = make_model()
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": model})})
    assert model_state_dict(wrapped).keys() == model_state_dict(model).keys()
    save_model(tmp_path / "pretrain_32.pth", wrapped, "pretrain", tokenizer, [])
    assert torch.equal(load_model(tmp_path / "pretrain_32.pth")[0].lm_head.weight, model.lm_head.weight)


def error_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def test_invalid_checkpoints_are_one_line_errors(tokenizer, tmp_path):
    good = tmp_path / "pretrain_32.pth"
    save_model(good, make_model(), "pretrain", tokenizer, [])
    content = good.read_bytes()
    bad = {"empty": b"", "text": b"hello, I am no model\n" * 50, "zip": b"PK\x05\x06" + bytes(18)}
    for name, data in {**bad, "cut": content[: len(content) // 2], "head": content[:100]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as error:
            load_model(tmp_path / name)
        assert name in error_line(error)
    with pytest.raises(UserError, match=r"no checkpoint at .*absent"):
        load_model(tmp_path / "absent")
    with pytest.raises(UserError):
        load_model(tmp_path)  # a folder
    for foreign in ([1, 2], {"model": {}}, {"a.weight": torch.zeros(2)}):
        torch.save(foreign, tmp_path / "foreign.pth")
        with pytest.raises(UserError) as error:
            load_model(tmp_path / "foreign.pth")
        assert "not a model of this project" in error_line(error)
    checkpoint = read_checkpoint(good)
    without_tokenizer = {name: part for name, part in checkpoint.items() if name != "tokenizer"}
    unknown_field = {"config": {**checkpoint["config"], "new_field": 1}}
    for changed in ({"format": 99}, unknown_field, {"model": {"x": torch.zeros(1)}}, None):
        torch.save({**checkpoint, **changed} if changed else without_tokenizer, tmp_path / "other.pth")
        with pytest.raises(UserError) as error:
            load_model(tmp_path / "other.pth")
        error_line(error)


def test_non_finite_weights_are_refused(tokenizer):
    """Such a model is useless, and a training run would skip every step."""
    model = make_model()
    for value in (float("nan"), float("inf")):
        state = {name: tensor.clone() for name, tensor in model_state_dict(model).items()}
        state["model.norm.weight"][1] = value
        with pytest.raises(UserError, match=r"file.pth: model.norm.weight is not finite"):
            load_state(model, state, "file.pth")


def test_mismatched_state_names_and_shapes_are_listed(tokenizer):
    model = make_model()
    state = model_state_dict(model)
    state["model.norm.weight"] = torch.zeros(5)
    state["extra"] = state.pop("model.layers.1.mlp.up_proj.weight")
    before = model.model.norm.weight.clone()
    with pytest.raises(UserError) as error:
        load_state(model, state, "file.pth")
    text = error_line(error)
    parts = ("file.pth does not fit the model: ", "missing model.layers.1.mlp.up_proj.weight", "unknown extra")
    assert all(part in text for part in (*parts, "model.norm.weight is (5,), expected (32,)"))
    assert torch.equal(model.model.norm.weight, before)  # nothing was loaded


def test_code_in_a_checkpoint_never_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"format": 1, "stage": "x", "config": {}, "model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError):
        load_model(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_find_parent_takes_one_match_and_lists_several(tmp_path):
    with pytest.raises(UserError, match=r"1-pretrain\.py"):
        find_checkpoint(tmp_path, "pretrain")
    (tmp_path / "pretrain_512.pth").touch()
    (tmp_path / "pretrain_512.resume.pth").touch()
    assert find_checkpoint(tmp_path, "pretrain").name == "pretrain_512.pth"
    assert find_parent("full_sft", tmp_path).name == "pretrain_512.pth" == latest_checkpoint(tmp_path).name
    (tmp_path / "pretrain_768_moe.pth").touch()
    with pytest.raises(UserError, match=r"several .*pretrain_512.pth, .*pretrain_768_moe.pth"):
        find_checkpoint(tmp_path, "pretrain")


@pytest.mark.parametrize("tied", [True, False])
def test_a_compiled_model_has_the_output_layer_of_the_model(tied):
    """torch.compile passes attributes on: the loss uses model.lm_head.weight of either."""
    model = make_model(tie_embeddings=tied)
    compiled = torch.compile(model)
    assert compiled.lm_head.weight is model.lm_head.weight
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model_state_dict(compiled).keys() == model_state_dict(model).keys()
