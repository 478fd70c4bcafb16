"""Named chat formats: how the messages of a chat become text. Templates of imported models: jinja_template.py.

    chatml    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n
    mindllm   <|endoftext|><user>\\n{question}\\n<assistant>\\n{answer}<|endoftext|>     then \\n<|endoftext|><user>\\n…
    belle     Human: {question} \\n\\nAssistant:{answer}<|endoftext|>    in place of <|endoftext|>: Human: …
    text      {question}{answer}<|endoftext|>                         no roles: the model continues the text

A format renders a chat as text with the spans of its answers. `Renderer` tokenizes the whole text and derives the mask
from the spans: the loss covers each answer and the end-of-turn token after it. A marker string inside a message stays
text: it is split in two, and the parts of the chat are tokenized separately. Each format also has an equivalent jinja
`template`, for transformers and other programs that load an exported model.

chatml: OpenAI's chat markup. mindllm: the model card of bit-dny/MindLLM-1b3-chat-zh-v2.0; the loss excludes the newline
and the second <|endoftext|> between turns. belle: the model card of BelleGroup/BELLE-7B-2M (including the space before
the newlines), which concatenates turns without a separator, so only the last answer of a chat ends with eos, as in
BELLE's training. text: the model card of xiangxinai/Xiangxin-3B. mindllm, belle and text have no system role: a system
message becomes plain text before the first turn.
Read next: tokenizer.py (ChatTokenizer.render), jinja_template.py.
"""

import bisect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer

from common.errors import CHAT_FORMAT_ADVICE, UserError
from model.fast_bpe import FastBPE

Message = dict[str, Any]  # role, content; "weight": 0 excludes an answer from the loss

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# From the model card of bit-dny/MindLLM-1b3-chat-zh-v2.0, without its repetition_penalty of 0.5: a penalty below 1
# makes repeated tokens more likely.
MINDLLM_SAMPLING = {"num_beams": 4, "no_repeat_ngram_size": 5, "frequency_penalty": 0.0}
# From the model card of BelleGroup/BELLE-7B-2M.
BELLE_SAMPLING = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2, "frequency_penalty": 0.0}
CHAT_FORMATS = ("chatml", "mindllm", "belle", "text")
ANY_ROLE = "*"  # key for all other roles; {role} is replaced by the role's name


class UnsupportedChatError(UserError):
    """The format does not support this chat; others may be supported."""


class TooManyAnswersError(UnsupportedChatError):
    """The chat has too many answers for the format; its first turns may be supported."""


class SampleText(NamedTuple):
    """A training sample as text. `spans`: (start, end) of each trained answer in it; `answers`: their messages."""

    text: str
    spans: list[tuple[int, int]]
    answers: list[int]


class RenderedSample(NamedTuple):
    """A tokenized sample. `mask` is 1 at trained tokens; `answers`: indices of the messages that they belong to."""

    ids: list[int]
    mask: list[int]
    answers: list[int]


class RenderedChat(NamedTuple):
    """The samples of a chat, usually one. If the format does not support the chat: none, and `refusal` is the reason.

    `is_too_long`: the chat has too many turns; its first turns alone may be supported.
    """

    samples: list[RenderedSample]
    refusal: str = ""
    is_too_long: bool = False


class ChatFormat(Protocol):
    """The methods of ChatTemplate and JinjaTemplate that `Renderer` calls. Both raise UnsupportedChatError."""

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str: ...
    def samples(self, messages: list[Message], add_generation_prompt: bool = False) -> list[SampleText]: ...


