"""Foreign jinja templates, rendered in a sandbox with limits on steps, sizes and time.

jinja2's sandbox hides Python's internals and limits one range() to 100,000. Nested loops, recursive macros and strings
that double still take unbounded time and memory. Here one rendering may take MAX_STEPS:

    a loop iteration, a call, a printed value                        1 step
    text or a list that is built or printed                          1 step more for every 256 characters or 8 entries

One operation builds at most MAX_SIZE characters, and the whole rendering ends after MAX_SECONDS.
A chat template takes a few dozen steps a message. The additions for chats are those of transformers.
Called by chat_templates.py.
"""

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 200_000
CHARACTERS_A_STEP = 256
MAX_SIZE = CHARACTERS_A_STEP * MAX_STEPS  # characters that one operation may build
MAX_BITS = 10_000  # of a number
MAX_SECONDS = 20.0
FORMATS = ("format", "format_map")  # methods of text
WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)")  # "%999999d"; "%*d" takes its width from an argument
WIDE_BRACES = re.compile(r"\{[^{}]*\d{6}")  # "{:>999999}"


class StepsExceeded(Exception):
    """A rendering exceeded a bound; the message names the bound."""


class _Budget(threading.local):
    """The remaining steps and time of the rendering in this thread."""

    steps = MAX_STEPS
    deadline = float("inf")


class _Generator(CodeGenerator):
    """Compiles loops and `~` so that they are counted."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        step = nodes.EnvironmentAttribute("step", lineno=node.lineno)
        node.body = [nodes.ExprStmt(step, lineno=node.lineno), *node.body]
        if node.test:  # it is asked for entries that never reach the body
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.built(")
        super().visit_Concat(node, frame)
        self.write(")")


class _Generation(Extension):
    """{% generation %} marks answers for transformers; here only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012  # as jinja declares it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates. `render` is safe to call from several threads."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self.built
        )
        self._budget = _Budget()
        self.filters["tojson"] = _to_json
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        del self.globals["lipsum"]  # writes text of any length

    def render(self, template: Any, variables: dict[str, Any]) -> str:
        """The rendered text. Raises StepsExceeded, or any exception of the template's own expressions."""
        self._budget.steps, self._budget.deadline = MAX_STEPS, time.monotonic() + MAX_SECONDS
        return template.render(**variables)

    @property
    def step(self) -> bool:
        """Count one step; returns True, since compiled loops use it as a condition."""
        self._spend(1)
        return True

    def built(self, value: Any) -> Any:
        """The value, counted by its size."""
        size = len(value) if type(value) is str else _size(value)
        self._spend(1 + size // CHARACTERS_A_STEP)
        return value

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(function, type):  # namespace and dict only keep what they are given
            text = getattr(function, "__self__", None)  # "x" in "x".replace; jinja hides that of "x".format
            text = "x" if getattr(function, "__name__", "") in FORMATS else text
            self._check([text, *args, *kwargs.values()])
        return self.built(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            return self.built(left + right)
        if operator == "*":
            self._check([left, right])
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise StepsExceeded(f"a number of more than {MAX_BITS:,} bits")
        if operator == "%" and isinstance(left, str):
            self._check_width(WIDE_PERCENT, left)
        return self.built(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        if attribute in FORMATS and isinstance(obj, str):
            self._check_width(WIDE_BRACES, obj)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, str) and argument in FORMATS and isinstance(obj, str):
            self._check_width(WIDE_BRACES, obj)
        return super().getitem(obj, argument)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, counted. Attributes that jinja sets on it (`pass_environment`) are copied."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._check([*args, *kwargs.values()])
            if name == "format":
                self._check_width(WIDE_PERCENT, str(args[0]))
            return self.built(function(*args, **kwargs))

        return bounded

    def _spend(self, steps: int) -> None:
        budget = self._budget
        left = budget.steps = budget.steps - steps
        if left < 0:
            raise StepsExceeded(f"more than {MAX_STEPS:,} steps")
        if time.monotonic() > budget.deadline:
            raise StepsExceeded(f"more than {MAX_SECONDS:g} seconds")

    def _check(self, values: list[Any]) -> None:
        """Raises StepsExceeded where one operation of these values may build more than MAX_SIZE."""
        texts = sorted(map(_size, values))
        numbers = [abs(value) for value in values if isinstance(value, int)]
        if texts and texts[-1] * max([1, *texts[-2:-1], *numbers]) > MAX_SIZE:
            raise StepsExceeded(f"more than {MAX_SIZE:,} characters at once")
        self._spend(sum(texts) // CHARACTERS_A_STEP)

    def _check_width(self, pattern: re.Pattern[str], text: str) -> None:
        if pattern.search(text):
            raise StepsExceeded("a format wider than 99,999 characters")


def _size(value: Any) -> int:
    """Characters of text; of a list or dict 32 for each entry, about its bytes, and the text in a list; else 0."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (list, tuple)):
        return 32 * len(value) + sum(len(entry) for entry in value if isinstance(entry, str))
    return 32 * len(value) if isinstance(value, dict) else 0


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
