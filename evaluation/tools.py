"""Tools that a chat model can call: plain functions with a schema. run_tool calls one and never raises.

    calculator     {"expression": "17 * 23"}                                     391
    convert_units  {"value": 5, "from_unit": "mile", "to_unit": "km"}            8.04672
    clock          {}                                                            2026-11-30 09:05 Monday 星期一
    date           {"date": "2026-11-30", "add_days": 30}                        2026-12-30 Wednesday 星期三
                   {"date": "2026-11-30", "to_date": "2026-12-25"}               25 days
    lookup         {"subject": "France", "relation": "capital"}                  Paris      with --lookup_file

The arguments are generated text: they are checked by the schema, their length is limited, and no tool runs them as
code, opens a file or a connection. The file of lookup has a line {"subject": …, "relation": …, "value": …} per fact.
Read next: tool_loop.py (call, result, answer), calculator.py, units.py.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from fractions import Fraction
from typing import Any

from common.errors import UserError, escape_controls
from common.flag_types import split_names
from evaluation.calculator import calculate, format_exact
from evaluation.qa_data import read_prompt_lines
from evaluation.units import convert
from model.answer_parts import ToolCall

MAX_ARGUMENT = 1000  # characters of a text
MAX_RESULT = 1000
_WEEKDAYS = (
    "Monday 星期一",
    "Tuesday 星期二",
    "Wednesday 星期三",
    "Thursday 星期四",
    "Friday 星期五",
    "Saturday 星期六",
    "Sunday 星期日",
)
_DATE = re.compile(r"(\d{1,4})[-/.年](\d{1,2})[-/.月](\d{1,2})日?", re.ASCII)
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


@dataclass(frozen=True)
class Tool:
    """`function` gets the arguments by name and returns the result, or raises ValueError with a message for the model.

    `schema`: OpenAI's tool object, {"type": "function", "function": {"name", "description", "parameters"}}.
    """

    function: Callable[..., str]
    schema: dict[str, Any]

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]


def run_tool(call: ToolCall, tools: Sequence[Tool]) -> str:
    """The result of a call as text of at most MAX_RESULT characters; "error: …" for a call that has none."""
    tool = next((tool for tool in tools if tool.name == call.name), None)
    try:
        if tool is None:
            raise ValueError(f"no tool {call.name[:60]}: the tools are {', '.join(tool.name for tool in tools)}")
        result = str(tool.function(**_check_arguments(call.arguments, tool.schema["function"]["parameters"])))
    except Exception as error:  # of any tool: the model reads it and the chat continues
        result = f"error: {error}"
    return escape_controls(result, keep="\n\t")[:MAX_RESULT]


def find_tools(names: str, lookup_file: str = "") -> list[Tool]:
    """The tools of a list such as "calculator,clock". Raises UserError for an unknown name."""
    tools = make_tools(lookup_file=lookup_file)
    found = dict.fromkeys(split_names(names))
    for name in found:
        if name == "lookup" and not lookup_file:
            raise UserError("--tools lookup needs --lookup_file FILE, with a line for each fact")
        if name not in tools:
            raise UserError(f"--tools {name}: unknown tool; choose from {', '.join(TOOL_NAMES)}")
    return [tools[name] for name in found]


def make_tools(now: Callable[[], datetime] = datetime.now, lookup_file: str = "") -> dict[str, Tool]:
    """All tools by name; `lookup` only with a file. Raises UserError if the file cannot be read."""
    text, number, integer = {"type": "string"}, {"type": "number"}, {"type": "integer"}
    tools = [
        _tool("calculator", "Compute an arithmetic expression.", calculate, {"expression": text}),
        _tool(
            "convert_units", "Convert a value to another unit.", _convert,
            {"value": number, "from_unit": text, "to_unit": text},
        ),
        _tool("clock", "The current date, time and weekday.", lambda: _show_time(now()), {}),
        _tool(
            "date", "The weekday of a date (YYYY-MM-DD), the days from it to to_date, or the date add_days later.",
            lambda **arguments: _calendar(now, **arguments), {"date": text, "to_date": text, "add_days": integer}, 1,
        ),
    ]  # fmt: skip
    if lookup_file:
        facts = _read_facts(lookup_file)
        look_up = lambda **arguments: _look_up(facts, **arguments)
        tools.append(
            _tool("lookup", "Look up a fact about a subject.", look_up, {"subject": text, "relation": text}, 1)
        )
    return {tool.name: tool for tool in tools}


def _tool(
    name: str, description: str, function: Callable[..., str], properties: dict[str, Any], required: int | None = None
) -> Tool:
    """The first `required` properties are required; all without it."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:required]}
    return Tool(
        function,
        {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}},
    )


