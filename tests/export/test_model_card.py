"""What is known about a model, and the model card written from it.

Promises: facts come out of the checkpoint, are completed by its log, and name the scores of reports that were made of
this very file; sums are those of the chain; the card holds every figure, and nothing of a folder's name or of markup
that somebody put there; a damaged lineage.json is a one-line error, whatever is in it.
"""

import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from export.facts_file import NOTE, note, read_note
from export.model_card import card
from export.model_facts import facts
from model.checkpoint import load_model, remember_parent, save_model
from model.config import ModelConfig
from model.lora import LoRAConfig, attach
from model.transformer import Transformer
from tests.export.test_hf_import import make_folder

LOSSES = {"val_loss": {"zh": 3.0, "en": 2.5}, "bits_per_byte": {"zh": 1.25, "en": 1.5}}
CHAIN = [
    {"stage": "pretrain", "data": "dataset/pretrain", "steps": 345, "tokens": 1413120, "seconds": 1200.0, "loss": 5.5}
    | {"validation": LOSSES},
    {"stage": "full_sft", "data": "/home/me/private/sft", "steps": 220, "tokens": 600000, "seconds": 900, "loss": 4.875}
    | {"validation": LOSSES},
    {"stage": "dpo", "data": "dataset/dpo", "steps": 71, "pairs": 2252, "seconds": 20.0, "loss": 0.6452}
    | {"validation": {"val_loss": {"zh": 0.5}, "val_accuracy": {"zh": 0.94, "en": 0.97}}},
]


@pytest.fixture
def model_file(tokenizer, tmp_path):
    def make(lineage, stage="dpo", **changes):
        config = ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=64, **changes)
        path = tmp_path / f"{stage}_{config.name}.pth"
        save_model(path, Transformer(config), stage, tokenizer, lineage)
        return path

    return make


def test_the_card_shows_heads_biases_and_the_length_that_was_trained(model_file):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    known = facts(model_file(CHAIN, head_dim=16, qkv_bias=True, rope_scaling=yarn))
    text = card(known, "Qwen2ForCausalLM", "mit", "x", [])
    assert "4 heads, 2 key/value heads of 16, biases on q, k and v |" in text
    assert "| longest text | 64 tokens (RoPE scaling: yarn x 4, 64 tokens, trained with 16) |" in text
    plain_text = card(facts(model_file(CHAIN)), "LlamaForCausalLM", "mit", "x", [])
    assert "key/value heads |" in plain_text and "| longest text | 64 tokens |" in plain_text


def test_facts_of_a_checkpoint(model_file):
    path = model_file(CHAIN)
    report = {"checkpoint": "elsewhere/dpo_32.pth", "accuracy": {"zh": 0.5, "en": 0.25}}
    counts = {"zh": {"questions": 10, "correct": 5}, "en": {"questions": 8, "correct": 2}}
    (path.parent / "answers.json").write_text(json.dumps({**report, "counts": counts}))
    (path.parent / "other.json").write_text(json.dumps({**report, "checkpoint": "full_sft_32.pth"}))
    (path.parent / "old.json").write_text(json.dumps(report))
    os.utime(path.parent / "old.json", (1, 1))  # older than the model: made of another one of that name
    (path.parent / "torn.json").write_text('{"checkpoint":')
    known = facts(path)
    assert (known["file"], known["stage"], known["size"], known["chat_format"]) == ("dpo_32.pth", "dpo", "32", "chatml")
    assert (known["tokens"], known["pairs"], known["seconds"]) == (2_013_120, 2252, 2120)
    assert known["loss"] == 0.6452 and known["languages"] == ["zh", "en"]
    total, active = load_model(path)[0].count_parameters()
    assert (known["parameters"], known["active_parameters"]) == (total, active)
    assert known["scores"] == [
        {"name": "answers", "accuracy": {"zh": 0.5, "en": 0.25}, "questions": {"zh": 10, "en": 8}}
    ]
    assert [entry["data"] for entry in known["chain"]] == ["dataset/pretrain", "sft", "dataset/dpo"]
    assert known["parent"] is None and known["adapter"] is None


def test_the_log_says_what_the_entry_does_not(model_file):
    path = model_file([{"stage": "pretrain"}], "pretrain")
    rows = [
        {"step": 1, "loss": 8.0, "tokens": 10, "seconds": 1.0},
        {"step": 9, "loss": 6.5, "tokens": 90, "seconds": 9.0},
    ]
    rows.append({"step": 9, "tokens": 90, **LOSSES})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "lo'
    path.with_suffix(".jsonl").write_text(text)
    known = facts(path)
    assert (known["tokens"], known["seconds"], known["loss"]) == (90, 9.0, 6.5)
    assert known["validation"] == LOSSES and known["chain"][0]["steps"] == 9


