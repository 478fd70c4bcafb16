"""The tools that a chat model can call.

Promises: golden results, exact where a decimal is; both languages; a call never raises, never runs generated text as
code, and takes less than a second; its result is short and printable; a wrong argument is an error that the model can
read; --tools and --lookup_file are checked with one line.
"""

import datetime
import json
import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.calculator import calculate
from evaluation.tools import MAX_RESULT, TOOL_NAMES, TOOLS, Tool, find_tools, make_tools, run_tool
from evaluation.units import find_unit
from model.answer_parts import ToolCall, parse_answer
from tests.helpers import one_line_error

MONDAY = datetime.datetime(2026, 11, 30, 9, 5)


@pytest.fixture(scope="module")
def facts_file(tmp_path_factory):
    rows = [
        ("France", "capital", "Paris"),
        ("法国", "首都", "巴黎"),
        ("France", "color", "blue"),
        ("France", "Color", "red"),
    ]
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    lines = (json.dumps(dict(zip(("subject", "relation", "value"), row, strict=True))) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def call(facts_file):
    tools = list(make_tools(lambda: MONDAY, facts_file).values())
    return lambda name, **arguments: run_tool(ToolCall(name, arguments), tools)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("17 * 23", "391"),
        ("0.1 + 0.2", "0.3"),
        ("6/3", "2"),
        ("1/3", "0.333333333333"),
        ("2/3*3", "2"),
        ("7 // 2 - 7 % 4", "0"),
        ("-7 // 2", "-4"),
        ("2**10", "1024"),
        ("2^10", "1024"),
        ("-2**2", "-4"),
        ("2**-1", "0.5"),
        ("2**100", "1267650600228229401496703205376"),
        ("9**0.5 + 8**(1/3)", "5"),
        ("sqrt(2)", "1.41421356237"),
        ("sqrt(2)*sqrt(2)", "2"),
        ("abs(-3) + min(4, 2) + max(1, 5, 3)", "10"),
        ("round(2.5) + round(-2.675, 2)", "0.32"),
        ("2*pi", "6.28318530718"),
        ("（１＋２）×４÷５", "2.4"),
        ("10 − 4 – 3 — 2", "1"),
        ("3² + 2³", "17"),
        ("1,234,567 + 1", "1234568"),
        ("max(1,234)", "234"),
        ("200 * 15%", "30"),
        ("6 / 50%", "12"),
        ("7 % 3", "1"),
        ("1e3 + 2.5E-1", "1000.25"),
        ("3 + 5 = ?", "8"),
        ("10**40", "1e+40"),
        ("1/10**8", "1e-8"),
        ("0**0", "1"),
    ],
)
def test_golden_sums(call, expression, value):
    assert call("calculator", expression=expression) == value


NO_SUMS = ["", "=", "1/0", "1%0", "0**-1", "0**-0.5", "sqrt(-1)", "(-8)**(1/3)", "9**9**9", "9**9**9**9", "2**99999"]
NO_SUMS += ["1e999*1e999", "1e9999999999", "1" * 201, "(" * 99, "-" * 150, "round(1, 1000)", "min()", "sqrt(1, 2)"]
NO_SUMS += ["sqrt(*[1])", "round(ndigits=1)", "__import__('os').system('id')", "().__class__", "lambda: 0", "x := 1"]
NO_SUMS += ["[1 for x in (1, 2)]", "1 if 1 else 2", "a", "1 < 2", "1 and 2", "True", "'a' * 9", "1j", "0x10", "1_000"]
NO_SUMS += ["(1, 2)", "pi()", "sqrt", "1 @ 2", "1 | 2", "~1", "\0", "print(1)", "pow(2, 3)", "1; 2", "1 # 2", "{1}"]
NO_SUMS += ["f'{1}'", "...", "½", "¹⁰", "Ⅷ", "٣+٤", "1\\\n2", "exec('1')"]


@pytest.mark.parametrize("expression", NO_SUMS)
def test_anything_else_is_no_sum(call, expression):
    assert call("calculator", expression=expression).startswith("error: ")


