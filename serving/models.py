"""A served model: its name and limits, and the token ids of a request's prompt.

    chat:  the messages in the model's chat format (messages.py); if they are too long, the oldest turns are dropped
    text:  the prompt unchanged; if it is too long, PromptTooLong with both lengths

Called by requests.py and service.py. Read next: ../evaluation/chat_model.py (ChatModel), ../model/tokenizer.py
(rendering a chat), scheduler.py (decoding).
"""

import dataclasses
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from evaluation.chat_model import ChatModel, find_model, open_chat_model
from model.chat_template import Message
from model.generate import chat_prompt
from model.rope import rope_summary
from model.sampling_presets import find_preset, format_settings
from serving.chat_schemas import ChatRequest
from serving.config import ServeConfig
from serving.messages import message_size, rendered_messages, replace_surrogates, utf8_size
from serving.schemas import ModelCard

MIN_BYTES_PER_TOKEN = 16  # of the size check before tokenising, which lets texts of almost the right length pass


class PromptTooLong(Exception):
    """A prompt that leaves no space for an answer in the context; the message gives both lengths in tokens."""


@dataclass
class ServedModel(ChatModel):
    """A model with its name on the server. `created`: seconds since 1970. `preset`: sampling settings of chats whose
    request gives none (model/sampling_presets.py)."""

    created: int = 0
    preset: dict[str, Any] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        """Context length: tokens of prompt and answer together, at most."""
        return self.model.config.max_seq_len

    @cached_property
    def max_token_bytes(self) -> int:
        """UTF-8 bytes of the longest token: a text of n tokens has at most n times as many."""
        return max(1, int(self.tokenizer.byte_lengths().max()))

    @property
    def max_text_bytes(self) -> int:
        """UTF-8 bytes above which a text is rejected without tokenising it: it has more tokens than the context."""
        return self.max_model_len * max(self.max_token_bytes, MIN_BYTES_PER_TOKEN)

    def check_text_size(self, size: int, what: str) -> None:
        """Raises PromptTooLong for a text of `size` UTF-8 bytes that cannot fit with any tokens."""
        if size > self.max_text_bytes:
            raise PromptTooLong(
                f"this model's context is {self.max_model_len} tokens, and {what} has at least "
                f"{size // self.max_token_bytes}: shorten it"
            )

    def drop_old_turns(self, messages: list[Message]) -> list[Message]:
        """Drop the oldest turns while the text cannot fit into the context, without rendering them first.

        Raises PromptTooLong if the system message and the last turn alone cannot fit.
        """
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
        sizes = [message_size(message, with_thought=i > last) for i, message in enumerate(messages)]
        first = int(messages[0]["role"] == "system")
        size, starts = sum(sizes), [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
        start = first
        while size > self.max_text_bytes and starts:
            size -= sum(sizes[start : starts[0]])
            start = starts.pop(0)
        self.check_text_size(size, f"{system_part(messages)} with the last question")
        return messages[:first] + messages[start:]

    def summary(self) -> str:
        """Name, stage, size, context, device and dtype; a second line for a sampling preset."""
        size = self.model.count_parameters()[0] / 1e6
        rope = f", RoPE {scaled}" if (scaled := rope_summary(self.model.config)) else ""
        context = f"{self.max_model_len} tokens of context{rope}"
        line = f"{self.name}: {self.stage}, {size:.1f} M parameters, {context}, {self.device}, {self.number_format}"
        preset = f"\n    default sampling of chats: {format_settings(self.preset)}" if self.preset else ""
        return line + preset

    def card(self) -> ModelCard:
        """The model's entry in /v1/models."""
        details: dict[str, Any] = {"stage": self.stage, "parameters": self.model.count_parameters()[0]}
        return ModelCard(id=self.name, created=self.created, max_model_len=self.max_model_len, **details)

    @property
    def chat_unavailable(self) -> str:
        """The error message for a chat request; "" if the model can chat."""
        if self.stage == "pretrain":
            return f"{self.name} is a pretrained model, which continues texts: use /v1/completions"
        if self.tokenizer.format is None:
            return f"{self.name} has no chat template: use /v1/completions"
        return ""

    def chat_ids(self, body: ChatRequest) -> list[int]:
        """The prompt's token ids, shortened to leave space for `max_new_tokens` or a quarter of the context if less.

        They end with `opening`, the beginning of the answer. Raises PromptTooLong if the system message and the last
        question leave no space, UserError for a role that the chat format lacks and for a last message that cannot be
        continued, ApiError 400 for a tool_choice without its tool and for results without a call.
        """
        messages, is_continued = rendered_messages(body), bool(body.continue_final_message)
        opening = self.tokenizer.renderer.backend.encode(body.opening, add_special_tokens=False).ids
        if is_continued and body.add_generation_prompt:
            raise UserError("continue_final_message and add_generation_prompt cannot both be true")
        if is_continued and messages[-1]["role"] != "assistant":
            role = messages[-1]["role"]
            raise UserError(f"continue_final_message: the last message must be the assistant's, not the {role}'s")

        def render(kept: list[Message]) -> list[int]:
            if is_continued:
                return self.tokenizer.render_unfinished(kept)
            return [*self.tokenizer.render(kept, body.add_generation_prompt is not False, body.thinking)[0], *opening]

        ids = chat_prompt(
            self.model, self.tokenizer, self.drop_old_turns(messages), body.max_new_tokens or self.max_model_len, render
        )
        if len(ids) >= self.max_model_len:
            raise PromptTooLong(
                f"this model's context is {self.max_model_len} tokens, and {system_part(messages)} with the last "
                f"question has {len(ids)}: shorten them"
            )
        return ids

    def text_ids(self, prompt: str | list[int], with_answer: bool = True) -> list[int]:
        """Token ids of a text, or the given ones. `with_answer`: leave space for at least one more token.

        Raises PromptTooLong if they do not fit into the context, ValueError for ids outside the vocabulary.
        """
        what = "the prompt" if with_answer else "this text"
        if isinstance(prompt, str):
            self.check_text_size(utf8_size(prompt), what)
            ids = self.tokenizer.encode_document(replace_surrogates(prompt)) or [self.tokenizer.eos_id]
        else:
            ids = prompt
            if max(ids) >= self.tokenizer.vocab_size:
                raise ValueError(f"token id {max(ids)}: this model's last id is {self.tokenizer.vocab_size - 1}")
        if len(ids) + with_answer > self.max_model_len:
            raise PromptTooLong(
                f"this model's context is {self.max_model_len} tokens, and {what} has {len(ids)}: shorten it"
            )
        return ids


def system_part(messages: list[Message]) -> str:
    """The part of a prompt that is never dropped, for an error message."""
    return "the system message and its tools" if "tools" in messages[0] else "the system message"


def open_models(config: ServeConfig) -> dict[str, ServedModel]:
    """Load the models of --checkpoint, or the latest stage in --out_dir.

    Returns them by name: the file's without .pth, the folder's, or NAME of NAME=FILE. Raises UserError for a file that
    cannot be read, for two models of the same name, and for a model that already has RoPE scaling with --rope_scaling.
    """
    models: dict[str, ServedModel] = {}
    for checkpoint in config.checkpoint or (str(find_model(config.out_dir)),):
        name, _, file = checkpoint.partition("=") if not Path(checkpoint).exists() else ("", "", checkpoint)
        path = Path(file or name)
        name = name if file and name else path.resolve().name.removesuffix(".pth")
        if name in models:
            raise UserError(f"two models are called {name}: write --checkpoint OTHER_NAME={path} for one of them")
        opened = open_chat_model(path, config.device, config.dtype, config.rope, config.quantize)
        limit = min(opened.model.config.max_seq_len, config.max_context)
        opened.model.config = dataclasses.replace(opened.model.config, max_seq_len=limit)
        created = int(path.stat().st_mtime) if path.exists() else int(time.time())
        _, preset = find_preset(config.sampling_preset, opened.tokenizer.format)
        beams = preset.get("num_beams", 1)
        if beams > config.max_num_seqs:
            problem = f"--max_num_seqs {config.max_num_seqs} is less than the num_beams of {name}'s sampling preset"
            raise UserError(f"{problem}: set --max_num_seqs {beams} or --sampling_preset none")
        models[name] = ServedModel(**{**vars(opened), "name": name}, created=created, preset=preset)
    return models
