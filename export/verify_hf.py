"""Compares an exported folder, opened by stock transformers, with its model.

    tokens    equal ids for every text below, and for a chat through the chat template
    logits    of those texts and of random ids: at most HF_TOLERANCE apart, in fp32 on the CPU
    answer    GREEDY_TOKENS equal greedy tokens of generate(), unless two tokens tie within the tolerance

Any other difference is an error, and the folder is removed. An adapter is compared in the same way with peft.
Read next: hf_export.py (writes the folder), verify_gguf.py (the same for llama.cpp).
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.packages import require_packages
from export.hf_export import hf_state_dict
from model.tokenizer import ChatTokenizer
from model.transformer import KVCache, Transformer

HF_TOLERANCE = 1e-4  # largest absolute difference, fp32
GREEDY_TOKENS = 64
SAMPLE_TEXTS = (  # both languages, digits, spaces, line ends, a joined emoji, a 4-byte character, marker-like text
    "你好，请介绍一下你自己。",
    "Hello! It's 3,141.59 metres  from here -- isn't it?\n\n\tYes, \"really\".\r\n",
    "水在 0°C 会结冰；water boils at 100 °C。👩‍👩‍👧‍👦🎉 𠮷野家 ｶﾀｶﾅ ①②٣ <b>café</b> naïve ½",
)
SAMPLE_CHAT = (
    {"role": "user", "content": "什么是太阳？ What is the sun?"},
    {"role": "assistant", "content": "太阳是一颗恒星。"},
    {"role": "user", "content": "Thanks 😀 再见"},
)


def with_rounded_weights(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model in fp32 with its weights rounded to `dtype`, as in the folder."""
    if dtype == torch.float32:
        return model
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.copy_(weight.to(dtype))
    return copied


def sample_chat_ids(tokenizer: ChatTokenizer) -> list[int]:
    """The ids of SAMPLE_CHAT; [] if the tokenizer has no chat template or its template rejects this chat."""
    try:
        return tokenizer.render(list(SAMPLE_CHAT), add_generation_prompt=True)[0]
    except UserError:
        return []


def sample_chat_text(tokenizer: ChatTokenizer) -> str:
    """The text of SAMPLE_CHAT. Decoding its ids may differ: a SentencePiece decoder drops a space."""
    return tokenizer.chat_format.text(list(SAMPLE_CHAT), True)


def comparison_inputs(model: Transformer, tokenizer: ChatTokenizer) -> list[list[int]]:
    """Rows of ids to compare on: the texts and the chat, cut to max_seq_len, and two rows of random ids."""
    found = [tokenizer.encode(text) for text in SAMPLE_TEXTS]
    found.append(sample_chat_ids(tokenizer))
    generator = torch.Generator().manual_seed(0)
    length = min(128, model.config.max_seq_len)
    found += torch.randint(0, model.config.vocab_size, (2, length), generator=generator).tolist()
    return [ids[: model.config.max_seq_len] for ids in found if ids]


