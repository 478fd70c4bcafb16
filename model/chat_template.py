"""Named chat formats: how the messages of a chat become text. Templates of imported models: jinja_template.py.

    chatml    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n
    mindllm   <|endoftext|><user>\\n{question}\\n<assistant>\\n{answer}<|endoftext|>     then \\n<|endoftext|><user>\\n…
    belle     Human: {question} \\n\\nAssistant:{answer}<|endoftext|>    in place of <|endoftext|>: Human: …
    text      {question}{answer}<|endoftext|>                         no roles: the model continues the text

A format renders a chat as text with the spans of its answers: the loss covers each answer and the end-of-turn token
after it. Each format also has an equivalent jinja `template`, for transformers and other programs that load an exported
model. chatml writes tools, calls, results and thoughts (chatml.py); the others refuse tools and leave thoughts out.

chatml: OpenAI's chat markup. mindllm: the model card of bit-dny/MindLLM-1b3-chat-zh-v2.0; the loss excludes the newline
and the second <|endoftext|> between turns. belle: the model card of BelleGroup/BELLE-7B-2M (including the space before
the newlines), which concatenates turns without a separator, so only the last answer of a chat ends with eos, as in
BELLE's training. text: the model card of xiangxinai/Xiangxin-3B. mindllm, belle and text have no system role: a system
message becomes plain text before the first turn.
Read next: renderer.py (text to ids and masks), chatml.py, jinja_template.py.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from common.errors import UserError
from model.chatml import CHATML_TEMPLATE, EMPTY_THOUGHT, has_parts, plain_messages, sample_ends

# {"role", "content"}, and "weight": 0 to exclude an answer from the loss. A first system message may have "tools", a
# list of OpenAI's tool objects; an answer "tool_calls" ([{"type": "function", "function": {"name", "arguments": an
# object}}]) and "reasoning_content", its thought. The role "tool" holds one result.
Message = dict[str, Any]

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


class ChatFormat(Protocol):
    """The methods of ChatTemplate and JinjaTemplate that `Renderer` calls. Both raise UnsupportedChatError."""

    def text(
        self, messages: list[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> str: ...
    def samples(
        self, messages: list[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> list[SampleText]: ...


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

    def text(
        self, messages: list[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> str:
        """The rendered chat. Raises UnsupportedChatError if the format has no tools, or not a role of the chat."""
        return self.samples(messages, add_generation_prompt, enable_thinking)[-1].text

    def samples(
        self, messages: list[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> list[SampleText]:
        """One training sample, which trains every answer. Raises UnsupportedChatError as `text` does.

        `enable_thinking`: see `ChatTokenizer.render`; a format without thoughts ignores it.
        """
        if any(message.get("tools") or message.get("tool_calls") for message in messages):
            raise UnsupportedChatError(f"the chat format {self.name} has no tools: use chatml")
        return [self._sample(messages, add_generation_prompt)]

    def _sample(self, messages: list[Message], add_generation_prompt: bool) -> SampleText:
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
        return SampleText(text, spans, trained_answers(messages))

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


class ChatML(ChatTemplate):
    """chatml with tools, calls, results and thoughts (chatml.py)."""

    def samples(
        self, messages: list[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> list[SampleText]:
        """The training samples: the whole chat last, before it each earlier turn with thoughts; they train the others.

        With `add_generation_prompt`: the prompt alone.
        """
        parts = has_parts(messages)
        if add_generation_prompt:
            text, spans, answers = self._sample(plain_messages(messages) if parts else messages, True)
            return [SampleText(text + (EMPTY_THOUGHT if enable_thinking is False else ""), spans, answers)]
        if not parts:
            return [self._sample(messages, False)]
        samples: list[SampleText] = []
        trained, start = trained_answers(messages), 0
        for end in sample_ends(messages, trained):
            text, spans, _ = self._sample(plain_messages(messages[:end]), False)
            answers = [i for i in trained if start <= i < end]
            samples.append(SampleText(text, spans[len(spans) - len(answers) :], answers))
            start = end
        return samples

    @property
    def template(self) -> str:
        return CHATML_TEMPLATE


def trained_answers(messages: list[Message]) -> list[int]:
    """Indices of the assistant messages without `"weight": 0`."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]


def quote_jinja(text: str) -> str:
    """The text as a jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def find_chat_template(name: str, eos: str = END_OF_TEXT) -> ChatTemplate:
    """The named format for a tokenizer with end-of-document token `eos`. Raises UserError for an unknown name."""
    if name == "chatml":
        return ChatML(name, "", {ANY_ROLE: (f"{IM_START}{{role}}\n", f"{IM_END}\n")}, IM_END)
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
