"""--rope_scaling and --rope_factor extend the context; the report contains the loss by position.

Promises: every command with a model takes both flags and extends the context by the factor; one flag alone, a factor
out of range or a model with its own scaling is a one-line error; the loss by position is the mean over long documents,
and a note names the lengths that no document reaches.
"""

import io
import json
import math
import sys

import pytest
import torch

from common.errors import UserError
from evaluation.length_loss import length_loss, length_section
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.transformer import Transformer
from serving.config import ServeConfig
from serving.model_list import read_model_entry, with_rope_scaling
from serving.models import open_models
from tests.helpers import run_here, run_script

YARN = ["--rope_scaling", "yarn", "--rope_factor", "4"]
OWN = {"rope_type": "linear", "factor": 2.0}


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=16)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(8)
    return model


# ---- the flags -------------------------------------------------------------------------------------------------------
def test_rope_flags_extend_context_in_chat(tiny_parent, monkeypatch, capsys):
    flags = ["--checkpoint", tiny_parent, "--prompt", "x" * 100, "--max_new_tokens", 5, "--device", "cpu"]
    with pytest.raises(UserError, match="64"):
        run_script(monkeypatch, "2-eval.py", *flags)
    run_script(monkeypatch, "2-eval.py", *flags, *YARN)
    assert "RoPE yarn x 4, 256 tokens, trained with 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rope_scaling", "yarn"], "give both or neither"),
        (["--rope_factor", "2"], "give both or neither"),
        (["--rope_scaling", "yarn", "--rope_factor", "1"], "above 1 and at most 64"),
        (["--rope_scaling", "yarn", "--rope_factor", "-2"], "above 1 and at most 64"),
        (["--rope_scaling", "yarn", "--rope_factor", "nan"], "above 1 and at most 64"),
    ],
)
@pytest.mark.parametrize("script", ["2-eval.py", "eval_ceval.py", "serve_openai_api.py", "web_demo.py"])
def test_wrong_rope_flags_are_errors_before_a_model_is_loaded(script, flags, message, monkeypatch, tmp_path):
    more = {"eval_ceval.py": ["--data", tmp_path], "2-eval.py": ["--prompt", "x"]}.get(script, [])
    with pytest.raises(UserError, match=message):
        run_script(monkeypatch, script, *more, *flags)


def test_wrong_rope_flags_exit_with_code_2(tmp_path, monkeypatch, capsys):
    done = run_here(monkeypatch, capsys, "2-eval.py", "--rope_scaling", "llama3", "--rope_factor", "2")
    assert done.returncode == 2 and "invalid choice: 'llama3'" in done.stderr
    done = run_here(monkeypatch, capsys, "2-eval.py", "--rope_scaling", "yarn")
    assert done.returncode == 2 and done.stderr.startswith("error: --rope_scaling") and done.stderr.count("\n") == 1


@pytest.fixture
def scaled_checkpoint(tokenizer, tmp_path):
    path = tmp_path / "full_sft_32.pth"
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=64, rope_scaling=OWN)
    save_model(path, Transformer(config), "full_sft", tokenizer, [])
    return path


def test_rope_flags_extend_context_of_server(tiny_parent, scaled_checkpoint):
    def open_scaled(path, max_context=4096):
        flags = {"device": "cpu", "rope_scaling": "linear", "rope_factor": 4.0, "max_context": max_context}
        (served,) = open_models(ServeConfig(checkpoint=(str(path),), **flags)).values()
        return served

    served = open_scaled(tiny_parent)
    assert served.max_model_len == 256 and len(served.text_ids("x" * 200)) == 200
    assert open_scaled(tiny_parent, max_context=100).max_model_len == 100
    with pytest.raises(UserError, match="already has RoPE scaling"):
        open_scaled(scaled_checkpoint)


def test_rope_flags_extend_context_in_web_demo(tiny_parent, scaled_checkpoint):
    entry = read_model_entry(tiny_parent, tiny_parent.parent)
    lengths = [with_rope_scaling(entry, rope).max_seq_len for rope in (None, ("yarn", 4.0))]
    assert lengths == [64, 256]
    refused = with_rope_scaling(read_model_entry(scaled_checkpoint, scaled_checkpoint.parent), ("yarn", 4.0))
    assert "already has RoPE scaling" in refused.error


