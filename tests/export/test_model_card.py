"""The facts about a model, and the model card generated from them.

Promises: facts come from the checkpoint, its log, and reports whose "checkpoint" is this file; sums are over the chain;
the card contains every figure, no local path and no unescaped foreign markup; any damaged lineage.json is a one-line
error.
"""

import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from export.model_card import model_card
from export.model_facts import LINEAGE_FILE, facts_json, model_facts, read_facts
from model.checkpoint import load_model, record_parent, save_model
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
def make_model_file(tokenizer, tmp_path):
    def make_model_file(lineage, stage="dpo", **changes):
        config = ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=64, **changes)
        path = tmp_path / f"{stage}_{config.name}.pth"
        save_model(path, Transformer(config), stage, tokenizer, lineage)
        return path

    return make_model_file


def test_the_card_shows_heads_biases_and_the_trained_length(make_model_file):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    facts = model_facts(make_model_file(CHAIN, head_dim=16, qkv_bias=True, rope_scaling=yarn))
    text = model_card(facts, "Qwen2ForCausalLM", "mit", "x", [])
    assert "4 heads, 2 key/value heads of 16, biases on q, k and v |" in text
    assert "| longest text | 64 tokens (RoPE scaling: yarn x 4, 64 tokens, trained with 16) |" in text
    plain_text = model_card(model_facts(make_model_file(CHAIN)), "LlamaForCausalLM", "mit", "x", [])
    assert "key/value heads |" in plain_text and "| longest text | 64 tokens |" in plain_text


def test_facts_of_a_checkpoint(make_model_file):
    path = make_model_file(CHAIN)
    report = {"checkpoint": "elsewhere/dpo_32.pth", "accuracy": {"zh": 0.5, "en": 0.25}}
    counts = {"zh": {"questions": 10, "correct": 5}, "en": {"questions": 8, "correct": 2}}
    (path.parent / "answers.json").write_text(json.dumps({**report, "counts": counts}))
    (path.parent / "other.json").write_text(json.dumps({**report, "checkpoint": "full_sft_32.pth"}))
    (path.parent / "old.json").write_text(json.dumps(report))
    os.utime(path.parent / "old.json", (1, 1))  # older than the model: describes an earlier file of that name
    (path.parent / "torn.json").write_text('{"checkpoint":')
    facts = model_facts(path)
    assert (facts["file"], facts["stage"], facts["size"], facts["chat_format"]) == ("dpo_32.pth", "dpo", "32", "chatml")
    assert (facts["tokens"], facts["pairs"], facts["seconds"]) == (2_013_120, 2252, 2120)
    assert facts["loss"] == 0.6452 and facts["languages"] == ["zh", "en"]
    total, active = load_model(path)[0].count_parameters()
    assert (facts["parameters"], facts["active_parameters"]) == (total, active)
    scores = {"name": "answers", "accuracy": {"zh": 0.5, "en": 0.25}, "questions": {"zh": 10, "en": 8}}
    assert facts["scores"] == [scores]
    assert [entry["data"] for entry in facts["chain"]] == ["dataset/pretrain", "sft", "dataset/dpo"]
    assert facts["parent"] is None and facts["adapter"] is None


def test_the_log_completes_the_last_entry(make_model_file):
    path = make_model_file([{"stage": "pretrain"}], "pretrain")
    rows = [{"step": n, "loss": loss, "tokens": 10 * n, "seconds": 1.0 * n} for n, loss in ((1, 8.0), (9, 6.5))]
    rows.append({"step": 9, "tokens": 90, **LOSSES})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "lo'
    path.with_suffix(".jsonl").write_text(text)
    facts = model_facts(path)
    assert (facts["tokens"], facts["seconds"], facts["loss"]) == (90, 9.0, 6.5)
    assert facts["validation"] == LOSSES and facts["chain"][0]["steps"] == 9


def test_facts_of_an_adapter_and_of_a_mixture(make_model_file, tokenizer, tmp_path):
    parent = make_model_file(CHAIN[:2], "full_sft", use_moe=True)
    model = load_model(parent)[0]
    attach(model, LoRAConfig(rank=3))
    record_parent(model, parent, tmp_path / "lora_sft_32_moe.pth")
    save_model(tmp_path / "lora_sft_32_moe.pth", model, "lora_sft", tokenizer, [*CHAIN[:2], {"stage": "lora_sft"}])
    facts = model_facts(tmp_path / "lora_sft_32_moe.pth")
    assert facts["parent"] == "full_sft_32_moe.pth" and facts["adapter"]["rank"] == 3
    assert facts["parameters"] == model_facts(parent)["parameters"] > facts["active_parameters"]
    assert [entry["stage"] for entry in facts["chain"]] == ["pretrain", "full_sft", "lora_sft"]


def test_facts_of_a_foreign_folder(tmp_path):
    make_folder(tmp_path / "theirs")
    facts = model_facts(tmp_path / "theirs")
    assert facts["stage"] == "transformers" and facts["parameters"] > 1000 and facts["chat_format"] == "template"


def test_the_card_contains_every_figure(make_model_file):
    facts = model_facts(make_model_file(CHAIN))
    facts["scores"] = [{"name": "exam", "accuracy": {"zh": 0.305}, "questions": {"zh": 1346}}]
    text = model_card(facts, "LlamaForCausalLM", "mit", "me/small", ["config.json", "dpo_32-q8_0.gguf"])
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
    bare = model_card(model_facts(make_model_file([], "pretrain")), "LlamaForCausalLM", "unknown", "x", [])
    assert "No training record is available" in bare and "No licence was stated" in bare and "## Scores" not in bare
    assert "apply_chat_template" not in bare, "a pretrained model continues text"


def test_foreign_markup_is_escaped(make_model_file):
    markup = "x|y\n---\n<script>alert(1)</script> [a](b) `c` 'd'"
    chain = [
        {"stage": "transformers", "source": markup},
        {"stage": markup, "data": markup, "validation": {"val_loss": {markup: "1"}}},
    ]
    text = model_card({**model_facts(make_model_file(chain)), "chat_format": markup}, "X", "mit", "x", [])
    assert "<script" not in text and "[a](b)" not in text and "x|y" not in text.replace("x\\|y", "")
    assert yaml.safe_load(text.split("\n---\n")[0])["base_model"].startswith("x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("stage", "size", "chain", "scores", "validation", "languages", "license", "adapter", "parent", "tokens")
LINEAGE_FIELD_TYPES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("stage", "data", "tokens", "loss", "validation", "seconds"), JSON)
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(LINEAGE_FIELD_TYPES, max_size=2), max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lineage_is_read_or_rejected(make_model_file, tmp_path, changes):
    if not (tmp_path / LINEAGE_FILE).exists():
        (tmp_path / "true.json").write_text(facts_json(model_facts(make_model_file(CHAIN))))
    sound = json.loads((tmp_path / "true.json").read_text())
    (tmp_path / LINEAGE_FILE).write_text(json.dumps({**sound, **changes}))
    try:
        facts = read_facts(tmp_path)
    except UserError as error:
        assert "\n" not in str(error) and LINEAGE_FILE in str(error)
        return
    model_card(facts, "LlamaForCausalLM", "unknown", "x", [])


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000])
def test_a_damaged_lineage_is_a_one_line_error(text, tmp_path):
    (tmp_path / LINEAGE_FILE).write_text(text)
    with pytest.raises(UserError, match=LINEAGE_FILE):
        read_facts(tmp_path)
