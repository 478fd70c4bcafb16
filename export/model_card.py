"""Writes the model card, README.md of an exported folder: architecture, training, scores, usage and limits.

All content comes from the facts of model_facts.py; a value that is unknown is left out. The block between the dashes
is YAML for the model hub, see https://huggingface.co/docs/hub/model-cards
Read next: model_facts.py, ../export_model.py.
"""

import json
from typing import Any

from common.metric_keys import with_current_metric_keys
from export.model_facts import Facts, number_or_zero
from model.config import ModelConfig
from model.rope import rope_summary

STAGE_DESCRIPTIONS = {
    "transformers": "started from another model",
    "pretrain": "pretraining: to continue text",
    "full_sft": "supervised fine-tuning: to answer",
    "lora_sft": "LoRA fine-tuning: low-rank matrices beside the frozen weights",
    "dpo": "preference training: to prefer the better of two answers",
    "grpo": "reinforcement learning with rewards that a program computes",
}
CHAT_CODE = """messages = [{"role": "user", "content": "你好！"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
"""
TEXT_CODE = 'inputs = tokenizer("The sun is", return_tensors="pt", return_token_type_ids=False)\n'
ANSWER_CODE = """answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def model_card(facts: Facts, architecture: str, license: str, name: str, files: list[str], adapter_of: str = "") -> str:
    """The text of README.md.

    facts: see model_facts. architecture: the stock class. license: an identifier of the hub, or "unknown". name: the
    model's name in the usage code. files: the files in the folder. adapter_of: the parent of an unmerged adapter.
    """
    parts = [front_matter(facts, license, adapter_of), f"# {model_name(facts)}\n"]
    parts += [overview_section(facts, architecture, adapter_of), "## Training\n", training_section(facts)]
    if facts["scores"]:
        parts += ["## Scores\n", scores_section(facts)]
    parts += ["## Use\n", usage_section(facts, name, files, adapter_of), "## Limits\n"]
    parts.append("A model of this size knows little and hallucinates: do not rely on its answers.\n")
    if license == "unknown":
        parts.append("No licence was stated for these weights.\n")
    return "\n".join(parts).rstrip("\n") + "\n"


def model_name(facts: Facts) -> str:
    """The name of the model and its files, for example full_sft_512."""
    return f"{facts['stage']}_{facts['size']}"


def foreign_base(facts: Facts) -> str:
    return next((str(e.get("source", "")) for e in facts["chain"] if e.get("stage") == "transformers"), "")


def escape_card_text(value: Any) -> str:
    """`value` on one line, at most 200 characters, with the markup of markdown and HTML escaped."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\|`*[]" else "&lt;" if c == "<" else c for c in text)[:200]


def front_matter(facts: Facts, license: str, adapter_of: str) -> str:
    lines = ["---", *(["language:"] if facts["languages"] else []), *(f"- {name}" for name in facts["languages"])]
    lines += [f"license: {license}", f"library_name: {'peft' if adapter_of else 'transformers'}"]
    if base := adapter_of or foreign_base(facts):
        lines.append("base_model: '" + escape_card_text(base).replace("'", "''") + "'")  # a YAML string
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags:", "- mengya", "---", ""])


