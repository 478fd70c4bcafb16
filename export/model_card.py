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
}


def model_card(facts: Facts, architecture: str, license: str, name: str, files: list[str], adapter_of: str = "") -> str:
    """The text of README.md.

    facts: see model_facts. architecture: the stock class. license: an identifier of the hub, or "unknown". name: the
    model's name in the usage code. files: the files in the folder. adapter_of: the parent of an unmerged adapter.
    """
    title = f"{facts['stage']}_{facts['size']}"
    parts = [
        front_matter(facts, license, adapter_of),
        f"# {title}\n",
        overview_section(facts, architecture, adapter_of),
    ]
    parts += ["## Training\n", training_section(facts)]
    if facts["scores"]:
        parts += ["## Scores\n", scores_section(facts)]
    parts += ["## Use\n", usage_section(facts, name, files, adapter_of), "## Limits\n", limits_section(facts, license)]
    return "\n".join(parts).rstrip("\n") + "\n"


def front_matter(facts: Facts, license: str, adapter_of: str) -> str:
    lines = [
        "---",
        *(["language:", *(f"- {language}" for language in facts["languages"])] if facts["languages"] else []),
    ]
    lines += [f"license: {license}", f"library_name: {'peft' if adapter_of else 'transformers'}"]
    if adapter_of or foreign_base(facts):
        lines.append(f"base_model: {yaml_string(adapter_of or foreign_base(facts))}")
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags:", "- mengya", "---", ""])


def yaml_string(text: str) -> str:
    """`text` as a quoted YAML string on one line."""
    return "'" + escape_card_text(text).replace("'", "''") + "'"


