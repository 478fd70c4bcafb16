"""The model card, README.md of an exported folder: what the model is, what it was trained on, how well it did, how to
use it. Written from the lineage (model_facts.py) and nothing else: what was not measured is not there.

The block between the dashes is YAML for the model hub; its fields: https://huggingface.co/docs/hub/model-cards
Read next: model_facts.py, ../export_model.py.
"""

import json
from typing import Any

from export.facts_file import Facts, number
from model.config import ModelConfig
from model.rope import describe

WHAT = {  # what a stage taught
    "transformers": "started from another model",
    "pretrain": "pretraining: to continue text",
    "full_sft": "supervised fine-tuning: to answer",
    "lora_sft": "LoRA fine-tuning: thin matrices beside the weights",
    "dpo": "preference training: to prefer the better of two answers",
}


def card(known: Facts, architecture: str, license: str, name: str, files: list[str], adapter_of: str = "") -> str:
    """The text of README.md.

    known: of lineage.facts. architecture: the stock class. license: an identifier of the hub, or "unknown". name: what
    the usage lines call the model. files: names beside the card. adapter_of: what an unmerged adapter belongs to.
    """
    title = f"{known['stage']}_{known['size']}"
    parts = [front_matter(known, license, adapter_of), f"# {title}\n", about(known, architecture, adapter_of)]
    parts += ["## Training\n", training(known)]
    if known["scores"]:
        parts += ["## Scores\n", scores(known)]
    parts += ["## Use\n", usage(known, name, files, adapter_of), "## Limits\n", limits(known, license)]
    return "\n".join(parts).rstrip("\n") + "\n"


def front_matter(known: Facts, license: str, adapter_of: str) -> str:
    lines = [
        "---",
        *(["language:", *(f"- {language}" for language in known["languages"])] if known["languages"] else []),
    ]
    lines += [f"license: {license}", f"library_name: {'peft' if adapter_of else 'transformers'}"]
    if adapter_of or foreign_base(known):
        lines.append(f"base_model: {quoted(adapter_of or foreign_base(known))}")
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags:", "- mengya", "---", ""])


def quoted(text: str) -> str:
    """As a string in YAML, whatever is in it."""
    return "'" + plain(text).replace("'", "''") + "'"


