"""A model that is served: its name, what it can do, and how a request becomes token ids.

    chat:  the messages in the model's chat format; where they are too long, whole turns go, oldest first
    text:  the prompt as it is; too long is an error with the numbers

Called by service.py. Read next: ../model/tokenizer.py (how a chat is written), scheduler.py (where the ids go).
"""

import dataclasses
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from export.hf_import import open_model
from model.chat_template import Message
from model.checkpoint import PARENTS, find_checkpoint
from model.generate import chat_prompt
from model.rope_flags import Rope
from model.sampling_presets import find_preset
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from serving.schemas import ChatMessage, ChatRequest

MIN_BYTES_A_TOKEN = 16  # of the bound before tokenising: a text that is a little too long is told its exact number


class TooLong(Exception):
    """A prompt that leaves no room for an answer; the message has the numbers."""


@dataclass(frozen=True)
class Served:
    name: str
    model: Transformer
    tokenizer: ChatTokenizer
    stage: str
    created: int  # seconds since 1970
    preset: dict[str, Any] = field(
        default_factory=dict
    )  # sampling settings of chats that name none (model/sampling_presets.py)

    @property
    def limit(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.max_seq_len

    @cached_property
    def longest_token(self) -> int:
        """UTF-8 bytes of the longest token: n tokens spell at most n times as many."""
        return max(1, int(self.tokenizer.byte_lengths().max()))

    @property
    def max_bytes(self) -> int:
        """UTF-8 bytes above which a text is refused before it is tokenised: it has more tokens than the context."""
        return self.limit * max(self.longest_token, MIN_BYTES_A_TOKEN)

    def check_size(self, size: int, what: str) -> None:
        """Raises TooLong for a text of `size` UTF-8 bytes that cannot fit with any tokens."""
        if size > self.max_bytes:
            raise TooLong(
                f"this model's context is {self.limit} tokens, and {what} has at least {size // self.longest_token}: "
                "shorten it"
            )

    def recent(self, messages: list[Message]) -> list[Message]:
        """The messages without the oldest turns that cannot fit: `fit_chat` would render them only to drop them.

        Raises TooLong where the system message and the last turn alone cannot fit.
        """
        sizes = [utf8_size(message["content"]) for message in messages]
        first = int(messages[0]["role"] == "system")
        size, starts = sum(sizes), [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
        start = first
        while size > self.max_bytes and starts:
            size -= sum(sizes[start : starts[0]])
            start = starts.pop(0)
        self.check_size(size, "the system message with the last question")
        return messages[:first] + messages[start:]

    @property
    def why_no_chat(self) -> str:
        """What to tell somebody who wants to chat; "" where that is possible."""
        if self.stage == "pretrain":
            return f"{self.name} is a pretrained model, which goes on with a text: use /v1/completions"
        if self.tokenizer.format is None:
            return f"{self.name} has no chat template: use /v1/completions"
        return ""

    def chat_ids(self, body: ChatRequest) -> list[int]:
        """Token ids up to where the assistant speaks, with room for the longest answer or a quarter of the limit.

        Raises TooLong when the system message and the last question alone leave no room, UserError for a role that
        the chat format cannot write and for a last message that cannot be continued.
        """
        messages, continues = plain(body.messages), bool(body.continue_final_message)
        if continues and body.add_generation_prompt:
            raise UserError("continue_final_message and add_generation_prompt cannot both be true")
        if continues and messages[-1]["role"] != "assistant":
            role = messages[-1]["role"]
            raise UserError(f"continue_final_message: the last message must be the assistant's, not the {role}'s")

        def render(kept: list[Message]) -> list[int]:
            if continues:
                return self.tokenizer.render_unfinished(kept)
            return self.tokenizer.render(kept, body.add_generation_prompt is not False)[0]

        ids = chat_prompt(self.model, self.tokenizer, self.recent(messages), body.longest or self.limit, render)
        if len(ids) >= self.limit:
            raise TooLong(
                f"this model's context is {self.limit} tokens, and the system message with the last question has "
                f"{len(ids)}: shorten them"
            )
        return ids

    def text_ids(self, prompt: str | list[int], answered: bool = True) -> list[int]:
        """Token ids of a text, or the given ones; `answered`: at least one more token has to fit behind them.

        Raises TooLong, and ValueError for ids that the model lacks.
        """
        what = "the prompt" if answered else "this text"
        if isinstance(prompt, str):
            self.check_size(utf8_size(prompt), what)
            ids = self.tokenizer.encode_start(sound(prompt)) or [self.tokenizer.eos_id]
        else:
            ids = prompt
            if max(ids) >= self.tokenizer.vocab_size:
                raise ValueError(f"token id {max(ids)}: this model's ids end at {self.tokenizer.vocab_size - 1}")
        if len(ids) + answered > self.limit:
            raise TooLong(f"this model's context is {self.limit} tokens, and {what} has {len(ids)}: shorten it")
        return ids


def utf8_size(text: str) -> int:
    """Bytes in UTF-8; half characters count as one."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def sound(text: str) -> str:
    """Without half characters, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def plain(messages: list[ChatMessage]) -> list[Message]:
    """Role and text; a developer's word is the system's, and several of them in front are one."""
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    first = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    written = [{"role": r, "content": sound(message.text)} for r, message in zip(roles, messages, strict=True)]
    if first > 1:
        joined = "\n\n".join(message["content"] for message in written[:first])
        written[:first] = [{"role": "system", "content": joined}]
    return written


def latest(out_dir: str) -> str:
    """The model of the last stage of the chain that has one. Raises UserError where there is none, or several."""
    there = [stage for stage in PARENTS if list(Path(out_dir).glob(f"{stage}_[0-9]*.pth"))]
    return str(find_checkpoint(out_dir, (there or list(PARENTS)[:1])[-1]))


def open_models(
    checkpoints: list[str],
    max_context: int,
    device: torch.device,
    sampling_preset: str = "auto",
    rope: Rope | None = None,
) -> dict[str, Served]:
    """The models by name: that of the file without .pth, that of the folder, or NAME as in NAME=FILE.

    `sampling_preset`: one of model.sampling_presets.CHOICES. `rope`: --rope_scaling and --rope_factor, for all of
    them. Raises UserError for a file that cannot be read, for two of the same name, and for a model that has RoPE
    scaling of its own where `rope` is given.
    """
    models: dict[str, Served] = {}
    for checkpoint in checkpoints:
        name, _, file = checkpoint.partition("=") if not Path(checkpoint).exists() else ("", "", checkpoint)
        path = Path(file or name)
        name = name if file and name else path.resolve().name.removesuffix(".pth")
        if name in models:
            raise UserError(f"two models are called {name}: write --checkpoint OTHER_NAME={path} for one of them")
        model, tokenizer, about = open_model(path, device)
        if rope:
            model.scale_rope(*rope)
        limit = min(model.config.max_seq_len, max_context)
        model.config = dataclasses.replace(model.config, max_seq_len=limit)
        created = int(path.stat().st_mtime) if path.exists() else int(time.time())
        _, preset = find_preset(sampling_preset, tokenizer.format)
        models[name] = Served(name, model, tokenizer, about["stage"], created, preset)
    return models