def joined(parts):
    (left, a), sign, (right, b) = parts
    return f"({left}{sign}{right})", {"+": a + b, "-": a - b, "*": a * b}[sign]


numbers = st.integers(0, 999).map(lambda number: (str(number), float(number)))


@given(st.recursive(numbers, lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(joined), max_leaves=8))
def test_random_sums_equal_those_of_floats(sum_and_value):
    text, value = sum_and_value
    assert math.isclose(float(calculate(text)), value, rel_tol=1e-9, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("value", "from_unit", "to_unit", "result"),
    [
        (5, "miles", "km", "8.04672"),
        (1, "Inch", "cm", "2.54"),
        (6, "feet", "m", "1.8288"),
        (1, "nautical mile", "米", "1852"),
        (3, "里", "公里", "1.5"),
        (1, "丈", "尺", "10"),
        (3, "斤", "克", "1500"),
        (1, "lb", "oz", "16"),
        (1, "stone", "lb", "14"),
        (2, "两", "g", "100"),
        (1, "gallon", "cups", "16"),
        (1, "us gallon", "fl oz", "128"),
        (1, "tbsp", "tsp", "3"),
        (2, "升", "毫升", "2000"),
        (15, "亩", "公顷", "1"),
        (1, "km²", "平方米", "1000000"),
        (1, "square mile", "acres", "640"),
        (36, "km/h", "m/s", "10"),
        (1, "节", "公里/小时", "1.852"),
        (60, "mph", "km/h", "96.56064"),
        (1, "week", "hours", "168"),
        (90, "分钟", "小时", "1.5"),
        (100, "℃", "°F", "212"),
        (-40, "fahrenheit", "celsius", "-40"),
        (0, "摄氏度", "K", "273.15"),
        (0.1, "m", "cm", "10"),
        ("2.5", "ｋｍ", "meters", "2500"),
    ],
)
def test_golden_conversions(call, value, from_unit, to_unit, result):
    assert call("convert_units", value=value, from_unit=from_unit, to_unit=to_unit) == result


def test_units_of_different_quantities_and_unknown_ones_are_errors(call):
    wrong = call("convert_units", value=1, from_unit="kg", to_unit="km")
    assert wrong == "error: kg is a unit of mass, km of length"
    assert call("convert_units", value=1, from_unit="parsec", to_unit="km") == "error: unknown unit parsec"
    assert call("convert_units", value=10**2000, from_unit="m", to_unit="km") == "error: value is too large"


def test_every_quantity_of_the_table_can_be_converted():
    pairs = ("m cm", "kg g", "l ml", "m2 cm2", "m/s mph", "s min", "k c")
    quantities = [{find_unit(name).quantity for name in pair.split()} for pair in pairs]
    assert [len(each) for each in quantities] == [1] * 7 and len(set.union(*quantities)) == 7


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"date": "2026-11-30"}, "2026-11-30 Monday 星期一"),
        ({"date": "2024年2月29日"}, "2024-02-29 Thursday 星期四"),
        ({"date": "2000/1/1"}, "2000-01-01 Saturday 星期六"),
        ({"date": "today", "add_days": 30}, "2026-12-30 Wednesday 星期三"),
        ({"date": "今天", "add_days": "-30"}, "2026-10-31 Saturday 星期六"),
        ({"date": "2026-11-30", "to_date": "2026-12-25"}, "25 days"),
        ({"date": "2024-03-01", "to_date": "2024-02-01"}, "-29 days"),
        ({"date": "2023-02-29"}, "error: day is out of range for month"),
        ({"date": "0000-01-01"}, "error: year 0 is out of range"),
        ({"date": "tomorrow"}, "error: tomorrow is no date: write YYYY-MM-DD"),
        ({"date": "2026-11-30", "add_days": 10**9}, "error: the years of a date are 1 to 9999"),
        ({"date": "2026-11-30", "add_days": 10**99}, "error: the years of a date are 1 to 9999"),
    ],
)
def test_golden_dates(call, arguments, result):
    assert call("date", **arguments).startswith(result)