def plain(value: Any) -> str:
    """A value on one line, without what markdown or HTML would act on."""
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\|`*[]" else "&lt;" if c == "<" else c for c in text)[:200]


def foreign_base(known: Facts) -> str:
    return next((str(e.get("source", "")) for e in known["chain"] if e.get("stage") == "transformers"), "")


def about(known: Facts, architecture: str, adapter_of: str) -> str:
    rope = describe(ModelConfig(**known["config"]))
    config, total, active = known["config"], known["parameters"], known["active_parameters"]
    size = f"{total / 1e6:.1f} M parameters" + (f" ({active / 1e6:.1f} M active a token)" if active != total else "")
    wide = config.get("head_dim", 0) not in (0, config["dim"] // config["n_heads"])
    more = f" of {config['head_dim']}" * wide + ", biases on q, k and v" * bool(config.get("qkv_bias"))
    if adapter_of:
        numbers = known["adapter"] or {}
        size = (
            f"LoRA adapter of rank {numbers.get('rank')}, alpha {numbers.get('alpha')}, for {plain(adapter_of)}: {size}"
        )
    speaks = {"zh": "Chinese", "en": "English"}
    languages = " and ".join(speaks[language] for language in known["languages"])
    rows = {
        "architecture": f"`{architecture}`, {config['n_layers']} layers of {config['dim']}, {config['n_heads']} heads, "
        f"{config['n_kv_heads']} key/value heads{more}",
        "longest text": f"{config['max_seq_len']} tokens" + (f" (RoPE scaling: {rope})" if rope else ""),
        "vocabulary": f"{config['vocab_size']:,} tokens",
        "chat format": plain(known["chat_format"] or "none: it continues text"),
    }
    if config["use_moe"]:
        rows["experts"] = (
            f"{config['n_shared_experts']} shared, {config['n_routed_experts']} routed, "
            f"{config['n_active_experts']} of them for each token"
        )
    scratch = ", trained from scratch" if known["chain"] and not foreign_base(known) else ""
    sentence = f"A small language model ({size})" + (f" for {languages}" if languages else "")
    return f"{sentence}{scratch}.\n\n" + table(("", ""), [[name, value] for name, value in rows.items()])


def training(known: Facts) -> str:
    rows = []
    for entry in known["chain"]:
        validation = entry.get("validation") if isinstance(entry.get("validation"), dict) else {}
        seen = f"{int(number(entry.get('pairs'))):,} pairs" if entry.get("pairs") else ""
        seen = seen or (f"{int(number(entry.get('tokens'))):,} tokens" if entry.get("tokens") else "")
        minutes = f"{number(entry.get('seconds')) / 60:.1f}" if entry.get("seconds") else ""
        loss = f"{number(entry.get('loss')):.3f}" if entry.get("loss") else ""
        stage = str(entry.get("stage"))
        data = entry.get("data") or entry.get("source") or ""
        rows.append(
            [plain(stage), WHAT.get(stage, ""), plain(data), seen, minutes, loss, validation_figures(validation)]
        )
    if not rows:
        return "Nothing is known about it.\n"
    heads = ("stage", "what", "data", "trained on", "minutes", "last loss", "held-out")
    return table(heads, rows) + (
        "\nLosses are nats per trained token (of preference training: per pair); bits per byte compare across "
        "tokenizers, lower is better.\n"
    )


def validation_figures(validation: dict[str, Any]) -> str:
    """Held-out figures by language: bits per byte where they exist, else the share of pairs ranked right, else loss."""
    kinds = {"bits_per_byte": "{:.3f} bits/byte", "val_accuracy": "{:.1%} ranked right", "val_loss": "loss {:.3f}"}
    for kind, form in kinds.items():
        values = validation.get(kind)
        if isinstance(values, dict) and values:
            return ", ".join(f"{plain(name)} {form.format(number(value))}" for name, value in sorted(values.items()))
    return ""


def scores(known: Facts) -> str:
    rows = []
    for score in known["scores"]:
        accuracy, asked = score.get("accuracy"), score.get("questions")
        for language, value in sorted(accuracy.items()) if isinstance(accuracy, dict) else ():
            count = number(asked.get(language)) if isinstance(asked, dict) else 0
            rows.append(
                [plain(score.get("name")), plain(language), f"{number(value):.1%}", f"{int(count)}" if count else ""]
            )
    return table(("report", "language", "answered right", "questions"), rows)


def usage(known: Facts, name: str, files: list[str], adapter_of: str) -> str:
    chats = known["chat_format"] and known["stage"] != "pretrain"
    if adapter_of:
        opening = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(adapter_of)})\n"
            f"model = PeftModel.from_pretrained(base, {json.dumps(name)})\n"
        )
    else:
        opening = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})\n"
        )
    if chats:
        asking = (
            'messages = [{"role": "user", "content": "你好！"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        )
    else:
        asking = 'inputs = tokenizer("The sun is", return_tensors="pt", return_token_type_ids=False)\n'
    text = f"```python\n{opening}tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n{asking}"
    text += (
        'answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]\n'
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n```\n"
    )
    for file in files:
        if file.endswith(".gguf"):
            text += f"\n`{file}` is for llama.cpp: `llama-cli -m {file}`. "
            text += f"With Ollama: `ollama create {name_of(known)} -f Modelfile`.\n"
    return text


def name_of(known: Facts) -> str:
    """What the files and the model are called: full_sft_512."""
    return f"{known['stage']}_{known['size']}"


def limits(known: Facts, license: str) -> str:
    text = "A model of this size knows little and makes things up: do not rely on what it says.\n"
    if license == "unknown":
        text += "\nNo licence was stated for these weights.\n"
    return text


def table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
