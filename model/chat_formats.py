"""How the turns of a chat are written: the formats that have a name, and those of other people's models.

    chatml    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n
    mindllm   <|endoftext|><user>\\n{question}\\n<assistant>\\n{answer}<|endoftext|>      next turns begin with <user>
    belle     Human: {question} \\n\\nAssistant:{answer}<|endoftext|>                    next turns follow at once
    text      {question}{answer}<|endoftext|>                                         no roles: the model goes on

A format says what is written (`spans`, for chat.py) and says it once more as a jinja template (`template`, for
transformers and whatever else opens an exported model). Answers and the marker that closes each are trained.

chatml: OpenAI's chat markup. mindllm: the prompt of bit-dny/MindLLM-1b3-chat-zh-v2.0, whose eos <|endoftext|> closes an
answer and thereby opens the next turn. belle: the card of BelleGroup/BELLE-7B-2M (the space before the newlines is its
own), with the eos behind each answer that BELLE's training adds. text: the card of xiangxinai/Xiangxin-3B. These three
know no system message: it stands in front as plain text.
Read next: chat.py (who turns spans into ids and a mask).
"""

import contextlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from corpus.errors import UserError

Message = dict[str, str]
Span = tuple[str, bool]  # a piece of the rendered text, and whether it is trained

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The generation call on the card of bit-dny/MindLLM-1b3-chat-zh-v2.0. Its repetition_penalty of 0.5 is left out: a
# penalty below 1 makes repeated tokens more likely, not less.
MINDLLM_SAMPLING = {"num_beams": 4, "no_repeat_ngram_size": 5}
# The generation call on the card of BelleGroup/BELLE-7B-2M.
BELLE_SAMPLING = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2}
FORMAT_NAMES = ("chatml", "mindllm", "belle", "text")
ANY = "*"  # every other role, {role} being its name


@dataclass(frozen=True)
class NamedFormat:
    """`turns` maps a role to what stands before and behind its messages. `close` is what stands first behind an answer:
    the token that ends it, trained with it. `sampling`: the generation settings that the format's model card
    recommends, named as in transformers' GenerationConfig; empty where its card names none."""

    name: str
    start: str  # before the first message
    turns: dict[str, tuple[str, str]]
    close: str
    stop: tuple[str, ...] = ()  # text that ends an answer: the next turn's beginning, where it is no token of its own
    strip: bool = False  # white space around everything but answers goes
    sampling: dict[str, Any] = field(default_factory=dict, compare=False)

    def spans(self, messages: list[Message], add_generation_prompt: bool) -> list[Span]:
        """The chat piece by piece. Raises UserError for a role that the format does not know."""
        spans = [(self.start, False)]
        for message in messages:
            role, content = message["role"], message["content"]
            before, behind = self._turn(role)
            if role == "assistant":
                spans += [(before, False), (content + self.close, True), (behind[len(self.close) :], False)]
            else:
                spans += [(before + (content.strip() if self.strip else content) + behind, False)]
        if add_generation_prompt:
            spans.append((self._turn("assistant")[0], False))
        return spans

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The rendered chat."""
        return "".join(text for text, _ in self.spans(messages, add_generation_prompt))

    def _turn(self, role: str) -> tuple[str, str]:
        if role in self.turns:
            return self.turns[role]
        if ANY not in self.turns or not role.isidentifier():
            raise UserError(f"the chat format {self.name} has no role {role!r}: it knows {', '.join(self.turns)}")
        before, behind = self.turns[ANY]
        return before.replace("{role}", role), behind

    @property
    def template(self) -> str:
        """The same as a jinja template over `messages` and `add_generation_prompt`."""
        choices = []
        for role, (before, behind) in self.turns.items():
            content = "message['content']" + (" | trim" if self.strip and role != "assistant" else "")
            opening = quoted(before).replace("{role}", "' + message['role'] + '")
            written = f"{{{{ {opening} + ({content}) + {quoted(behind)} }}}}"
            choices.append(written if role == ANY else f"if message['role'] == '{role}' %}}{written}")
        if ANY not in self.turns:
            refusal = "{% else %}{{ raise_exception('no such role: ' + message['role']) }}{% endif %}"
            choices = ["{% " + "{% el".join(choices) + refusal]
        return (
            f"{{{{ {quoted(self.start)} }}}}{{% for message in messages %}}{''.join(choices)}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {quoted(self._turn('assistant')[0])} }}}}{{% endif %}}"
        )


def quoted(text: str) -> str:
    """As a string in jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def named_format(name: str, eos: str = END_OF_TEXT) -> NamedFormat:
    """The format of that name, for a tokenizer whose documents end with `eos`. Raises UserError for another name."""
    if name == "chatml":
        return NamedFormat(name, "", {ANY: (f"{IM_START}{{role}}\n", f"{IM_END}\n")}, IM_END)
    if name == "mindllm":
        turns = {"system": ("", "\n"), "user": ("<user>\n", "\n"), "assistant": ("<assistant>\n", eos)}
        return NamedFormat(name, eos, turns, eos, stop=("<user>\n",), strip=True, sampling=MINDLLM_SAMPLING)
    if name == "belle":
        turns = {"system": ("", "\n\n"), "user": ("Human: ", " \n\n"), "assistant": ("Assistant:", eos)}
        return NamedFormat(name, "", turns, eos, stop=("Human: ",), strip=True, sampling=BELLE_SAMPLING)
    if name == "text":
        return NamedFormat(name, "", {"system": ("", "\n"), "user": ("", ""), "assistant": ("", eos)}, eos)
    raise UserError(f"there is no chat format {name}: choose from {', '.join(FORMAT_NAMES)}")