@dataclass(frozen=True)
class ChatTemplate:
    """A named chat format.

    `roles` maps a role to the text before and after its messages. `end_of_turn` is the token directly after an answer,
    which is trained with it. `sampling`: the generation settings of the format's model card, named as in transformers'
    GenerationConfig; {} if it has none. `revision` increases when the rendered text changes: tokenized data of another
    revision is rebuilt.
    """

    name: str
    start: str  # before the first message
    roles: dict[str, tuple[str, str]]
    end_of_turn: str
    stop_strings: tuple[str, ...] = ()  # beginnings of the next turn that are text, not a special token
    strip_content: bool = False  # strip whitespace around all messages but answers
    inner_suffix: str | None = None  # text after an answer that is not the last message, if it differs
    sampling: dict[str, Any] = field(default_factory=dict, compare=False)
    revision: int = 1

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The rendered chat. Raises UnsupportedChatError if the format does not have a role of the chat."""
        return self.samples(messages, add_generation_prompt)[0].text

    def samples(self, messages: list[Message], add_generation_prompt: bool = False) -> list[SampleText]:
        """One training sample, which trains every answer. Raises UnsupportedChatError as `text` does."""
        text, spans = self.start, []
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            prefix, suffix = self._affixes(role)
            if role == "assistant":
                if self.inner_suffix is not None and (add_generation_prompt or i + 1 < len(messages)):
                    suffix = self.inner_suffix
                if message.get("weight") != 0:
                    start = len(text) + len(prefix)
                    end_of_turn = self.end_of_turn if suffix.startswith(self.end_of_turn) else ""
                    spans.append((start, start + len(content + end_of_turn)))
            elif self.strip_content:
                content = content.strip()
            text += prefix + content + suffix
        if add_generation_prompt:
            text += self._affixes("assistant")[0]
        return [SampleText(text, spans, trained_answers(messages))]

    def _affixes(self, role: str) -> tuple[str, str]:
        if role in self.roles:
            return self.roles[role]
        if ANY_ROLE not in self.roles or not role.isidentifier():
            raise UnsupportedChatError(f"the chat format {self.name} has no role {role!r}: use {', '.join(self.roles)}")
        prefix, suffix = self.roles[ANY_ROLE]
        return prefix.replace("{role}", role), suffix

    @property
    def template(self) -> str:
        """An equivalent jinja template over `messages` and `add_generation_prompt`."""
        branches = []
        for role, (prefix, suffix) in self.roles.items():
            content = "message['content']" + (" | trim" if self.strip_content and role != "assistant" else "")
            opening = quote_jinja(prefix).replace("{role}", "' + message['role'] + '")
            closing = quote_jinja(suffix)
            if role == "assistant" and self.inner_suffix is not None:
                inner = quote_jinja(self.inner_suffix)
                closing = f"({closing} if loop.last and not add_generation_prompt else {inner})"
            expression = f"{{{{ {opening} + ({content}) + {closing} }}}}"
            branches.append(expression if role == ANY_ROLE else f"if message['role'] == '{role}' %}}{expression}")
        if ANY_ROLE not in self.roles:
            otherwise = "{% else %}{{ raise_exception('no such role: ' + message['role']) }}{% endif %}"
            branches = ["{% " + "{% el".join(branches) + otherwise]
        return (
            f"{{{{ {quote_jinja(self.start)} }}}}{{% for message in messages %}}{''.join(branches)}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {quote_jinja(self._affixes('assistant')[0])} }}}}{{% endif %}}"
        )


def trained_answers(messages: list[Message]) -> list[int]:
    """Indices of the assistant messages without `"weight": 0`."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]


