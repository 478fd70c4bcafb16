"""Named chat formats: how the messages of a chat become text. Templates of imported models: jinja_template.py.

    chatml    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n
    mindllm   <|endoftext|><user>\\n{question}\\n<assistant>\\n{answer}<|endoftext|>     then \\n<|endoftext|><user>\\n…
    belle     Human: {question} \\n\\nAssistant:{answer}<|endoftext|>    in place of <|endoftext|>: Human: …
    text      {question}{answer}<|endoftext|>                         no roles: the model continues the text

A format renders a chat as `spans` (for tokenizer.py) and as an equivalent jinja `template` (for transformers and other
programs that load an exported model). The loss covers each answer and the end-of-turn token after it.

chatml: OpenAI's chat markup. mindllm: the model card of bit-dny/MindLLM-1b3-chat-zh-v2.0; the loss excludes the newline
and the second <|endoftext|> between turns. belle: the model card of BelleGroup/BELLE-7B-2M (including the space before
the newlines), which concatenates turns without a separator, so only the last answer of a chat ends with eos, as in
BELLE's training. text: the model card of xiangxinai/Xiangxin-3B. mindllm, belle and text have no system role: a system
message becomes plain text before the first turn.
Read next: tokenizer.py (spans -> ids and mask), jinja_template.py.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import UserError

Message = dict[str, Any]  # role, content; "weight": 0 excludes an answer from the loss
Span = tuple[str, bool]  # a piece of the rendered text, and whether the loss covers it
TrainingSpans = tuple[list[Span], list[int]]  # a rendered chat, and the indices of its trained messages

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# From the model card of bit-dny/MindLLM-1b3-chat-zh-v2.0, without its repetition_penalty of 0.5: a penalty below 1
# makes repeated tokens more likely.
MINDLLM_SAMPLING = {"num_beams": 4, "no_repeat_ngram_size": 5}
# From the model card of BelleGroup/BELLE-7B-2M.
BELLE_SAMPLING = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2}
CHAT_FORMATS = ("chatml", "mindllm", "belle", "text")
ANY_ROLE = "*"  # key for all other roles; {role} is replaced by the role's name


class UnsupportedChatError(UserError):
    """The format does not support this chat; others may be supported."""


class TooManyAnswersError(UnsupportedChatError):
    """The chat has too many answers for the format; its first turns may be supported."""


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

    def spans(self, messages: list[Message], add_generation_prompt: bool) -> list[Span]:
        """The rendered chat as spans. Raises UnsupportedChatError if the format does not have a role of the chat."""
        spans = [(self.start, False)]
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            prefix, suffix = self._affixes(role)
            if role == "assistant":
                has_next_turn = add_generation_prompt or i + 1 < len(messages)
                suffix = self.inner_suffix if has_next_turn and self.inner_suffix is not None else suffix
                end_of_turn = self.end_of_turn if suffix.startswith(self.end_of_turn) else ""
                is_trained = message.get("weight") != 0
                spans += [
                    (prefix, False),
                    (content + end_of_turn, is_trained),
                    (suffix.removeprefix(end_of_turn), False),
                ]
            else:
                spans += [(prefix + (content.strip() if self.strip_content else content) + suffix, False)]
        if add_generation_prompt:
            spans.append((self._affixes("assistant")[0], False))
        return spans

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The rendered chat as text. Raises UnsupportedChatError as `spans` does."""
        return "".join(text for text, _ in self.spans(messages, add_generation_prompt))

    def samples(self, messages: list[Message]) -> list[TrainingSpans]:
        """The training samples of a chat: one, which trains every answer."""
        return [(self.spans(messages, False), trained_answers(messages))]

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
                closing = (
                    f"({closing} if loop.last and not add_generation_prompt else {quote_jinja(self.inner_suffix)})"
                )
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