def test_training_prints_and_saves_rope_scaling(scaled_checkpoint, sft_dir, monkeypatch, capsys, tmp_path):
    flags = ["--device", "cpu", "--batch_size", 8, "--max_steps", 1, "--init_from", scaled_checkpoint]
    run_script(monkeypatch, "3-full_sft.py", *flags, "--data_path", sft_dir, "--out_dir", tmp_path / "out")
    assert "RoPE scaling: linear x 2, 64 tokens, the length of training is not stated" in capsys.readouterr().out
    assert load_model(tmp_path / "out" / "full_sft_32.pth")[0].config.rope_scaling == OWN


# ---- loss by position ------------------------------------------------------------------------------------------------
def test_loss_by_position_is_the_mean_over_documents(model, tokenizer):
    """Reference: log-probabilities of one forward pass per document, split at the edges."""
    texts = ["abcdefgh" * 9, "short", "hgfedcba" * 9]
    before = model.rope_cos.clone()
    found = length_loss(model, tokenizer, texts)
    assert found["trained"] == 16 and found["edges"] == [0.5, 1, 2, 4] and found["documents"] == 2
    kinds = [f"{kind} x {factor}" for factor in (2, 4) for kind in ("linear", "dynamic", "yarn")]
    assert [row["rope"] for row in found["rows"]] == ["plain", *kinds] and not found["note"]
    assert torch.equal(model.rope_cos, before) and model.config.max_seq_len == 16

    model.scale_rope("yarn", 4.0)
    expected = torch.zeros(4, dtype=torch.float64)
    for text in (texts[0], texts[2]):
        ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text)])[:65]
        with torch.inference_mode():
            log_probs = model.logits(ids[None, :-1])[0].log_softmax(-1)
        losses = -log_probs[torch.arange(64), ids[1:]].double()
        expected += torch.stack([losses[a:b].mean() for a, b in ((0, 8), (8, 16), (16, 32), (32, 64))]) / 2
    assert found["rows"][-1]["loss"] == pytest.approx(expected.tolist(), rel=1e-5)
    own = length_loss(model, tokenizer, texts)
    assert [row["rope"] for row in own["rows"]] == ["yarn x 4, 64 tokens, trained with 16"]
    assert own["rows"][0]["loss"] == found["rows"][-1]["loss"]


def test_rows_and_columns_end_at_the_reachable_lengths(model, tokenizer):
    """A row is None beyond its factor; the columns end at the longest document."""
    found = length_loss(model, tokenizer, ["abcdefgh" * 9])
    loss = {row["rope"]: row["loss"] for row in found["rows"]}
    assert loss["linear x 2"][3] is None and loss["linear x 2"][2] is not None and None not in loss["plain"]
    assert all(math.isfinite(value) for row in loss.values() for value in row if value is not None)
    within = length_loss(model, tokenizer, ["abcdefgh" * 2])
    assert within["edges"] == [0.5, 1] and [row["rope"] for row in within["rows"]] == ["plain"]
    assert within["note"] == ("not measured at 2, 4 times the trained 16 tokens: the longest document has 16 tokens")
    assert length_loss(model, tokenizer, ["abc", ""])["rows"] == []
    assert length_loss(model, tokenizer, [])["rows"] == []


def test_report_contains_length_loss_table(scripted_models, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    text = tmp_path / "long.jsonl"
    text.write_text(json.dumps({"text": "The sun is up. " * 30}) + "\n", encoding="utf-8")
    json_path = tmp_path / "r.json"
    run_script(monkeypatch, "2-eval.py", "--report", scripted_models / "full_sft_64.pth", "--texts", f"en={text}",
               "--device", "cpu", "--max_new_tokens", 3, "--json", json_path)  # fmt: skip
    found = json.loads(json_path.read_text(encoding="utf-8"))["models"][0]["length_loss"]["en"]
    page = json_path.with_suffix(".md").read_text(encoding="utf-8")
    assert "## Loss by position" in page and "documents are not joined" in page
    assert "| RoPE (1 documents) | 0–48 (0.5x) | 48–96 (1x) | 96–192 (2x) | 192–384 (4x) |" in page
    for row in found["rows"]:
        cells = " | ".join("–" if value is None else f"{value:.3f}" for value in row["loss"])
        assert f"| {row['rope']} | {cells} |" in page
    assert length_section([]) == []
