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
TrainingSpans = tuple[list[Span], list[int]]  # a rendered chat, and which of its messages are trained in it

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The generation call on the card of bit-dny/MindLLM-1b3-chat-zh-v2.0. Its repetition_penalty of 0.5 is left out: a
# penalty below 1 makes repeated tokens more likely, not less.
MINDLLM_SAMPLING = {"num_beams": 4, "no_repeat_ngram_size": 5}
# The generation call on the card of BelleGroup/BELLE-7B-2M.
BELLE_SAMPLING = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2}
CHAT_FORMATS = ("chatml", "mindllm", "belle", "text")
ANY_ROLE = "*"  # every other role, {role} being its name


class UnsupportedChatError(UserError):
    """A format cannot write this chat; it may be able to write others."""


class TooManyAnswersError(UnsupportedChatError):
    """A format cannot write so long a chat; it may be able to write its first turns."""


@dataclass(frozen=True)
class ChatTemplate:
    """`roles` maps a role to the text before and after its messages. `end_of_turn` is the first text after an answer:
    the token that ends it, trained with it. `sampling`: the generation settings that the format's model card
    recommends, named as in transformers' GenerationConfig; empty where its card names none. `revision` counts the
    changes of what is written: token folders of another revision are rebuilt."""

    name: str
    start: str  # before the first message
    roles: dict[str, tuple[str, str]]
    end_of_turn: str
    stop_strings: tuple[
        str, ...
    ] = ()  # text that ends an answer: the next turn's beginning, where it is no token of its own
    strip_content: bool = False  # white space around everything but answers goes
    inner_suffix: str | None = None  # after an answer with a turn behind it, where it differs from the last
    sampling: dict[str, Any] = field(default_factory=dict, compare=False)
    revision: int = 1

    def spans(self, messages: list[Message], add_generation_prompt: bool) -> list[Span]:
        """The chat piece by piece. Raises UnsupportedChatError for a role that the format does not know."""
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
        """The rendered chat."""
        return "".join(text for text, _ in self.spans(messages, add_generation_prompt))

    def samples(self, messages: list[Message]) -> list[TrainingSpans]:
        """The samples to train on: one rendering with every answer."""
        return [(self.spans(messages, False), trained_answers(messages))]

    def _affixes(self, role: str) -> tuple[str, str]:
        if role in self.roles:
            return self.roles[role]
        if ANY_ROLE not in self.roles or not role.isidentifier():
            raise UnsupportedChatError(
                f"the chat format {self.name} has no role {role!r}: it knows {', '.join(self.roles)}"
            )
        prefix, suffix = self.roles[ANY_ROLE]
        return prefix.replace("{role}", role), suffix

    @property
    def template(self) -> str:
        """The same as a jinja template over `messages` and `add_generation_prompt`."""
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
    """The indices of the answers that are trained: the assistant's messages but those with `"weight": 0`."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]


def quote_jinja(text: str) -> str:
    """As a string in jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def find_chat_template(name: str, eos: str = END_OF_TEXT) -> ChatTemplate:
    """The format of that name, for a tokenizer whose documents end with `eos`. Raises UserError for another name."""
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
    raise UserError(f"there is no chat format {name}: choose from {', '.join(CHAT_FORMATS)}")