def overview_section(facts: Facts, architecture: str, adapter_of: str) -> str:
    config, total, active = facts["config"], facts["parameters"], facts["active_parameters"]
    size = f"{total / 1e6:.1f} M parameters" + (f" ({active / 1e6:.1f} M active per token)" if active != total else "")
    if adapter_of:
        adapter = facts["adapter"] or {}
        kind = f"LoRA adapter of rank {adapter.get('rank')}, alpha {adapter.get('alpha')}"
        size = f"{kind}, for {escape_card_text(adapter_of)}: {size}"
    attention = f"{config['n_heads']} heads, {config['n_kv_heads']} key/value heads"
    if config.get("head_dim", 0) not in (0, config["dim"] // config["n_heads"]):
        attention += f" of {config['head_dim']}"
    if config.get("qkv_bias"):
        attention += ", biases on q, k and v"
    rope = rope_summary(ModelConfig(**config))
    rows = [
        ["architecture", f"`{architecture}`, {config['n_layers']} layers of {config['dim']}, {attention}"],
        ["longest text", f"{config['max_seq_len']} tokens" + (f" (RoPE scaling: {rope})" if rope else "")],
        ["vocabulary", f"{config['vocab_size']:,} tokens"],
        ["chat format", escape_card_text(facts["chat_format"] or "none: the model continues text")],
    ]
    if config["use_moe"]:
        experts = f"{config['n_shared_experts']} shared, {config['n_routed_experts']} routed"
        rows.append(["experts", f"{experts}, {config['n_active_experts']} of them for each token"])
    languages = " and ".join({"zh": "Chinese", "en": "English"}[name] for name in facts["languages"])
    sentence = f"A small language model ({size})" + (f" for {languages}" if languages else "")
    scratch = ", trained from scratch" if facts["chain"] and not foreign_base(facts) else ""
    return f"{sentence}{scratch}.\n\n" + markdown_table(("", ""), rows)


def training_section(facts: Facts) -> str:
    rows = []
    for entry in facts["chain"]:
        amounts = [f"{int(number_or_zero(entry.get(n))):,} {n}" for n in ("answers", "pairs", "tokens") if entry.get(n)]
        stage, validation = str(entry.get("stage")), entry.get("validation")
        rows.append([
            escape_card_text(stage),
            STAGE_DESCRIPTIONS.get(stage, ""),
            escape_card_text(entry.get("data") or entry.get("source") or ""),
            amounts[0] if amounts else "",
            f"{number_or_zero(entry.get('seconds')) / 60:.1f}" if entry.get("seconds") else "",
            f"{number_or_zero(entry.get('loss')):.3f}" if entry.get("loss") else "",
            validation_figures(validation if isinstance(validation, dict) else {}),
        ])  # fmt: skip
    if not rows:
        return "No training record is available.\n"
    headers = ("stage", "what", "data", "trained on", "minutes", "last loss", "held-out")
    return markdown_table(headers, rows) + (
        "\nLosses are in nats per trained token (preference training: per pair; with rewards: per answer). Bits per "
        "byte can be compared across tokenizers; lower is better.\n"
    )


def validation_figures(validation: dict[str, Any]) -> str:
    """Validation metrics by language: bits per byte if known, else the fraction of pairs ranked right, else loss."""
    formats = {
        "bits_per_byte": "{:.3f} bits/byte",
        "val_reward_accuracy": "{:.1%} ranked right",
        "val_pass@1": "{:.1%} right",
        "val_loss": "loss {:.3f}",
    }
    validation = with_current_metric_keys(validation)
    for kind, number_format in formats.items():
        values = validation.get(kind)
        if isinstance(values, dict) and values:
            texts = {name: number_format.format(number_or_zero(value)) for name, value in sorted(values.items())}
            return ", ".join(f"{escape_card_text(name)} {text}" for name, text in texts.items())
    return ""


def scores_section(facts: Facts) -> str:
    rows = []
    for score in facts["scores"]:
        for language, accuracy in sorted(score["accuracy"].items()):
            count = score["questions"].get(language)
            name = escape_card_text(score["name"])
            rows.append([name, escape_card_text(language), f"{accuracy:.1%}", f"{count}" if count else ""])
    return markdown_table(("report", "language", "answered right", "questions"), rows)


def usage_section(facts: Facts, name: str, files: list[str], adapter_of: str) -> str:
    quoted = json.dumps(name)
    code = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    if adapter_of:
        code = f"from peft import PeftModel\n{code}"
        code += f"base = AutoModelForCausalLM.from_pretrained({json.dumps(adapter_of)})\n"
        code += f"model = PeftModel.from_pretrained(base, {quoted})\n"
    else:
        code += f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
    code += f"tokenizer = AutoTokenizer.from_pretrained({quoted})\n"
    code += CHAT_CODE if facts["chat_format"] and facts["stage"] != "pretrain" else TEXT_CODE
    text = f"```python\n{code}{ANSWER_CODE}```\n"
    for file in files:
        if file.endswith(".gguf"):
            text += f"\n`{file}` is for llama.cpp: `llama-cli -m {file}`. "
            text += f"With Ollama: `ollama create {model_name(facts)} -f Modelfile`.\n"
    return text


def markdown_table(headers: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
