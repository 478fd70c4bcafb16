"""demo.py in Chinese: every printed line has a translation with the same values, and no translation is unused."""

import ast
import string
from pathlib import Path

import pytest

import demo
from demo_world import report, rl_report, timing
from demo_world.rl_steps import rl_steps
from demo_world.texts import CHINESE_LINES, DemoTexts

FILES = ("demo.py", "demo_world/report.py", "demo_world/rl_report.py", "demo_world/timing.py")


def fields(line):
    return {name for _, name, _, _ in string.Formatter().parse(line) if name}


def parsed():
    return [ast.parse((demo.PROJECT_FOLDER / file).read_text(encoding="utf-8")) for file in FILES]


def literal_lines():
    """The string literals of the files that print: some lines reach `say` by a variable."""
    nodes = (node for tree in parsed() for node in ast.walk(tree))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def printed_lines():
    """The literal first arguments of `say`, and the lines of the tables that are printed by it."""
    said = set()
    for node in (node for tree in parsed() for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say":
            said |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    steps = demo.make_steps(Path("out"), 0, 0) + rl_steps(Path("out"), 256, 0, 0)
    tables = (report.COLUMNS.values(), report.COLUMNS, report.KINDS.values(), rl_report.MOMENTS.values())
    titles = {step.title for step in steps}
    return (
        said
        | titles
        | {line for table in (*tables, rl_report.MEANINGS.values()) for line in table}
        | {timing.SLOW_FAST, timing.SLOW_WHOLE}
    )


def test_every_printed_line_has_a_chinese_one():
    assert printed_lines() - CHINESE_LINES.keys() == set()


def test_no_chinese_line_is_unused():
    assert CHINESE_LINES.keys() - printed_lines() - literal_lines() == set()


@pytest.mark.parametrize("line", CHINESE_LINES)
def test_a_translation_has_the_same_values(line):
    assert fields(line) == fields(CHINESE_LINES[line])


def test_english_lines_stay_and_chinese_ones_get_their_values():
    line = "{title} ({time} to go)"
    assert DemoTexts("en")(line, title="[1/2] a", time="b") == "[1/2] a (b to go)"
    assert DemoTexts("zh")(line, title="[1/2] a", time="b") == "[1/2] a（还需b）"
