"""Chat templates of foreign models: what a jinja template writes, where its answers are, and which samples it gives.

The span of an answer is found by rendering the chat up to it (with the generation prompt) and with it. A template may
write an answer differently when turns follow it, as Qwen3's does, which keeps the thoughts of the last turn alone:

    asked     <|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n
    answered  <|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n2<|im_end|>\\n
    later     <|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n2<|im_end|>\\n<|im_start|>user\\n…

Training has to match generation: such a chat becomes several samples, each ending at an answer and training it there,
with the earlier turns written as they are when turns follow them. A template that writes every answer the same way
gives one sample.
Rendering is bounded (template_sandbox.py). A chat that cannot be written raises UnsupportedChatError.
Read next: template_sandbox.py, tokenizer.py (samples become ids and masks).
"""

import re
from functools import cached_property
from typing import Any

from common.errors import CHAT_FORMAT_ADVICE, UserError
from model.chat_template import Message, Span, TooManyAnswersError, TrainingSpans, UnsupportedChatError, trained_answers

MAX_CHAT_STEPS = 400_000  # of all renderings of a chat, which is rendered up to each of its answers
MAX_EXCEEDED = 3  # chats that may exceed the bound before the template is an error


class JinjaTemplate:
    """A jinja template over `messages`, `add_generation_prompt` and the special tokens."""

    name = "template"
    stop_strings: tuple[str, ...] = ()
    sampling: dict[str, Any] = {}  # noqa: RUF012  # never changed; a foreign folder's settings lie in its own files

    def __init__(self, template: str, special_tokens: dict[str, str], markers: re.Pattern[str]) -> None:
        """`special_tokens`: bos_token, eos_token, ... of the template. `markers` finds control tokens in text."""
        self.template, self.special_tokens, self.markers = template, special_tokens, markers
        self._num_exceeded = 0

    @cached_property
    def end_of_turn(self) -> str:
        """The control token that ends an answer; "" where the template cannot write a plain chat of two messages."""
        try:
            spans, _ = self.samples([{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}])[-1]
        except UserError:
            return ""
        return next((self.markers.findall(text)[-1] for text, trained in spans if trained), "")

    @cached_property
    def _compiled(self) -> tuple[Any, Any]:
        """(environment, template). Raises UserError for text that is not valid jinja."""
        from jinja2 import TemplateError

        from model.template_sandbox import MAX_TEMPLATE, BoundedEnvironment

        if len(self.template) > MAX_TEMPLATE:
            raise UserError(
                f"the model's chat template has {len(self.template):,} characters, at most {MAX_TEMPLATE:,} are "
                f"read: {CHAT_FORMAT_ADVICE}"
            )
        environment = BoundedEnvironment()
        try:
            return environment, environment.from_string(self.template)
        except TemplateError as error:
            raise UserError(f"the model's chat template is not valid jinja ({error}): {CHAT_FORMAT_ADVICE}") from None
        except (RecursionError, SyntaxError):  # Python refuses more than 20 loops inside each other
            raise UserError(f"the model's chat template is nested too deeply: {CHAT_FORMAT_ADVICE}") from None

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The rendered chat. Raises UnsupportedChatError with the template's own message where it refuses or fails."""
        from jinja2 import TemplateError, UndefinedError

        from model.template_sandbox import StepsExceeded

        variables: dict[str, Any] = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        environment, template = self._compiled
        try:
            rendered: str = environment.render(
                template, {**variables, "tools": None, "documents": None, **self.special_tokens}
            )
            return rendered
        except StepsExceeded as bound:
            self._num_exceeded += 1
            problem = f"the model's chat template takes {bound} for one chat"
            if self._num_exceeded >= MAX_EXCEEDED:
                raise UserError(f"{problem}, the bound: it may loop forever; {CHAT_FORMAT_ADVICE}") from None
            raise UnsupportedChatError(problem) from None
        except Exception as error:  # jinja's errors, and those of expressions in the template
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            is_raised_by_template = isinstance(error, TemplateError) and not isinstance(error, UndefinedError)
            raise UnsupportedChatError(
                f"the model's chat template {'refuses it: ' if is_raised_by_template else 'fails: '}{reason}"
            ) from None

    def spans(self, messages: list[Message], add_generation_prompt: bool) -> list[Span]:
        """The whole chat piece by piece; before a generation prompt nothing is marked: nothing is trained there."""
        if add_generation_prompt:
            return [(self.text(messages, True), False)]
        return self.samples(messages)[-1][0]

    def samples(self, messages: list[Message]) -> list[TrainingSpans]:
        """What is trained, shortest first; the last one is the whole chat. Each answer is trained in one of them.

        The time grows with the square of the number of answers, so a chat has at most about 150 of them.

        Raises TooManyAnswersError for more; UnsupportedChatError if an answer is not at its prompt or ends with no
        control token, and when the system message is not written.
        """
        whole = self.text(messages)
        answers = trained_answers(messages)
        steps = self._compiled[0].steps_taken * len(answers)  # about: two renderings of half the chat for each answer
        if len(answers) > 1 and steps > MAX_CHAT_STEPS:
            raise TooManyAnswersError(
                f"the model's chat template takes more than {MAX_CHAT_STEPS:,} steps for the answers of so long a chat"
            )
        if messages and messages[0]["role"] == "system" and messages[0]["content"].strip() not in whole:
            raise UnsupportedChatError("the model's chat template leaves out the system message")
        samples_found: list[tuple[str, list[tuple[int, int]], list[int]]] = [(whole, [], [])]
        for i in reversed(answers):
            prompt = self.text(messages[:i], True)
            answered = self.text(messages[: i + 1]) if i + 1 < len(messages) else whole
            if not answered.startswith(prompt):
                raise UnsupportedChatError(
                    "the model's chat template does not write the answer after its generation prompt"
                )
            marker_ends = [match.end() for match in self.markers.finditer(answered, len(prompt))]
            if not marker_ends:
                raise UnsupportedChatError("the model's chat template ends answers with no control token")
            if not samples_found[-1][0].startswith(answered):
                samples_found.append((answered, [], []))
            _, answer_spans, trained = samples_found[-1]
            answer_spans.insert(0, (len(prompt), marker_ends[-1]))
            trained.insert(0, i)
        return [(_spans(text, answer_spans), trained) for text, answer_spans, trained in reversed(samples_found)]


def _spans(text: str, answers: list[tuple[int, int]]) -> list[Span]:
    """The text cut at its answers, given as (start, end)."""
    spans, position = [], 0
    for start, end in answers:
        spans += [(text[position:start], False), (text[start:end], True)]
        position = end
    return [*spans, (text[position:], False)]
