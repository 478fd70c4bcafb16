"""How the turns of a chat are written: the formats that have a name. Those of foreign models: jinja_template.py.

    chatml    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n
    mindllm   <|endoftext|><user>\\n{question}\\n<assistant>\\n{answer}<|endoftext|>     then \\n<|endoftext|><user>\\n…
    belle     Human: {question} \\n\\nAssistant:{answer}<|endoftext|>    in place of <|endoftext|>: Human: …
    text      {question}{answer}<|endoftext|>                         no roles: the model continues the text

A format says what is written (`spans`, for tokenizer.py) and says it once more as a jinja template (`template`, for
transformers and whatever else opens an exported model). Answers and the marker that closes each are trained.

chatml: OpenAI's chat markup. mindllm: the prompts on the card of bit-dny/MindLLM-1b3-chat-zh-v2.0; the newline and the
second <|endoftext|> between two turns are not trained. belle: the card of BelleGroup/BELLE-7B-2M (the space before the
newlines is its own), which joins several turns by concatenation alone. So the text of an earlier
answer is trained and its end is not: the end is learnt from the last answer of each chat, which eos closes as in
BELLE's own training. text: the card of xiangxinai/Xiangxin-3B. These three have no system role: a system message is
written in front as plain text.
Read next: tokenizer.py (spans -> ids and mask), jinja_template.py.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import UserError

Message = dict[str, Any]  # role, content; of an answer that is not trained also "weight": 0
Span = tuple[str, bool]  # a piece of the rendered text, and whether it is trained
Written = tuple[list[Span], list[int]]  # a rendered chat, and which of its messages are trained in it

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The generation call on the card of bit-dny/MindLLM-1b3-chat-zh-v2.0. Its repetition_penalty of 0.5 is left out: a
# penalty below 1 makes repeated tokens more likely, not less.
MINDLLM_SAMPLING = {"num_beams": 4, "no_repeat_ngram_size": 5}
# The generation call on the card of BelleGroup/BELLE-7B-2M.
BELLE_SAMPLING = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2}
FORMAT_NAMES = ("chatml", "mindllm", "belle", "text")
ANY = "*"  # every other role, {role} being its name


class RefusedChat(UserError):
    """A format cannot write this chat; it may be able to write others."""


class TooManyAnswers(RefusedChat):
    """A format cannot write so long a chat; it may be able to write its first turns."""


@dataclass(frozen=True)
class NamedFormat:
    """`turns` maps a role to the text before and after its messages. `close` is the first text after an answer:
    the token that ends it, trained with it. `sampling`: the generation settings that the format's model card
    recommends, named as in transformers' GenerationConfig; empty where its card names none. `revision` counts the
    changes of what is written: token folders of another revision are rebuilt."""

    name: str
    start: str  # before the first message
    turns: dict[str, tuple[str, str]]
    close: str
    stop: tuple[str, ...] = ()  # text that ends an answer: the next turn's beginning, where it is no token of its own
    strip: bool = False  # white space around everything but answers goes
    between: str | None = None  # after an answer with a turn behind it, where it differs from the last
    sampling: dict[str, Any] = field(default_factory=dict, compare=False)
    revision: int = 1

    def spans(self, messages: list[Message], add_generation_prompt: bool) -> list[Span]:
        """The chat piece by piece. Raises RefusedChat for a role that the format does not know."""
        spans = [(self.start, False)]
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            before, behind = self._turn(role)
            if role == "assistant":
                is_followed = add_generation_prompt or i + 1 < len(messages)
                behind = self.between if is_followed and self.between is not None else behind
                close = self.close if behind.startswith(self.close) else ""
                trained = message.get("weight") != 0
                spans += [(before, False), (content + close, trained), (behind.removeprefix(close), False)]
            else:
                spans += [(before + (content.strip() if self.strip else content) + behind, False)]
        if add_generation_prompt:
            spans.append((self._turn("assistant")[0], False))
        return spans

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The rendered chat."""
        return "".join(text for text, _ in self.spans(messages, add_generation_prompt))

    def samples(self, messages: list[Message]) -> list[Written]:
        """The samples to train on: one rendering with every answer."""
        return [(self.spans(messages, False), answers_of(messages))]

    def _turn(self, role: str) -> tuple[str, str]:
        if role in self.turns:
            return self.turns[role]
        if ANY not in self.turns or not role.isidentifier():
            raise RefusedChat(f"the chat format {self.name} has no role {role!r}: it knows {', '.join(self.turns)}")
        before, behind = self.turns[ANY]
        return before.replace("{role}", role), behind

    @property
    def template(self) -> str:
        """The same as a jinja template over `messages` and `add_generation_prompt`."""
        choices = []
        for role, (before, behind) in self.turns.items():
            content = "message['content']" + (" | trim" if self.strip and role != "assistant" else "")
            opening = quoted(before).replace("{role}", "' + message['role'] + '")
            closing = quoted(behind)
            if role == "assistant" and self.between is not None:
                closing = f"({closing} if loop.last and not add_generation_prompt else {quoted(self.between)})"
            written = f"{{{{ {opening} + ({content}) + {closing} }}}}"
            choices.append(written if role == ANY else f"if message['role'] == '{role}' %}}{written}")
        if ANY not in self.turns:
            refusal = "{% else %}{{ raise_exception('no such role: ' + message['role']) }}{% endif %}"
            choices = ["{% " + "{% el".join(choices) + refusal]
        return (
            f"{{{{ {quoted(self.start)} }}}}{{% for message in messages %}}{''.join(choices)}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {quoted(self._turn('assistant')[0])} }}}}{{% endif %}}"
        )


def answers_of(messages: list[Message]) -> list[int]:
    """The indices of the answers that are trained: the assistant's messages but those with `"weight": 0`."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]


def quoted(text: str) -> str:
    """As a string in jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def named_format(name: str, eos: str = END_OF_TEXT) -> NamedFormat:
    """The format of that name, for a tokenizer whose documents end with `eos`. Raises UserError for another name."""
    if name == "chatml":
        return NamedFormat(name, "", {ANY: (f"{IM_START}{{role}}\n", f"{IM_END}\n")}, IM_END)
    if name == "mindllm":
        turns = {"system": ("", "\n"), "user": ("<user>\n", "\n"), "assistant": ("<assistant>\n", eos)}
        mindllm = NamedFormat(name, eos, turns, eos, stop=("<user>\n",), strip=True)
        return replace(mindllm, between=f"{eos}\n{eos}", sampling=MINDLLM_SAMPLING, revision=2)
    if name == "belle":
        turns = {"system": ("", "\n\n"), "user": ("Human: ", " \n\n"), "assistant": ("Assistant:", eos)}
        belle = NamedFormat(name, "", turns, eos, stop=("Human: ",), strip=True)
        return replace(belle, between="", sampling=BELLE_SAMPLING, revision=2)
    if name == "text":
        return NamedFormat(name, "", {"system": ("", "\n"), "user": ("", ""), "assistant": ("", eos)}, eos)
    raise UserError(f"there is no chat format {name}: choose from {', '.join(FORMAT_NAMES)}")