def test_the_clock_shows_the_time_and_weekday(call):
    assert call("clock") == "2026-11-30 09:05 Monday 星期一"
    assert call("clock", zone="UTC") == "error: unknown argument zone: the arguments are none"
    now = datetime.datetime.now()
    shown = datetime.datetime.strptime(run_tool(ToolCall("clock", {}), [TOOLS["clock"]])[:16], "%Y-%m-%d %H:%M")
    assert abs((now - shown).total_seconds()) < 120


def test_lookup_reads_a_file_of_facts(call, tmp_path):
    assert call("lookup", subject="France", relation="capital") == "Paris"
    assert call("lookup", subject=" france ", relation="COLOR") == "blue, red"
    assert call("lookup", subject="法国") == "首都: 巴黎"
    assert call("lookup", subject="Atlantis").startswith("error: nothing about Atlantis")
    assert (
        call("lookup", subject="France", relation="x")
        == "error: nothing about the x of France: known are capital, color"
    )
    (tmp_path / "bad.jsonl").write_text('{"subject": "a", "relation": 1, "value": "b"}', encoding="utf-8")
    with one_line_error("bad.jsonl:1", "relation"):
        make_tools(lookup_file=str(tmp_path / "bad.jsonl"))
    with one_line_error("cannot read", "missing.jsonl"):
        make_tools(lookup_file=str(tmp_path / "missing.jsonl"))


def test_arguments_are_checked_by_the_schema(call):
    assert call("calculator") == "error: expression is missing"
    assert call("calculator", expression=7) == "7"
    assert call("calculator", expression=None) == "error: expression is no string"
    assert call("calculator", expression=True) == "error: expression is no string"
    assert call("calculator", expression="1+" * 501) == "error: expression is longer than 1000 characters"
    assert call("calculator", expression="1", x=1) == "error: unknown argument x: the arguments are expression"
    assert call("date", date="today", add_days=1.5) == "error: add_days is no integer"
    assert call("convert_units", value=True, from_unit="m", to_unit="m") == "error: value is no number"
    assert call("clocks").startswith(
        "error: no tool clocks: the tools are calculator, convert_units, clock, date, lookup"
    )


def test_find_tools_reads_a_list_of_names(facts_file):
    assert [tool.name for tool in find_tools("clock，calculator clock")] == ["clock", "calculator"]
    assert find_tools("") == [] and [tool.name for tool in find_tools("lookup", facts_file)] == ["lookup"]
    with one_line_error("--tools abacus: unknown tool", ", ".join(TOOL_NAMES)):
        find_tools("abacus")
    with one_line_error("--tools lookup needs --lookup_file"):
        find_tools("lookup")


def test_schemas_are_valid_json_schemas_of_openais_form():
    jsonschema = pytest.importorskip("jsonschema")
    for name, tool in TOOLS.items():
        function = tool.schema["function"]
        assert tool.schema["type"] == "function" and function["name"] == name == tool.name and function["description"]
        jsonschema.Draft202012Validator.check_schema(function["parameters"])
        assert set(function["parameters"]["required"]) <= function["parameters"]["properties"].keys()
        assert json.loads(json.dumps(tool.schema)) == tool.schema


def test_the_result_of_any_tool_is_short_and_printable():
    parameters = {"type": "object", "properties": {}}
    schema = {"type": "function", "function": {"name": "own", "description": "", "parameters": parameters}}

    def fail():
        raise KeyError("no\x1b[2Jkey")

    assert run_tool(ToolCall("own", {}), [Tool(fail, schema)]) == r"error: 'no\x1b[2Jkey'"
    assert run_tool(ToolCall("own", {}), [Tool(lambda: "\x1b" + "a" * 9999, schema)]).startswith(r"\x1ba")
    assert len(run_tool(ToolCall("own", {}), [Tool(lambda: "a" * 9999, schema)])) == MAX_RESULT
    assert run_tool(ToolCall("own", {}), [Tool(lambda: 7, schema)]) == "7"


