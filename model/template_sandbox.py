"""Foreign jinja templates, rendered in a sandbox with limits on steps, sizes and time.

jinja2's sandbox hides Python's internals and limits one range() to 100,000. Nested loops, recursive macros, strings
that double and lists that hold themselves twice still take unbounded time and memory. One rendering takes at most
MAX_STEPS, and MAX_SECONDS of the processor:

    a loop iteration, a call, a printed value, an entry that a filter yields       1 step
    text that is read, built or printed                                            1 step more for every 256 bytes
    a list or dict that is built, with the lists inside it                         1 step more for every 8 entries

One value holds at most MAX_SIZE bytes, with everything inside it. Sizes are computed before an operation builds its
result. A chat template takes about ten steps a message. The additions for chats are those of transformers.
Called by jinja_template.py.
"""

import datetime
import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, MappingView
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Undefined, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 200_000
BYTES_A_STEP, ENTRIES_A_STEP = 256, 8
MAX_SIZE = 8_000_000  # bytes of one value
ENTRY_SIZE, DICT_SIZE = 32, 200  # bytes of an entry of a list or dict, about, and of a dict; text comes on top
MAX_BITS = 10_000  # of a number
MAX_DIGITS = 100  # that `round` may keep
MAX_SECONDS = 0.8  # of this thread on the processor; a backstop for operations that take more time than steps
CLOCK_STEPS = 16  # steps between two looks at the clock
MAX_TEMPLATE = 50_000  # characters of a template; compiled, each takes up to 1.5 kB
FORMATS = ("format", "format_map")  # methods of text
WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)")  # "%999999d"; "%*d" takes its width from an argument
WIDE_BRACES = re.compile(r"\{[^{}]*\d{6}")  # "{:>999999}"
# Filters that take more than linear time, and that no chat template needs.
REMOVED = ("striptags", "urlize", "xmlattr", "wordwrap", "wordcount", "pprint", "filesizeformat", "random")
PASSING = ("default", "d", "first", "last", "length", "count")  # filters that read and build nothing
# Filters whose results take more bytes than what they read, times their numbers.
GROWTH = {"batch": 8, "slice": 8, "title": 64, "tojson": 6, "escape": 6, "e": 6, "forceescape": 6}
ESCAPED = 6  # times as long: " becomes &#34; where autoescape is on
LAZY = ("map", "select", "reject", "selectattr", "rejectattr", "items", "list", "reverse")  # counted as they yield
# Methods of text whose results are not longer than the text.
SHORTENING = ("split", "rsplit", "splitlines", "strip", "lstrip", "rstrip", "startswith", "endswith", "find", "rfind",
              "index", "rindex", "count", "partition", "rpartition", "removeprefix", "removesuffix")  # fmt: skip


class StepsExceeded(Exception):
    """A rendering exceeded a bound; the message names the bound."""


class _Budget(threading.local):
    """What is left to the rendering in this thread."""

    steps = MAX_STEPS
    next_look = 0  # the number of steps left at which the clock is read
    deadline = float("inf")  # of time.thread_time()
    messages: dict[int, tuple[int, int] | None] = {}  # noqa: RUF012  # id of a message: its size, once computed