class TemplateFormat:
    """Somebody else's jinja template. What an answer is, is found by rendering the chat up to it and behind it."""

    name = "template"
    stop: tuple[str, ...] = ()
    sampling: dict[str, Any] = {}  # noqa: RUF012  # never changed; a foreign folder's settings lie in its own files

    def __init__(self, template: str, special: dict[str, str], markers: re.Pattern[str]) -> None:
        """`special`: bos_token, eos_token, ... for the template. `markers` finds the tokenizer's control tokens."""
        self.template, self.special, self.markers = template, special, markers

    @cached_property
    def close(self) -> str:
        """The control token that ends an answer; "" where the template cannot write a plain chat of two messages."""
        try:
            _, (answer, _), _ = self.spans(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}], False
            )
        except UserError:
            return ""
        return self.markers.findall(answer)[-1]

    @cached_property
    def compiled(self) -> Any:
        return compile_template(self.template)

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The rendered chat. Raises UserError with the template's own words where it refuses."""
        try:
            known: dict[str, Any] = {"messages": messages, "add_generation_prompt": add_generation_prompt}
            return self.compiled.render(**known, tools=None, documents=None, **self.special)
        except Exception as error:  # jinja's, and whatever the template's own expressions raise
            raise UserError(f"the model's chat template fails ({str(error)[:200]}): try --chat_format chatml") from None

    def spans(self, messages: list[Message], add_generation_prompt: bool) -> list[Span]:
        """The chat piece by piece; before a generation prompt nothing is marked, because nothing is trained there.

        Raises UserError when the beginning of a chat is written differently once the chat goes on: then what was
        trained would not be what is asked with.
        """
        whole = self.text(messages, add_generation_prompt)
        if add_generation_prompt:
            return [(whole, False)]
        spans, done = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, answered = self.text(messages[:i], True), self.text(messages[: i + 1])
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise UserError(
                    f"the model's chat template writes message {i + 1} of a chat differently once more follows: "
                    "it cannot be trained on as it is; name another format, for example --chat_format chatml"
                )
            closing = [match.end() for match in self.markers.finditer(answered, len(prompt))]
            if not closing:
                raise UserError("the model's chat template ends answers with no token of its own: use --chat_format")
            end = closing[-1]
            spans += [(whole[done : len(prompt)], False), (whole[len(prompt) : end], True)]
            done = end
        return [*spans, (whole[done:], False)]


def compile_template(source: str) -> Any:
    """A jinja template in the sandbox and with the additions that transformers gives it."""
    import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks answers for transformers; here it only lets its body through."""

        tags = {"generation"}  # noqa: RUF012  # jinja's way

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    with contextlib.suppress(RecursionError):
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the model's chat template is no jinja ({error}): name a --chat_format") from None
    raise UserError("the model's chat template is nested too deeply: name a --chat_format")