CODE = [
    "__import__('os').system('touch /tmp/x')",
    "eval('1')",
    "open('/etc/passwd').read()",
    "().__class__.__bases__[0]",
]
HOSTILE = [
    *CODE,
    "9**9**9",
    "9**9**9**9",
    "2**2**2**2**2**2",
    "1/3**999",
    "1.0000001**99999.5",
    "sqrt(" * 40 + "2" + ")" * 40,
]
HOSTILE += [
    "(" * 150 + "1" + ")" * 150,
    "-" * 190 + "1",
    "(" * 10**5,
    "1" * 10**5,
    "9" * 190 + "**9",
    "\0",
    "\x1b[2J",
    "\u202e1",
]
HOSTILE += [
    "1e308*1e308",
    "1e999999999",
    "0.1" * 60,
    "%" * 200,
    "1," * 100,
    "1%" * 100,
    "=" * 10**5,
    " " * 10**5,
    "²" * 200,
]
HOSTILE += ["2026-02-30", "9999-12-31", "𝟙", "km", "℃", "", "\ud800", "NaN", "Infinity", "max(" + "9**999," * 18 + "1)"]
HOSTILE_NUMBERS = [0, -1, 10**4000, -(10**9), 1e308, -1e-308, float("inf"), float("nan"), 2**63, 0.1, True, None]


def hostile_value(rng: random.Random, depth: int = 0):
    kind = rng.random()
    if kind < 0.6 or depth > 3:
        return rng.choice(HOSTILE)
    if kind < 0.75:
        return rng.choice(HOSTILE_NUMBERS)
    if kind < 0.85:
        return "".join(rng.choice("0123456789.+-*/%()^, episqrtmax") for _ in range(rng.randrange(200)))
    children = [hostile_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return children if kind < 0.92 else {str(i): child for i, child in enumerate(children)}


def test_two_thousand_hostile_calls_end_in_time_without_an_exception(facts_file):
    tools, rng = list(make_tools(lookup_file=facts_file).values()), random.Random(0)
    slowest, outcomes = 0.0, {"error": 0, "result": 0}
    for number in range(2000):
        tool = tools[number % len(tools)]
        names = [*tool.schema["function"]["parameters"]["properties"], "__class__", "self", ""]
        count = len(names) - 3 if rng.random() < 0.8 else rng.randrange(len(names) + 1)
        arguments = {name: hostile_value(rng) for name in names[:count]}
        name = tool.name if rng.random() < 0.95 else rng.choice(HOSTILE)
        began = time.process_time()
        result = run_tool(ToolCall(name, arguments), tools)
        slowest = max(slowest, time.process_time() - began)
        outcomes["error" if result.startswith("error: ") else "result"] += 1
        assert len(result) <= MAX_RESULT and result.isprintable(), (name, arguments)
        result.encode()
    assert slowest < 1 and min(outcomes.values()) > 200, (slowest, outcomes)


def test_two_thousand_hostile_answers_are_read_and_run_in_time(facts_file):
    tools, rng = list(make_tools(lookup_file=facts_file).values()), random.Random(1)
    blocks = [
        '{"name": "calculator", "arguments": ',
        '{"name": ',
        "[" * 10**5,
        '{"a":' * 10**5,
        "9" * 10**5,
        "NaN",
        "}",
        "\0",
        '"',
    ]
    blocks += [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "\\ud800",
        "1e999",
        '{"expression": "9**9**9"}}',
        "\n",
        "import os",
    ]
    slowest = 0.0
    for _ in range(2000):
        text = "<tool_call>" + "".join(rng.choice(blocks) for _ in range(rng.randrange(6))) + "</tool_call>"
        began = time.process_time()
        for each in parse_answer(text).tool_calls:
            run_tool(each, tools).encode()
        slowest = max(slowest, time.process_time() - began)
    assert slowest < 1, slowest
