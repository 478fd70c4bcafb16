"""Compares a GGUF file with its model: read back with the gguf package, and run in llama.cpp if that is installed.

    always                  every tensor, dequantised, equals the model's within the rounding error of the format
    with llama-cpp-python   equal tokens of the texts of verify_hf.py and of a chat; logits along a greedy answer within
                            LLAMA_CPP_TOLERANCE; an equal greedy answer, unless two tokens tie within the tolerance

The reference is the model with weights rounded as in the file. With f16, bf16 and q8_0 llama.cpp also rounds the
activations, so their tolerances are wide. The KV cache is in fp32.
In a mixture of experts this rounding may route a token to another expert, and no tolerance holds. For an MoE a
temporary f32 file is compared instead, and the difference of the rounded file is only reported.
Read next: gguf_export.py.
"""

import contextlib
import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from export.gguf_export import gguf_tensors, import_gguf, storage_type, write_gguf
from export.gguf_tokenizer import tokenizer_caveat
from export.verify_hf import (
    GREEDY_TOKENS,
    SAMPLE_TEXTS,
    common_prefix,
    greedy_decode,
    sample_chat_ids,
    sample_chat_text,
)
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

ROUNDING = {"f32": 0.0, "f16": 2**-10, "bf16": 2**-7, "q8_0": 1 / 127}  # fraction of a tensor's largest absolute value
LLAMA_CPP_TOLERANCE = {"f32": 1e-3, "f16": 0.05, "bf16": 0.3, "q8_0": 0.5}
INSTALL_HINT = "pip install llama-cpp-python"


def check_gguf(path: Path, model: Transformer, tokenizer: ChatTokenizer, quantization: str) -> str:
    """Compare the file with the model; return the line to print. Raises UserError that names the difference."""
    check_gguf_tensors(path, model, quantization)
    try:
        with suppress_stderr():
            import llama_cpp
    except ImportError:
        return f"{path.name}: tensors ok; not run in llama.cpp: {INSTALL_HINT}{tokenizer_caveat(tokenizer)}"
    if model.config.use_moe and quantization != "f32":
        exact = path.with_name(f"{path.name}.f32")
        try:
            write_gguf(exact, model, tokenizer, "f32", {"stage": "", "size": ""})
            run_llama_cpp(llama_cpp, exact, model, tokenizer, "f32")
        finally:
            exact.unlink(missing_ok=True)
    same = run_llama_cpp(llama_cpp, path, with_quantized_weights(model, quantization), tokenizer, quantization)
    return f"{path.name} in llama.cpp: {same}{tokenizer_caveat(tokenizer)}"


def run_llama_cpp(llama_cpp: Any, path: Path, model: Transformer, tokenizer: ChatTokenizer, quantization: str) -> str:
    """Compare the file in llama.cpp with `model`; return a summary. Raises UserError if they differ."""
    size = model.config.max_seq_len
    with suppress_stderr():  # type_k, type_v 0: KV cache in fp32
        llama = llama_cpp.Llama(
            str(path), n_ctx=size, logits_all=True, verbose=False, type_k=0, type_v=0, n_gpu_layers=0
        )
    try:
        check_llama_cpp_tokens(llama, tokenizer)
        return compare_with_llama_cpp(llama, model, tokenizer, quantization)
    finally:
        llama.close()


def check_gguf_tensors(path: Path, model: Transformer, quantization: str) -> None:
    """Raises UserError if a tensor of the file differs from the model's by more than rounding."""
    gguf = import_gguf()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, wanted in gguf_tensors(model):
        tensor = found.pop(name, None)
        if tensor is None:
            raise UserError(f"{path.name} has no tensor {name}")
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(wanted.shape)
        error = float((torch.from_numpy(data) - wanted).abs().max())
        if not error <= ROUNDING[quantization] * float(wanted.abs().max()):
            raise UserError(f"{path.name}: {name} differs by {error:.2g}")
    if found:
        raise UserError(f"{path.name} has tensors that the model lacks: {', '.join(sorted(found)[:5])}")


def with_quantized_weights(model: Transformer, quantization: str) -> Transformer:
    """A copy of the model with its weights quantised and dequantised as in the file."""
    gguf, copied = import_gguf(), copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in copied.named_parameters():
            kind = storage_type(gguf, name, weight, quantization)
            data = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
            weight.copy_(torch.from_numpy(np.array(data, np.float32)).view_as(weight))
    return copied


def check_llama_cpp_tokens(llama: Any, tokenizer: ChatTokenizer) -> None:
    """Compare the tokens of plain text, where markers stay text, and of a rendered chat, where they are control tokens.

    Raises UserError if they differ.
    """
    for text in SAMPLE_TEXTS:
        if llama.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode(text):
            raise UserError(f"llama.cpp gives other tokens for the text {text!r}")
    chat = sample_chat_ids(tokenizer)
    if chat and llama.tokenize(sample_chat_text(tokenizer).encode(), add_bos=False, special=True) != chat:
        raise UserError("llama.cpp gives other tokens for a rendered chat")


@torch.inference_mode()
def compare_with_llama_cpp(llama: Any, model: Transformer, tokenizer: ChatTokenizer, quantization: str) -> str:
    """Compare the logits along our greedy answer, then the greedy answers. Raises UserError if they differ."""
    limit, tolerance = model.config.max_seq_len, LLAMA_CPP_TOLERANCE[quantization]
    if model.config.use_moe and quantization != "f32":
        tolerance = math.inf
    prompt = (sample_chat_ids(tokenizer) or tokenizer.encode(SAMPLE_TEXTS[0]))[: max(1, limit - GREEDY_TOKENS - 1)]
    number = min(GREEDY_TOKENS, limit - len(prompt) - 1)
    ours, logits = greedy_decode(model, prompt, number)
    llama.reset()
    llama.eval(prompt + ours[:-1])
    theirs = torch.from_numpy(np.array(llama.scores[len(prompt) - 1 : len(prompt) - 1 + number]))
    difference = float((theirs - logits).abs().max())
    if not difference <= tolerance:
        raise UserError(f"logits differ by {difference:.2g}, more than {tolerance:g}")
    llama.reset()
    answer: list[int] = []
    llama.eval(prompt)
    while len(answer) < number:
        answer.append(int(llama.scores[len(prompt) + len(answer) - 1].argmax()))
        llama.eval(answer[-1:])
    compared = common_prefix(ours, logits, answer, tolerance)
    allowed = f"allowed {tolerance:g}" if tolerance < math.inf else "not limited for MoE; equal in f32"
    result = f"equal tokens; logits differ by at most {difference:.1e} ({allowed}), {compared} greedy tokens equal"
    if compared < number:
        alike = int((theirs.argmax(-1) == logits.argmax(-1)).sum())
        result += f", then a tie; argmax equal at {alike} of {number} positions"
    return result


@contextlib.contextmanager
def suppress_stderr() -> Iterator[None]:
    """Redirect stderr to os.devnull: file descriptor 2 as well, since llama.cpp bypasses sys.stderr."""
    old = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            with contextlib.redirect_stderr(nothing):
                yield
        finally:
            os.dup2(old, 2)
            os.close(old)