def _check_arguments(arguments: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """The arguments; a number in place of a text becomes text, and the other way. Raises ValueError."""
    properties = parameters.get("properties", {})
    for name in parameters.get("required", ()):
        if name not in arguments:
            raise ValueError(f"{name} is missing")
    checked = {}
    for name, value in arguments.items():
        if name not in properties:
            raise ValueError(f"unknown argument {name[:60]}: the arguments are {', '.join(properties) or 'none'}")
        wanted = properties[name].get("type")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if wanted == "string" and is_number:
            value = str(value)
        elif wanted in ("number", "integer") and isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]{1,30}", value):
            value = int(value) if wanted == "integer" else float(value)
        if wanted in _TYPES and (
            not isinstance(value, _TYPES[wanted]) or isinstance(value, bool) > (wanted == "boolean")
        ):
            raise ValueError(f"{name} is no {wanted}")
        if isinstance(value, str) and len(value) > MAX_ARGUMENT:
            raise ValueError(f"{name} is longer than {MAX_ARGUMENT} characters")
        checked[name] = value
    return checked


def _convert(value: float, from_unit: str, to_unit: str) -> str:
    if not abs(value) < 1e100 or not math.isfinite(value):
        raise ValueError("value is too large")
    return format_exact(convert(Fraction(str(value)), from_unit, to_unit))


def _show_time(now: datetime) -> str:
    return f"{now:%Y-%m-%d %H:%M} {_weekday(now)}"


def _calendar(now: Callable[[], datetime], date: str, to_date: str = "", add_days: int = 0) -> str:
    day = _parse_date(date, now)
    if to_date:
        return f"{(_parse_date(to_date, now) - day).days} days"
    try:
        day += timedelta(add_days)
    except OverflowError:
        raise ValueError("the years of a date are 1 to 9999") from None
    return f"{day.isoformat()} {_weekday(day)}"


def _parse_date(text: str, now: Callable[[], datetime]) -> date:
    text = unicodedata.normalize("NFKC", text).strip()
    if text.lower() in ("today", "今天"):
        return now().date()
    found = _DATE.fullmatch(text)
    if not found:
        raise ValueError(f"{text[:60]} is no date: write YYYY-MM-DD")
    return date(*map(int, found.groups()))  # raises ValueError for 2023-02-29


def _weekday(day: date) -> str:
    return _WEEKDAYS[day.weekday()]


FactTable = dict[str, dict[str, list[str]]]  # values by subject and relation, in lower case


def _read_facts(path: str) -> FactTable:
    facts: FactTable = {}
    for where, line in read_prompt_lines(path):
        try:
            row = json.loads(line)
            subject, relation, value = (row[name].strip() for name in ("subject", "relation", "value"))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise UserError(f'{where}: expected {{"subject": "...", "relation": "...", "value": "..."}}') from None
        facts.setdefault(subject.casefold(), {}).setdefault(relation.casefold(), []).append(value)
    return facts


def _look_up(facts: FactTable, subject: str, relation: str = "") -> str:
    known = facts.get(subject.strip().casefold())
    if not known:
        raise ValueError(f"nothing about {subject[:60]}")
    if not relation.strip():
        return "\n".join(f"{name}: {', '.join(values)}" for name, values in known.items())
    values = known.get(relation.strip().casefold())
    if not values:
        raise ValueError(f"nothing about the {relation[:60]} of {subject[:60]}: known are {', '.join(known)}")
    return ", ".join(values)


TOOLS = make_tools()
TOOL_NAMES = (*TOOLS, "lookup")