def quote_jinja(text: str) -> str:
    """The text as a jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def find_chat_template(name: str, eos: str = END_OF_TEXT) -> ChatTemplate:
    """The named format for a tokenizer with end-of-document token `eos`. Raises UserError for an unknown name."""
    if name == "chatml":
        return ChatTemplate(name, "", {ANY_ROLE: (f"{IM_START}{{role}}\n", f"{IM_END}\n")}, IM_END)
    if name == "mindllm":
        roles = {"system": ("", "\n"), "user": ("<user>\n", "\n"), "assistant": ("<assistant>\n", eos)}
        mindllm = ChatTemplate(name, eos, roles, eos, stop_strings=("<user>\n",), strip_content=True)
        return replace(mindllm, inner_suffix=f"{eos}\n{eos}", sampling=MINDLLM_SAMPLING, revision=2)
    if name == "belle":
        roles = {"system": ("", "\n\n"), "user": ("Human: ", " \n\n"), "assistant": ("Assistant:", eos)}
        belle = ChatTemplate(name, "", roles, eos, stop_strings=("Human: ",), strip_content=True)
        return replace(belle, inner_suffix="", sampling=BELLE_SAMPLING, revision=2)
    if name == "text":
        return ChatTemplate(name, "", {"system": ("", "\n"), "user": ("", ""), "assistant": ("", eos)}, eos)
    raise UserError(f"unknown chat format {name}: choose from {', '.join(CHAT_FORMATS)}")


class Renderer:
    """Renders chats with a chat format to token ids and loss masks."""

    def __init__(
        self,
        backend: Tokenizer,
        markers: re.Pattern[str],
        chat_format: ChatFormat,
        fast_bpe: Callable[[], FastBPE | None] = lambda: None,
    ) -> None:
        """`backend` encodes marker strings as control tokens; `markers` matches them."""
        self.backend, self.markers, self.chat_format, self.fast_bpe = backend, markers, chat_format, fast_bpe
        added = backend.get_added_tokens_decoder()
        self.marker_ids = {token.content: i for i, token in added.items()}
        if any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
            self.fast_bpe = lambda: None  # the text around such a token changes its place

    def render(self, chats: list[list[Message]], add_generation_prompt: bool) -> list[RenderedChat]:
        """See `ChatTokenizer.render_each`."""
        texts = [self._sample_texts(messages, add_generation_prompt) for messages in chats]
        tokenized = iter(self._tokenize([sample for samples, _ in texts for sample in samples], len(chats) > 1))
        rendered = []
        for samples, refusal in texts:
            found = [next(tokenized) for _ in samples]
            rendered.append(RenderedChat(found, str(refusal or ""), isinstance(refusal, TooManyAnswersError)))
        return rendered

    def _tokenize(self, samples: list[tuple[SampleText, list[str]]], many: bool) -> list[RenderedSample]:
        """The tokenized samples. FastBPE is not for several threads; those of a server render one chat at a time."""
        fast_bpe = self.fast_bpe() if many else None
        pieces = [self._split(*sample) if fast_bpe else [] for sample in samples]
        slow = [part for (_, parts), found in zip(samples, pieces, strict=True) if not found for part in parts]
        encodings = iter(self.backend.encode_batch(slow, add_special_tokens=False))
        texts = [text for found in pieces for text, _ in found if text not in self.marker_ids]
        arrays = iter(fast_bpe.encode(texts) if fast_bpe else [])
        return [
            self._join_pieces(sample, found, arrays) if found
            else join_parts(sample, parts, [next(encodings) for _ in parts])
            for (sample, parts), found in zip(samples, pieces, strict=True)
        ]  # fmt: skip

    def _split(self, sample: SampleText, parts: list[str]) -> list[tuple[str, bool]]:
        """Markers and the texts between them, split at the edges of answers too, and whether each is trained.

        Returns [] if a token may span the edge of an answer: FastBPE is for a BPE in which a line end is a token.
        """
        pieces, offset = [], 0
        for part in parts:
            cuts = {edge for marker in self.markers.finditer(part) for edge in marker.span()} | {0, len(part)}
            for edge in {edge - offset for span in sample.spans for edge in span} - cuts:
                if 0 < edge < len(part):
                    if "\n" not in part[edge - 1 : edge + 1]:
                        return []
                    cuts.add(edge)
            for start, end in pairwise(sorted(cuts)):
                is_trained = any(first <= offset + start < last for first, last in sample.spans)
                pieces.append((part[start:end], is_trained))
            offset += len(part) + 1
        return pieces

    def _join_pieces(
        self, sample: SampleText, pieces: list[tuple[str, bool]], arrays: Iterator[np.ndarray]
    ) -> RenderedSample:
        """The sample of the pieces; `arrays` yields the ids of those that are no markers."""
        ids: list[int] = []
        mask: list[int] = []
        for text, is_trained in pieces:
            ids += [self.marker_ids[text]] if text in self.marker_ids else next(arrays).tolist()
            mask += [int(is_trained)] * (len(ids) - len(mask))
        return RenderedSample(ids, mask, sample.answers)

    def render_unfinished(self, messages: list[Message]) -> list[int]:
        """See `ChatTokenizer.render_unfinished`."""
        end = unused_character(messages, range(0xF8FF, 0xDFFF, -1))
        unfinished = {**messages[-1], "content": messages[-1]["content"] + end}
        separator, escaped = self._escape_markers([*messages[:-1], unfinished])
        try:
            text, found, _ = self.chat_format.text(escaped).rpartition(end)
        except UnsupportedChatError as refusal:
            raise UserError(f"{refusal}; {CHAT_FORMAT_ADVICE}") from None
        if not found:
            raise UserError("the chat template leaves out the last message: it cannot be continued")
        encodings = self.backend.encode_batch(text.split(separator) if separator else [text], add_special_tokens=False)
        return [i for encoding in encodings for i in encoding.ids]

    def _sample_texts(
        self, messages: list[Message], add_generation_prompt: bool
    ) -> tuple[list[tuple[SampleText, list[str]]], UnsupportedChatError | None]:
        """The samples of a chat with the parts of their texts, or the reason why the format does not support it."""
        separator, escaped = self._escape_markers(messages)
        try:
            samples = self.chat_format.samples(escaped, add_generation_prompt)
        except UnsupportedChatError as refusal:
            return [], refusal
        return [(s, s.text.split(separator) if separator else [s.text]) for s in samples], None

    def _escape_markers(self, messages: list[Message]) -> tuple[str, list[Message]]:
        """Insert an unused character into every marker of the messages; returns it ("" without markers) and them."""
        if not any(self.markers.search(message["content"]) for message in messages):
            return "", messages
        separator = unused_character(messages, range(0xE000, 0xF8FF))
        split = lambda found: found[0][0] + separator + found[0][1:]
        return separator, [{**message, "content": self.markers.sub(split, message["content"])} for message in messages]


def unused_character(messages: list[Message], codes: range) -> str:
    """The first character of a range that does not occur in the messages."""
    content = "".join(message["content"] for message in messages)
    return next(chr(code) for code in codes if chr(code) not in content)


def join_parts(sample: SampleText, parts: list[str], encodings: list[Encoding]) -> RenderedSample:
    """Join the ids of all parts of a text; the mask is 1 for tokens that begin inside a trained answer."""
    ids: list[int] = []
    mask: list[int] = []
    offset = 0  # of the part in the text; each separator between parts takes one character
    for part, encoding in zip(parts, encodings, strict=True):
        token_start = lambda token, encoding=encoding: encoding.token_to_chars(token)[0]
        mask += [0] * len(encoding)
        for span in sample.spans:
            tokens = range(len(encoding))
            first, last = (len(ids) + bisect.bisect_left(tokens, edge - offset, key=token_start) for edge in span)
            mask[first:last] = [1] * (last - first)
        ids += encoding.ids
        offset += len(part) + 1
    return RenderedSample(ids, mask, sample.answers)