@torch.inference_mode()
def greedy_decode(model: Transformer, prompt: list[int], number: int) -> tuple[list[int], Tensor]:
    """Decode `number` tokens greedily, ignoring stop tokens; return the ids and the logits (number, vocab)."""
    cache = KVCache(model.config, 1, len(prompt) + number, torch.device("cpu"), torch.float32)
    ids, tokens, rows = torch.tensor([prompt]), [], []
    for _ in range(number):
        row = model.logits(ids, cache)[0, -1]
        rows.append(row)
        tokens.append(int(row.argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(rows)


def common_prefix(ours: list[int], logits: Tensor, theirs: list[int], tolerance: float) -> int:
    """How many leading tokens are equal: all, or those before a tie of two tokens within `tolerance`.

    `ours` and `theirs` are (number,), `logits` (number, vocab) belongs to `ours`. Raises UserError if two tokens differ
    that are not a tie.
    """
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine == other:
            continue
        gap = float(logits[step, mine] - logits[step, other])
        if not gap <= 2 * tolerance:
            raise UserError(f"greedy token {step + 1} is {other} instead of {mine}, {gap:.2g} apart in logits")
        return step
    if len(theirs) < len(ours):
        raise UserError(f"the greedy answer stops after {len(theirs)} of {len(ours)} tokens")
    return len(ours)


def check_hf_folder(folder: Path, model: Transformer, tokenizer: ChatTokenizer, dtype: torch.dtype) -> str:
    """Compare an exported folder with its model; return the line to print.

    Raises UserError that names the difference.
    """
    import transformers

    with suppress_transformers_output(transformers):
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # a folder  # nosec B615
        check_hf_tokens(theirs, tokenizer)
        hf_model = open_hf_model(transformers, folder, hf_state_dict(model, torch.float32).keys())
        return compare_with_hf(with_rounded_weights(model, dtype), hf_model, tokenizer, type(hf_model).__name__)


def check_adapter(folder: Path, base: Path, model: Transformer, tokenizer: ChatTokenizer) -> str:
    """Compare an adapter's folder, opened by peft on the parent in `base`, with `model`; return the line to print."""
    require_packages("--verify of an adapter", "peft", otherwise="--no-verify")
    import peft
    import transformers

    with suppress_transformers_output(transformers):
        parent = transformers.AutoModelForCausalLM.from_pretrained(  # a folder  # nosec B615
            base, trust_remote_code=False, **fp32_kwargs(transformers)
        )
        return compare_with_hf(model, peft.PeftModel.from_pretrained(parent, folder).eval(), tokenizer, "PeftModel")


def open_hf_model(transformers: Any, folder: Path, names: Any) -> Any:
    """transformers' model in fp32. Raises UserError for missing, unexpected or mismatched tensors."""
    hf_model, loading = transformers.AutoModelForCausalLM.from_pretrained(  # a folder  # nosec B615
        folder, trust_remote_code=False, output_loading_info=True, **fp32_kwargs(transformers)
    )
    wrong = {n: sorted(map(str, loading.get(n) or ())) for n in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    wrong["missing_keys"] = [n for n in wrong["missing_keys"] if n != "lm_head.weight" or n in names]
    if any(wrong.values()):
        raise UserError(f"transformers does not load every tensor: {wrong}")
    return hf_model.eval()


def fp32_kwargs(transformers: Any) -> dict[str, Any]:
    """The keyword argument that selects fp32 in this version of transformers."""
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    return {name: torch.float32}


def check_hf_tokens(theirs: Any, ours: ChatTokenizer) -> None:
    for text in SAMPLE_TEXTS:
        if theirs.encode(text, add_special_tokens=False) != ours.encode(text):
            raise UserError(f"transformers gives other tokens for the text {text!r}")
    if chat := sample_chat_ids(ours):
        found = theirs.apply_chat_template(list(SAMPLE_CHAT), add_generation_prompt=True, tokenize=True)
        found = found if isinstance(found, list) else found["input_ids"]
        if list(found) != chat:
            raise UserError("the chat template gives other tokens in transformers than here")


@torch.inference_mode()
def compare_with_hf(model: Transformer, hf_model: Any, tokenizer: ChatTokenizer, name: str) -> str:
    """Compare logits and a greedy answer on the CPU in fp32. Raises UserError if they differ."""
    largest, rows = 0.0, comparison_inputs(model, tokenizer)
    for ids in rows:
        reset_dynamic_rope(model, hf_model)
        difference = float((model.logits(torch.tensor([ids])) - hf_model(torch.tensor([ids])).logits).abs().max())
        if not difference <= HF_TOLERANCE:  # also true for NaN
            raise UserError(f"{name}'s logits differ by {difference:.2g}, more than {HF_TOLERANCE:g}")
        largest = max(largest, difference)
    prompt = (sample_chat_ids(tokenizer) or rows[0])[: max(1, model.config.max_seq_len - GREEDY_TOKENS)]
    number = min(GREEDY_TOKENS, model.config.max_seq_len - len(prompt))
    ours, logits = greedy_decode(model, prompt, number)
    reset_dynamic_rope(model, hf_model)
    hf_model.generation_config.eos_token_id = None  # ignore stop tokens
    options = {"do_sample": False, "temperature": None, "top_p": None, "max_new_tokens": number}
    prompts = torch.tensor([prompt])
    found = hf_model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)
    compared = common_prefix(ours, logits, found[0, len(prompt) :].tolist(), HF_TOLERANCE)
    positions, tie = sum(map(len, rows)), ", then a tie" if compared < number else ""
    limits = f"differ by at most {largest:.1e} (allowed {HF_TOLERANCE:g})"
    return f"{name}: logits at {positions} positions {limits}, {compared} greedy tokens equal{tie}"


def reset_dynamic_rope(model: Transformer, hf_model: Any) -> None:
    """Run a short sequence: transformers' dynamic RoPE keeps the angles of the longest sequence until then."""
    if model.config.rope_scaling.get("rope_type") == "dynamic":
        hf_model(torch.zeros(1, 1, dtype=torch.long))


@contextlib.contextmanager
def suppress_transformers_output(transformers: Any) -> Iterator[None]:
    """Suppress warnings, log lines and progress bars of transformers."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
