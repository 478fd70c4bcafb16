"""Jinja chat templates of imported models: rendering, the spans of answers, and training samples.

The span of an answer is the difference between the chat rendered up to it (with the generation prompt) and with it.
A template may render an answer differently when turns follow it. Qwen3's keeps the reasoning of the last turn only:

    prompt       <|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n
    last turn    <|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n2<|im_end|>\\n
    later        <|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n2<|im_end|>\\n<|im_start|>user\\n…

Training must match generation, so such a chat becomes several samples: each ends at an answer and trains it, with the
earlier turns rendered as history. Other templates give one sample per chat.
Rendering has limits (template_sandbox.py). A chat that the template does not support raises UnsupportedChatError.
Read next: template_sandbox.py, tokenizer.py (samples to ids and masks).
"""

import json
import re
from functools import cached_property
from typing import Any

from common.errors import CHAT_FORMAT_ADVICE, UserError
from model.chat_template import Message, SampleText, TooManyAnswersError, UnsupportedChatError, trained_answers

MAX_CHAT_STEPS = 400_000  # over all renderings of a chat, two per answer
MAX_EXCEEDED = 3  # the third chat that exceeds the limit raises UserError


class JinjaTemplate:
    """A jinja chat template with the interface of ChatTemplate."""

    name = "template"
    stop_strings: tuple[str, ...] = ()
    sampling: dict[str, Any] = {}  # noqa: RUF012  # constant: imported folders have generation_config.json

    def __init__(self, template: str, special_tokens: dict[str, str], markers: re.Pattern[str]) -> None:
        """`special_tokens`: template variables such as bos_token. `markers` matches special tokens in text."""
        self.template, self.special_tokens, self.markers = template, special_tokens, markers
        self._num_exceeded = 0

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that ends an answer; "" if the template does not support a chat of two messages."""
        try:
            text, spans, _ = self.samples([{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}])[-1]
        except UserError:
            return ""
        markers: list[str] = self.markers.findall(text[slice(*spans[-1])])
        return markers[-1]

    @cached_property
    def _compiled(self) -> tuple[Any, Any]:
        """(environment, compiled template). Raises UserError if the template is not valid jinja."""
        from jinja2 import TemplateError

        from model.template_sandbox import MAX_TEMPLATE, BoundedEnvironment

        if len(self.template) > MAX_TEMPLATE:
            raise UserError(
                f"the model's chat template has {len(self.template):,} characters, the limit is {MAX_TEMPLATE:,}: "
                f"{CHAT_FORMAT_ADVICE}"
            )
        environment = BoundedEnvironment()
        try:
            return environment, environment.from_string(self.template)
        except TemplateError as error:
            raise UserError(f"the model's chat template is not valid jinja ({error}): {CHAT_FORMAT_ADVICE}") from None
        except (RecursionError, SyntaxError):  # Python allows 20 nested loops
            raise UserError(f"the model's chat template is nested too deeply: {CHAT_FORMAT_ADVICE}") from None

    def text(
        self, messages: list[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> str:
        """The rendered chat. Raises UnsupportedChatError, with the template's message, if rendering fails."""
        from jinja2 import TemplateError, UndefinedError

        from model.template_sandbox import StepsExceeded

        variables: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": None}
        if messages and (tools := messages[0].get("tools")):
            variables["tools"] = tools
            messages = messages if messages[0]["content"] else messages[1:]  # only carries the tools
        variables["messages"] = messages
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        environment, template = self._compiled
        try:
            rendered: str = environment.render(template, {**variables, "documents": None, **self.special_tokens})
            return rendered
        except StepsExceeded as bound:
            self._num_exceeded += 1
            problem = f"the model's chat template takes {bound} for one chat"
            if self._num_exceeded >= MAX_EXCEEDED:
                raise UserError(f"{problem}, the bound: it may loop forever; {CHAT_FORMAT_ADVICE}") from None
            raise UnsupportedChatError(problem) from None
        except Exception as error:  # a jinja error, or any error of an expression in the template
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            is_raised_by_template = isinstance(error, TemplateError) and not isinstance(error, UndefinedError)
            raise UnsupportedChatError(
                f"the model's chat template {'refuses it: ' if is_raised_by_template else 'fails: '}{reason}"
            ) from None

    def samples(
        self, messages: list[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> list[SampleText]:
        """The training samples, shortest first; the last is the whole chat. Each answer is trained in exactly one.

        With `add_generation_prompt`: the prompt, which trains nothing. The time is quadratic in the number of answers;
        MAX_CHAT_STEPS allows about 150 of them. Raises TooManyAnswersError for more, and UnsupportedChatError if the
        system message, a tool, call or result is missing from the text, or an answer does not follow its generation
        prompt or does not end with a special token. A template without thoughts leaves them out.
        """
        whole = self.text(messages, add_generation_prompt, enable_thinking)
        if missing := _missing_part(messages, whole):
            raise UnsupportedChatError(f"the model's chat template leaves out {missing}")
        if add_generation_prompt:
            return [SampleText(whole, [], [])]
        if messages and messages[0]["role"] == "system" and messages[0]["content"].strip() not in whole:
            raise UnsupportedChatError("the model's chat template leaves out the system message")
        answers = trained_answers(messages)
        steps = self._compiled[0].steps_taken * len(answers)  # estimate: two renderings of half the chat per answer
        if len(answers) > 1 and steps > MAX_CHAT_STEPS:
            raise TooManyAnswersError(
                f"the model's chat template takes more than {MAX_CHAT_STEPS:,} steps for the answers of so long a chat"
            )
        samples = [SampleText(whole, [], [])]  # longest first
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
            if not samples[-1].text.startswith(answered):
                samples.append(SampleText(answered, [], []))
            samples[-1].spans.insert(0, (len(prompt), marker_ends[-1]))
            samples[-1].answers.insert(0, i)
        return samples[::-1]


def _missing_part(messages: list[Message], text: str) -> str:
    """Which of tools, calls and results the rendered chat lacks, or ""."""

    def is_missing(part: str) -> bool:
        return part not in text and json.dumps(part, ensure_ascii=False)[1:-1] not in text

    for message in messages:
        if any(is_missing(tool["function"]["name"]) for tool in message.get("tools") or ()):
            return "the tools"
        if message["role"] == "tool" and is_missing(message["content"].strip()):
            return "the results of tools"
        if any(is_missing(call["function"]["name"]) for call in message.get("tool_calls") or ()):
            return "the calls of tools"
    return ""