def test_facts_of_an_adapter_and_of_a_mixture(model_file, tokenizer, tmp_path):
    parent = model_file(CHAIN[:2], "full_sft", use_moe=True)
    model = load_model(parent)[0]
    attach(model, LoRAConfig(rank=3))
    remember_parent(model, parent, tmp_path / "lora_sft_32_moe.pth")
    save_model(tmp_path / "lora_sft_32_moe.pth", model, "lora_sft", tokenizer, [*CHAIN[:2], {"stage": "lora_sft"}])
    known = facts(tmp_path / "lora_sft_32_moe.pth")
    assert known["parent"] == "full_sft_32_moe.pth" and known["adapter"]["rank"] == 3
    assert known["parameters"] == facts(parent)["parameters"] > known["active_parameters"]
    assert [entry["stage"] for entry in known["chain"]] == ["pretrain", "full_sft", "lora_sft"]


def test_facts_of_a_foreign_folder(tmp_path):
    make_folder(tmp_path / "theirs")
    known = facts(tmp_path / "theirs")
    assert known["stage"] == "transformers" and known["parameters"] > 1000 and known["chat_format"] == "template"


def test_the_card_holds_every_figure(model_file):
    known = facts(model_file(CHAIN))
    known["scores"] = [{"name": "exam", "accuracy": {"zh": 0.305}, "questions": {"zh": 1346}}]
    text = card(known, "LlamaForCausalLM", "mit", "me/small", ["config.json", "dpo_32-q8_0.gguf"])
    block = yaml.safe_load(text.split("---\n")[1])
    assert block["language"] == ["zh", "en"] and block["license"] == "mit" and block["library_name"] == "transformers"
    rows = [
        "| pretrain | pretraining: to continue text | dataset/pretrain | 1,413,120 tokens | 20.0 | 5.500 | "
        "en 1.500 bits/byte, zh 1.250 bits/byte |",
        "| sft | 600,000 tokens | 15.0 | 4.875 |",
        "| dataset/dpo | 2,252 pairs | 0.3 | 0.645 | en 97.0% ranked right, zh 94.0% ranked right |",
        "| exam | zh | 30.5% | 1346 |",
        'from_pretrained("me/small")',
        "`llama-cli -m dpo_32-q8_0.gguf`",
        "for Chinese and English, trained from scratch.",
    ]
    assert [row for row in rows if row not in text] == []
    assert "private" not in text and "No licence" not in text
    bare = card(facts(model_file([], "pretrain")), "LlamaForCausalLM", "unknown", "x", [])
    assert "Nothing is known about it" in bare and "No licence was stated" in bare and "## Scores" not in bare
    assert "apply_chat_template" not in bare, "a pretrained model continues text"


def test_markup_of_others_stays_text(model_file):
    evil = "x|y\n---\n<script>alert(1)</script> [a](b) `c` 'd'"
    chain = [
        {"stage": "transformers", "source": evil},
        {"stage": evil, "data": evil, "validation": {"val_loss": {evil: "1"}}},
    ]
    text = card({**facts(model_file(chain)), "chat_format": evil}, "X", "mit", "x", [])
    assert "<script" not in text and "[a](b)" not in text and "x|y" not in text.replace("x\\|y", "")
    assert yaml.safe_load(text.split("\n---\n")[0])["base_model"].startswith("x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("stage", "size", "chain", "scores", "validation", "languages", "license", "adapter", "parent", "tokens")
ENTRY = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("stage", "data", "tokens", "loss", "validation", "seconds"), JSON)
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(ENTRY, max_size=2), max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lineage_is_read_or_refused(model_file, tmp_path, changes):
    if not (tmp_path / NOTE).exists():
        (tmp_path / "true.json").write_text(note(facts(model_file(CHAIN))))
    true = json.loads((tmp_path / "true.json").read_text())
    (tmp_path / NOTE).write_text(json.dumps({**true, **changes}))
    try:
        known = read_note(tmp_path)
    except UserError as error:
        assert "\n" not in str(error) and NOTE in str(error)
        return
    card(known, "LlamaForCausalLM", "unknown", "x", [])


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000])
def test_a_damaged_lineage(text, tmp_path):
    (tmp_path / NOTE).write_text(text)
    with pytest.raises(UserError, match=NOTE):
        read_note(tmp_path)