class _Generator(CodeGenerator):
    """Compiles loops, `~`, literals of lists and the template's own text so that they are counted."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        step = nodes.EnvironmentAttribute("step", lineno=node.lineno)
        node.body = [nodes.ExprStmt(step, lineno=node.lineno), *node.body]
        if node.test:  # it is asked for entries that never reach the body
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        written = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if written >= BYTES_A_STEP:
            self.writeline(f"environment.spend({4 * written // BYTES_A_STEP})", node)
        super().visit_Output(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("), context.eval_ctx.autoescape)")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._counted(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._counted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._counted(super().visit_Tuple, node, frame)
        else:  # {% for a, b in … %}
            super().visit_Tuple(node, frame)

    def _counted(self, visit: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
        self.write("environment.built(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """{% generation %} marks answers for transformers; here only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012  # as jinja declares it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates. `render` is safe to call from several threads."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants are computed by a rendering, which counts them, not by the compiler
            extensions=[_Generation, loopcontrols],
            finalize=pass_context(lambda context, value: self._printed(value, context.eval_ctx.autoescape)),
        )
        self._budget = _Budget()
        self.filters["tojson"] = _to_json
        kept = {name: function for name, function in self.filters.items() if name not in REMOVED}
        self.filters = {name: self._bounded(name, function) for name, function in kept.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # writes text of any length

    def render(self, template: Any, variables: dict[str, Any]) -> str:
        """The rendered text. Raises StepsExceeded, or any exception of the template's own expressions."""
        budget = self._budget
        budget.steps, budget.next_look = MAX_STEPS, MAX_STEPS - CLOCK_STEPS
        budget.deadline = time.thread_time() + MAX_SECONDS
        budget.messages = dict.fromkeys(map(id, variables.get("messages", ())))
        rendered: str = template.render(**variables)
        return rendered

    @property
    def steps_taken(self) -> int:
        """Of the latest rendering in this thread."""
        return MAX_STEPS - self._budget.steps

    # ---- what is counted ---------------------------------------------------------------------------------------------
    @property
    def step(self) -> bool:
        """Count one step; returns True, since compiled loops use it as a condition."""
        self.spend(1)
        return True

    def spend(self, steps: int) -> None:
        budget = self._budget
        left = budget.steps = budget.steps - steps
        if left < 0:
            raise StepsExceeded(f"more than {MAX_STEPS:,} steps")
        if left < budget.next_look:
            budget.next_look = left - CLOCK_STEPS
            if time.thread_time() > budget.deadline:
                raise StepsExceeded(f"more than {MAX_SECONDS:g} seconds")

    def built(self, value: Any) -> Any:
        """The value, counted by its size. Of an iterator each entry is counted as it is yielded."""
        if isinstance(value, (str, bytes)):
            self.spend(1 + self._check_size(_text_size(value)) // BYTES_A_STEP)
        elif isinstance(value, (int, Undefined)) or value is None:
            self._check_bits(value.bit_length() if isinstance(value, int) else 0)
            self.spend(1)
        elif isinstance(value, Iterator):
            return self._yielded(value)
        else:
            self.spend(1 + (0 if isinstance(value, range) else self._measure(value)[1] // ENTRIES_A_STEP))
        return value

    def joined(self, values: tuple[Any, ...], escapes: bool) -> str:
        """`a ~ b`."""
        self._printed(values, escapes)
        return (markup_join if escapes else str_join)(values)

    def _printed(self, value: Any, escapes: bool) -> Any:
        """A value that jinja turns into text."""
        size = self._check_size(self._measure(value)[0] * (ESCAPED if escapes else 1))
        self.spend(1 + size // BYTES_A_STEP)
        return value

    def _yielded(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(1)
            yield value

    # ---- operations --------------------------------------------------------------------------------------------------
    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, type):  # namespace and dict only keep what they are given
            return self.built(super().call(context, function, *args, **kwargs))
        method = getattr(function, "__wrapped__", function)  # jinja wraps "x".format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            self._check([owner, *args, *kwargs.values()], int(name not in SHORTENING))
        else:
            self.spend(1)
        if name in FORMATS:
            self._check_width(WIDE_BRACES, owner)
        return self.built(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            self._check_bits(bits if operator in ("*", "**") else 0)
        elif operator in ("*", "%"):
            self._check([left, right])
            if operator == "%" and isinstance(left, (str, bytes)):
                self._check_width(WIDE_PERCENT, left)
        return self.built(super().call_binop(context, operator, left, right))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, counted. Attributes that jinja sets on it (`pass_environment`) are copied."""

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if name in PASSING:
                self.spend(1)
                return function(*args, **kwargs)
            if name not in LAZY:
                self._check([*args, *kwargs.values()], GROWTH.get(name, 1))
            if name == "format":
                self._check_width(WIDE_PERCENT, str(args[0]))
            if name == "round" and any(
                isinstance(x, int) and abs(x) > MAX_DIGITS for x in [*args[1:], *kwargs.values()]
            ):
                raise StepsExceeded(f"a number of more than {MAX_DIGITS} decimals")
            return self.built(function(*args, **kwargs))

        return bounded

    # ---- bounds ------------------------------------------------------------------------------------------------------
    def _check(self, values: list[Any], growth: int = 1) -> None:
        """Raises StepsExceeded where one operation of these values may build more than MAX_SIZE.

        "a" * 9, "a".replace("a", "bb") and "a" | center(9) build the product of two of them, times `growth`.
        """
        sizes = sorted(self._measure(value)[0] for value in values if not isinstance(value, int))
        numbers = [abs(value) for value in values if isinstance(value, int)]
        self._check_size(growth * max([1, *sizes]) * max([1, *sizes[-2:-1], *numbers]))
        self.spend(sum(sizes) // BYTES_A_STEP)

    def _check_size(self, size: int) -> int:
        if size > MAX_SIZE:
            raise StepsExceeded(f"a value of more than {MAX_SIZE:,} bytes")
        return size

    def _check_bits(self, bits: int) -> None:
        if bits > MAX_BITS:
            raise StepsExceeded(f"a number of more than {MAX_BITS:,} bits")

    def _check_width(self, pattern: re.Pattern[str], text: Any) -> None:
        if pattern.search(text if isinstance(text, str) else text.decode("latin-1")):
            raise StepsExceeded("a format wider than 99,999 characters")

    def _measure(self, value: Any) -> tuple[int, int]:
        """(bytes, entries) of a value with everything inside it. Raises StepsExceeded where that exceeds MAX_SIZE."""
        if isinstance(value, (str, bytes)):
            return self._check_size(_text_size(value)), 0
        size, entries, known = 0, 0, self._budget.messages
        waiting: list[Any] = [value]
        while waiting:
            one: Any = waiting.pop()
            if isinstance(one, (str, bytes)):
                size += _text_size(one)
            elif id(one) in known and one is not value:
                measured = known[id(one)]
                if measured is None:
                    measured = known[id(one)] = self._measure(one)
                size, entries = size + measured[0], entries + 1
            elif isinstance(one, (list, tuple, set, frozenset, dict, MappingView, range)):
                size += ENTRY_SIZE * len(one) + (DICT_SIZE if isinstance(one, dict) else ENTRY_SIZE)
                entries += len(one)
                self._check_size(size)
                if not isinstance(one, range):
                    waiting.extend(iter(one))  # type: ignore[arg-type]
                    waiting.extend(one.values() if isinstance(one, dict) else ())
            elif isinstance(one, Namespace):
                size += ENTRY_SIZE
                waiting.append(one._Namespace__attrs)
            self._check_size(size)
        return size, entries


def _text_size(text: str | bytes) -> int:
    """Bytes in memory, without those of the object."""
    return max(len(text), sys.getsizeof(text) - 76)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form[:1000])  # a field may be 256 times as long as the format


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
