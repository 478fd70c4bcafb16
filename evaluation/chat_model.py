"""A loaded model with its tokenizer: prompts and generation for the command line, the page, the server and reports.

    chat_model = open_chat_model("out/full_sft_512.pth")
    prompt = chat_model.prompt_ids([{"role": "user", "content": "Hello"}], settings.max_new_tokens)
    for piece in chat_model.stream(prompt, settings, completion): …          one answer, piece by piece
    completions = chat_model.generate([prompt, …], settings)                 many answers in one batch

A model of a chat stage gets the messages in its chat format; a pretrained model continues the bare text.
Read next: terminal_chat.py (a conversation), qa.py (questions with keys), report.py (comparison of several models),
../model/generate.py (the sampling loop).
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.device import autocast, pick_device, pick_dtype
from common.errors import UserError
from export.hf_import import open_model
from model.chat_template import Message
from model.checkpoint import PARENT_STAGES, find_checkpoint, latest_checkpoint, trained_stages
from model.completion import Completion
from model.decode import DecodeModel, round_to_int8
from model.generate import chat_prompt, generate, stream
from model.rope import rope_summary
from model.rope_flags import RopeScaling
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer


def models_folder(out_dir: str) -> Path:
    """`out_dir`; if it has no checkpoint, its only subfolder with checkpoints, as out/demo.

    Raises UserError if several subfolders have some.
    """
    folder = Path(out_dir)
    if trained_stages(folder):
        return folder
    runs = sorted({path.parent for stage in PARENT_STAGES for path in folder.glob(f"*/{stage}_[0-9]*.pth")})
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        raise UserError(f"no model in {folder}, but in its folders {names}: choose one, as --run_name {runs[0].name}")
    return runs[0] if runs else folder


def find_model(out_dir: str, checkpoint: str = "", stage: str = "") -> Path:
    """The path of `checkpoint`, else the model of `stage`, else of the latest stage, in `models_folder(out_dir)`.

    Raises UserError if there is none, or more than one.
    """
    if checkpoint:
        return Path(checkpoint)
    if stage and stage not in PARENT_STAGES:
        raise UserError(f"--stage {stage}: unknown stage; choose from {', '.join(PARENT_STAGES)}")
    folder = models_folder(out_dir)
    return find_checkpoint(folder, stage) if stage else latest_checkpoint(folder)


@dataclass
class ChatModel:
    """A model in memory. `name`: that of the file without .pth, or of the folder."""

    name: str
    path: Path
    model: Transformer
    tokenizer: ChatTokenizer
    stage: str
    device: torch.device
    dtype: torch.dtype
    lineage: list[dict[str, Any]] = field(default_factory=list)
    is_int8: bool = False  # the weights have the values of round_to_int8

    @functools.cached_property
    def decoder(self) -> DecodeModel:
        """The decoding step of all answers. It may hold copies of the weights, which then must not change."""
        return DecodeModel(self.model, self.dtype, self.is_int8)

    @property
    def number_format(self) -> str:
        """The dtype of products, and that of the weights if they are rounded to int8."""
        return str(self.dtype).removeprefix("torch.") + (", int8 weights" if self.is_int8 else "")

    @property
    def is_chat_model(self) -> bool:
        """False for a pretrained model, which continues a text, and for a model without a chat format."""
        return self.stage != "pretrain" and self.tokenizer.format is not None

    @property
    def has_answer_parts(self) -> bool:
        """Whether thoughts and tool calls are read in its answers: those of chatml and of imported models."""
        return self.is_chat_model and self.tokenizer.format_name in ("chatml", "template")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end an answer in the model's chat format."""
        return self.tokenizer.stop_strings if self.is_chat_model else ()

    def summary(self) -> str:
        """One line: path, stage, number of parameters, device, dtype and RoPE scaling."""
        total, active = self.model.count_parameters()
        size = f"{total / 1e6:.1f} M parameters" + (f" ({active / 1e6:.1f} M active)" if active != total else "")
        rope = f", RoPE {scaling}" if (scaling := rope_summary(self.model.config)) else ""
        return f"{self.path}: {self.stage}, {size}, {self.device}, {self.number_format}{rope}"

    def prompt_ids(
        self, messages: list[Message], max_new_tokens: int, enable_thinking: bool | None = None
    ) -> list[int]:
        """The prompt tokens: the bare last text, or the chat with its latest turns that fit beside max_new_tokens.

        `enable_thinking`: see `ChatTokenizer.render`.
        """
        if not self.is_chat_model:
            return self.tokenizer.encode_document(messages[-1]["content"])
        return chat_prompt(self.model, self.tokenizer, messages, max_new_tokens, enable_thinking=enable_thinking)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which matrix products use `dtype`."""
        return autocast(self.device, self.dtype)

    def stream(self, prompt: list[int], settings: SamplingParams, completion: Completion) -> Iterator[str]:
        """Return an iterator over the pieces of the answer, which fills `completion` and may be advanced by any thread.

        Raises ValueError, at the call, for a prompt that is empty or too long.
        """
        pieces = stream(self.model, prompt, settings, self.tokenizer, completion, self.decoder)

        def next_piece() -> str | None:
            with self.autocast():
                return next(pieces, None)

        return iter(next_piece, None)

    def generate(self, prompts: list[list[int]], settings: SamplingParams) -> list[Completion]:
        """The completions of one batch. Raises ValueError for a prompt that is empty or too long."""
        with self.autocast():
            return generate(self.model, prompts, settings, self.tokenizer, self.decoder) if prompts else []


def open_chat_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    rope: RopeScaling | None = None,
    quantize: str = "none",
) -> ChatModel:
    """Load a .pth file or a transformers folder. `rope`: (kind, factor) of --rope_scaling and --rope_factor.

    quantize "int8": all its uses, prompts, scores and answers, have the weights that `round_to_int8` leaves.
    Raises UserError for a missing or damaged file, an unknown device, and a model that already has RoPE scaling.
    """
    device = pick_device(device) if isinstance(device, str) else device
    dtype = pick_dtype(dtype, device) if isinstance(dtype, str) else dtype
    model, tokenizer, checkpoint = open_model(path, device)
    if rope:
        model.scale_rope(*rope)
    if quantize == "int8":
        round_to_int8(model)
    name = Path(path).resolve().name.removesuffix(".pth")
    lineage = checkpoint.get("lineage", [])
    return ChatModel(
        name, Path(path), model, tokenizer, checkpoint["stage"], device, dtype, lineage, is_int8=quantize == "int8"
    )