def escape_card_text(value: Any) -> str:
    """`value` on one line, at most 200 characters, with the markup of markdown and HTML escaped."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\|`*[]" else "&lt;" if c == "<" else c for c in text)[:200]


def foreign_base(facts: Facts) -> str:
    return next((str(e.get("source", "")) for e in facts["chain"] if e.get("stage") == "transformers"), "")


def overview_section(facts: Facts, architecture: str, adapter_of: str) -> str:
    rope = rope_summary(ModelConfig(**facts["config"]))
    config, total, active = facts["config"], facts["parameters"], facts["active_parameters"]
    size = f"{total / 1e6:.1f} M parameters" + (f" ({active / 1e6:.1f} M active per token)" if active != total else "")
    has_own_head_dim = config.get("head_dim", 0) not in (0, config["dim"] // config["n_heads"])
    attention_details = f" of {config['head_dim']}" * has_own_head_dim + ", biases on q, k and v" * bool(
        config.get("qkv_bias")
    )
    if adapter_of:
        adapter = facts["adapter"] or {}
        size = (
            f"LoRA adapter of rank {adapter.get('rank')}, alpha {adapter.get('alpha')}, "
            f"for {escape_card_text(adapter_of)}: {size}"
        )
    language_names = {"zh": "Chinese", "en": "English"}
    languages = " and ".join(language_names[language] for language in facts["languages"])
    rows = {
        "architecture": f"`{architecture}`, {config['n_layers']} layers of {config['dim']}, {config['n_heads']} heads, "
        f"{config['n_kv_heads']} key/value heads{attention_details}",
        "longest text": f"{config['max_seq_len']} tokens" + (f" (RoPE scaling: {rope})" if rope else ""),
        "vocabulary": f"{config['vocab_size']:,} tokens",
        "chat format": escape_card_text(facts["chat_format"] or "none: the model continues text"),
    }
    if config["use_moe"]:
        rows["experts"] = (
            f"{config['n_shared_experts']} shared, {config['n_routed_experts']} routed, "
            f"{config['n_active_experts']} of them for each token"
        )
    scratch = ", trained from scratch" if facts["chain"] and not foreign_base(facts) else ""
    sentence = f"A small language model ({size})" + (f" for {languages}" if languages else "")
    return f"{sentence}{scratch}.\n\n" + markdown_table(("", ""), [[name, value] for name, value in rows.items()])


def training_section(facts: Facts) -> str:
    rows = []
    for entry in facts["chain"]:
        validation = entry.get("validation") if isinstance(entry.get("validation"), dict) else {}
        amount = f"{int(number_or_zero(entry.get('pairs'))):,} pairs" if entry.get("pairs") else ""
        amount = amount or (f"{int(number_or_zero(entry.get('tokens'))):,} tokens" if entry.get("tokens") else "")
        minutes = f"{number_or_zero(entry.get('seconds')) / 60:.1f}" if entry.get("seconds") else ""
        loss = f"{number_or_zero(entry.get('loss')):.3f}" if entry.get("loss") else ""
        stage = str(entry.get("stage"))
        data = entry.get("data") or entry.get("source") or ""
        rows.append(
            [
                escape_card_text(stage),
                STAGE_DESCRIPTIONS.get(stage, ""),
                escape_card_text(data),
                amount,
                minutes,
                loss,
                validation_figures(validation),
            ]
        )
    if not rows:
        return "No training record is available.\n"
    headers = ("stage", "what", "data", "trained on", "minutes", "last loss", "held-out")
    return markdown_table(headers, rows) + (
        "\nLosses are in nats per trained token (preference training: per pair). Bits per byte can be compared across "
        "tokenizers; lower is better.\n"
    )


def validation_figures(validation: dict[str, Any]) -> str:
    """Validation metrics by language: bits per byte if known, else the fraction of pairs ranked right, else loss."""
    formats = {
        "bits_per_byte": "{:.3f} bits/byte",
        "val_reward_accuracy": "{:.1%} ranked right",
        "val_loss": "loss {:.3f}",
    }
    validation = with_current_metric_keys(validation)
    for kind, number_format in formats.items():
        values = validation.get(kind)
        if isinstance(values, dict) and values:
            return ", ".join(
                f"{escape_card_text(name)} {number_format.format(number_or_zero(value))}"
                for name, value in sorted(values.items())
            )
    return ""


def scores_section(facts: Facts) -> str:
    rows = []
    for score in facts["scores"]:
        accuracy, num_questions = score.get("accuracy"), score.get("questions")
        for language, value in sorted(accuracy.items()) if isinstance(accuracy, dict) else ():
            count = number_or_zero(num_questions.get(language)) if isinstance(num_questions, dict) else 0
            rows.append(
                [
                    escape_card_text(score.get("name")),
                    escape_card_text(language),
                    f"{number_or_zero(value):.1%}",
                    f"{int(count)}" if count else "",
                ]
            )
    return markdown_table(("report", "language", "answered right", "questions"), rows)


def usage_section(facts: Facts, name: str, files: list[str], adapter_of: str) -> str:
    is_chat_model = facts["chat_format"] and facts["stage"] != "pretrain"
    if adapter_of:
        load_code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(adapter_of)})\n"
            f"model = PeftModel.from_pretrained(base, {json.dumps(name)})\n"
        )
    else:
        load_code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})\n"
        )
    if is_chat_model:
        prompt_code = (
            'messages = [{"role": "user", "content": "你好！"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        )
    else:
        prompt_code = 'inputs = tokenizer("The sun is", return_tensors="pt", return_token_type_ids=False)\n'
    text = f"```python\n{load_code}tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n{prompt_code}"
    text += (
        'answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]\n'
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n```\n"
    )
    for file in files:
        if file.endswith(".gguf"):
            text += f"\n`{file}` is for llama.cpp: `llama-cli -m {file}`. "
            text += f"With Ollama: `ollama create {model_name(facts)} -f Modelfile`.\n"
    return text


def model_name(facts: Facts) -> str:
    """The name of the model and its files, for example full_sft_512."""
    return f"{facts['stage']}_{facts['size']}"


def limits_section(facts: Facts, license: str) -> str:
    text = "A model of this size knows little and hallucinates: do not rely on its answers.\n"
    if license == "unknown":
        text += "\nNo licence was stated for these weights.\n"
    return text


def markdown_table(headers: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
