"""jinja2 sandbox for untrusted chat templates, with limits on steps, value sizes and CPU time.

jinja2's own sandbox blocks access to Python internals and limits range() to 100,000. It does not bound nested loops,
recursive macros, strings that double, or nested lists. Here one rendering costs at most MAX_STEPS and MAX_SECONDS:

    a loop iteration, a call, a printed value, an entry that a filter yields       1 step
    text that is read, built or printed                                            + 1 step per 256 bytes
    a list or dict that is built, with nested ones                                 + 1 step per 8 entries

A value, with all nested values, has at most MAX_SIZE bytes; sizes are checked before an operation builds its result.
A chat template costs about ten steps per message. Tags and globals are those of transformers. See jinja_template.py.
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
BYTES_PER_STEP, ENTRIES_PER_STEP = 256, 8
MAX_SIZE = 8_000_000  # bytes of one value
ENTRY_SIZE, DICT_SIZE = 32, 200  # approximate bytes per entry of a list or dict and per dict, without its text
MAX_BITS = 10_000  # of an integer
MAX_DIGITS = 100  # decimals in `round`
MAX_SECONDS = 0.8  # CPU time of the thread, for operations that take more time than their steps suggest
STEPS_PER_CLOCK_CHECK = 16
MAX_TEMPLATE = 50_000  # characters of a template; compiled code takes up to 1.5 kB per character
FORMAT_METHODS = ("format", "format_map")  # of str
WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)")  # "%999999d"; "%*d" takes its width from an argument
WIDE_BRACES = re.compile(r"\{[^{}]*\d{6}")  # "{:>999999}"
# Filters of more than linear cost that chat templates do not use.
REMOVED_FILTERS = ("striptags", "urlize", "xmlattr", "wordwrap", "wordcount", "pprint", "filesizeformat", "random")
CONSTANT_TIME_FILTERS = ("default", "d", "first", "last", "length", "count")
# Filters whose output is larger than their input times their integer arguments: the maximum ratio.
FILTER_GROWTH = {"batch": 8, "slice": 8, "title": 64, "tojson": 6, "escape": 6, "e": 6, "forceescape": 6}
ESCAPE_GROWTH = 6  # autoescape turns " into &#34;
# Filters whose entries are counted as they are yielded.
LAZY_FILTERS = ("map", "select", "reject", "selectattr", "rejectattr", "items", "list", "reverse")
# str methods whose result is at most as long as the string.
SHORTENING = ("split", "rsplit", "splitlines", "strip", "lstrip", "rstrip", "startswith", "endswith", "find", "rfind",
              "index", "rindex", "count", "partition", "rpartition", "removeprefix", "removesuffix")  # fmt: skip


class StepsExceeded(Exception):
    """A rendering exceeded a limit; the message names the limit."""


class _Budget(threading.local):
    """Remaining budget of the rendering in this thread."""

    steps = MAX_STEPS
    next_clock_check = 0  # the clock is read when fewer steps remain
    deadline = float("inf")  # of time.thread_time()
    messages: dict[int, tuple[int, int] | None] = {}  # noqa: RUF012  # id(message) -> its size, once computed


class _Generator(CodeGenerator):
    """Code generator that adds step counting to loops, `~`, slices, list and dict literals, and template text."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        count_step = nodes.EnvironmentAttribute("count_step", lineno=node.lineno)
        node.body = [nodes.ExprStmt(count_step, lineno=node.lineno), *node.body]
        if node.test:  # evaluated for entries that do not reach the body, too
            node.test = nodes.And(count_step, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        written = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if written >= BYTES_PER_STEP:
            self.writeline(f"environment.spend_steps({4 * written // BYTES_PER_STEP})", node)
        super().visit_Output(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("), context.eval_ctx.autoescape)")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._visit_counted(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_counted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._visit_counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._visit_counted(super().visit_Tuple, node, frame)
        else:  # {% for a, b in … %}
            super().visit_Tuple(node, frame)

    def _visit_counted(self, visit: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
        self.write("environment.count_value(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """The tag {% generation %} of transformers, which marks answers; here its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012  # declared like this in jinja

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The jinja environment of chat templates. `render` is thread-safe."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # no constant folding in the compiler, which would not be counted
            extensions=[_Generation, loopcontrols],
            finalize=pass_context(lambda context, value: self._count_printed(value, context.eval_ctx.autoescape)),
        )
        self._budget = _Budget()
        self.filters["tojson"] = _to_json
        allowed = {name: function for name, function in self.filters.items() if name not in REMOVED_FILTERS}
        self.filters = {name: self._bound_filter(name, function) for name, function in allowed.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # generates text of any length

    def render(self, template: Any, variables: dict[str, Any]) -> str:
        """The rendered text. Raises StepsExceeded, or any exception that the template's expressions raise."""
        budget = self._budget
        budget.steps, budget.next_clock_check = MAX_STEPS, MAX_STEPS - STEPS_PER_CLOCK_CHECK
        budget.deadline = time.thread_time() + MAX_SECONDS
        budget.messages = dict.fromkeys(map(id, variables.get("messages", ())))
        rendered: str = template.render(**variables)
        return rendered

    @property
    def steps_taken(self) -> int:
        """Steps of the latest rendering in this thread."""
        return MAX_STEPS - self._budget.steps

    # ---- counting ----------------------------------------------------------------------------------------------------
    @property
    def count_step(self) -> bool:
        """Spend one step. Returns True, because compiled loops use it as a condition."""
        self.spend_steps(1)
        return True

    def spend_steps(self, steps: int) -> None:
        budget = self._budget
        steps_left = budget.steps = budget.steps - steps
        if steps_left < 0:
            raise StepsExceeded(f"more than {MAX_STEPS:,} steps")
        if steps_left < budget.next_clock_check:
            budget.next_clock_check = steps_left - STEPS_PER_CLOCK_CHECK
            if time.thread_time() > budget.deadline:
                raise StepsExceeded(f"more than {MAX_SECONDS:g} seconds")

    def count_value(self, value: Any) -> Any:
        """Spend the steps for a value and return it; entries of an iterator are counted as they are yielded."""
        if isinstance(value, (str, bytes)):
            self.spend_steps(1 + self._check_size(_text_size(value)) // BYTES_PER_STEP)
        elif isinstance(value, (int, Undefined)) or value is None:
            self._check_bits(value.bit_length() if isinstance(value, int) else 0)
            self.spend_steps(1)
        elif isinstance(value, Iterator):
            return self._count_entries(value)
        else:
            self.spend_steps(1 + (0 if isinstance(value, range) else self._measure(value)[1] // ENTRIES_PER_STEP))
        return value

    def concatenate(self, values: tuple[Any, ...], escapes: bool) -> str:
        """The operator `~`."""
        self._count_printed(values, escapes)
        return (markup_join if escapes else str_join)(values)

    def _count_printed(self, value: Any, escapes: bool) -> Any:
        """Spend the steps for a value that jinja converts to text."""
        size = self._check_size(self._measure(value)[0] * (ESCAPE_GROWTH if escapes else 1))
        self.spend_steps(1 + size // BYTES_PER_STEP)
        return value

    def _count_entries(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend_steps(1)
            yield value

    # ---- operations --------------------------------------------------------------------------------------------------
    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, type):  # namespace and dict only store their arguments
            return self.count_value(super().call(context, function, *args, **kwargs))
        method = getattr(function, "__wrapped__", function)  # jinja wraps "x".format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            self._check_growth([owner, *args, *kwargs.values()], int(name not in SHORTENING))
        else:
            self.spend_steps(1)
        if name in FORMAT_METHODS:
            self._check_width(WIDE_BRACES, owner)
        return self.count_value(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            self._check_bits(bits if operator in ("*", "**") else 0)
        elif operator in ("*", "%"):
            self._check_growth([left, right])
            if operator == "%" and isinstance(left, (str, bytes)):
                self._check_width(WIDE_PERCENT, left)
        return self.count_value(super().call_binop(context, operator, left, right))

    def _bound_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter with counting. functools.wraps copies jinja's attributes (`pass_environment`)."""

        @functools.wraps(function)
        def bound_filter(*args: Any, **kwargs: Any) -> Any:
            if name in CONSTANT_TIME_FILTERS:
                self.spend_steps(1)
                return function(*args, **kwargs)
            if name not in LAZY_FILTERS:
                self._check_growth([*args, *kwargs.values()], FILTER_GROWTH.get(name, 1))
            if name == "format":
                self._check_width(WIDE_PERCENT, str(args[0]))
            if name == "round" and any(
                isinstance(x, int) and abs(x) > MAX_DIGITS for x in [*args[1:], *kwargs.values()]
            ):
                raise StepsExceeded(f"a number of more than {MAX_DIGITS} decimals")
            return self.count_value(function(*args, **kwargs))

        return bound_filter

    # ---- limits ------------------------------------------------------------------------------------------------------
    def _check_growth(self, values: list[Any], growth: int = 1) -> None:
        """Raises StepsExceeded if one operation, as "a" * 9 or "a" | center(9), may build more than MAX_SIZE bytes."""
        # It builds at most the product of two of the values, times `growth`.
        sizes = sorted(self._measure(value)[0] for value in values if not isinstance(value, int))
        numbers = [abs(value) for value in values if isinstance(value, int)]
        self._check_size(growth * max([1, *sizes]) * max([1, *sizes[-2:-1], *numbers]))
        self.spend_steps(sum(sizes) // BYTES_PER_STEP)

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
        """(bytes, entries) of a value with all nested values. Raises StepsExceeded above MAX_SIZE."""
        if isinstance(value, (str, bytes)):
            return self._check_size(_text_size(value)), 0
        size, entries, message_sizes = 0, 0, self._budget.messages
        pending: list[Any] = [value]
        while pending:
            item: Any = pending.pop()
            if isinstance(item, (str, bytes)):
                size += _text_size(item)
            elif id(item) in message_sizes and item is not value:
                measured = message_sizes[id(item)]
                if measured is None:
                    measured = message_sizes[id(item)] = self._measure(item)
                size, entries = size + measured[0], entries + 1
            elif isinstance(item, (list, tuple, set, frozenset, dict, MappingView, range)):
                size += ENTRY_SIZE * len(item) + (DICT_SIZE if isinstance(item, dict) else ENTRY_SIZE)
                entries += len(item)
                self._check_size(size)
                if not isinstance(item, range):
                    pending.extend(iter(item))  # type: ignore[arg-type]
                    pending.extend(item.values() if isinstance(item, dict) else ())
            elif isinstance(item, Namespace):
                size += ENTRY_SIZE
                pending.append(item._Namespace__attrs)
            self._check_size(size)
        return size, entries


def _text_size(text: str | bytes) -> int:
    """Bytes in memory, without the object header."""
    return max(len(text), sys.getsizeof(text) - 76)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form[:1000])  # the result may be 256 times as long


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
