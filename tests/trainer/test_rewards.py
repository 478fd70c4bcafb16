"""Promise: rewards are computed by stated rules, in both languages, for any text; a reward that fails counts as 0 and
names its row."""

import json
import math
import sys
from decimal import Decimal
from fractions import Fraction

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.prompt_data import PromptRow
from tests.helpers import one_line_error
from trainer.reward_text import agrees, chinese_number, final_answer, last_number
from trainer.rewards import WeightedReward, exact_reward, fits, format_reward, load_rewards, score, tool_reward

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}, "digits": {"type": ["integer", "null"]}},
            "required": ["expression"],
        },
    },
}
QUESTION = [{"role": "user", "content": "How much is 40+2?"}]
ROW = PromptRow(QUESTION, "42", "en", "train.jsonl", 7)
TOOL_ROW = PromptRow(
    [{"role": "system", "content": "", "tools": [CALCULATOR]}, *QUESTION], "42", "en", "train.jsonl", 8
)


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# ---- exact -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("42", "42"), ("The answer is 42.", "42"), ("40+2=42。", "42"), ("一共是42个苹果。", "42"), ("42.0", "42"),
        ("It is 1,234,567 in all", "1234567"), ("1234", "1,234"), ("答案是１，２３４。", "1234"), ("-3", "-3"),
        ("5-8=-3", "-3"), ("is −3", "-3"), ("20-3", "3"), ("x is $42.", "$42"), ("42%", "42 %"), ("3.50", "3.5"),
        ("Step 1: 40+2=42. So #### 42", "40+2=<<40+2=42>>42\n#### 42"), ("so \\boxed{42}", "The sum is \\boxed{42}."),
        ("答案是四十二。", "42"), ("一千零五", "1005"), ("三万五千", "35000"), ("二〇二六年", "2026"), ("负五", "-5"),
        ("The answer is (B).", "B"), ("B", "B"), ("(b) is wrong, the answer is B", "B"), ("选B", "B"),
        ("答案：C。", "C"),
        ("B. Paris", "B"), ("答案是 D，因为它最大。", "D"), ("\\boxed{A}", "A"), ("Ｃ", "C"), ("I choose A.", "A"),
        ("The capital of France is Paris.", "Paris"), ("paris", "Paris"), ("法国的首都是巴黎。", "巴黎"),
        ("“巴黎”", "巴黎"), ("It is New  York!", "New York"), ("\\boxed{\\frac{3}{4}}", "\\boxed{\\frac{3}{4}}"),
        ("x = 3/4", "3/4"), ("C++", "C++"),
        ("42", "It is 42."), ("It is 42", "40+2=42。"), ("一共42个。", "等于42"), ("at 3:30", "3:30"), ("an A4", "A4"),
    ],
)  # fmt: skip
def test_agreeing_answers(answer, reference):
    assert agrees(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("", "42"), ("I do not know.", "42"), ("420", "42"), ("4.2", "42"), ("42, or 43", "42"), ("1,42", "142"),
        ("3", "-3"), ("#### 41, not 42 #### 40", "#### 42"), ("四十三", "42"), ("二十四十", "60"), ("0.421", "0.42"),
        ("The answer is a dog", "A"), ("A dog barks", "A"), ("The answer is C", "B"), ("Because", "B"), ("ABCD", "B"),
        ("Paris is large", "Paris"), ("Comparis", "Paris"), ("北京", "巴黎"), ("", "巴黎"), ("3.4", "3/4"),
        ("x-1", "x+1"),
        ("anything", ""), ("", ""), ("anything", "#### "), ("C", "C++"),
        ("30", "3:30"), ("4", "A4"), ("7/4", "3/4"), ("42", "42 apples"), ("It is 43", "It is 42"),
    ],
)  # fmt: skip
def test_other_answers(answer, reference):
    assert not agrees(answer, reference)


def test_a_thought_is_not_part_of_the_answer():
    row = PromptRow(QUESTION, "42")
    assert exact_reward(row, "<think>\n40 and 2\n</think>\n\nIt is 42.") == 1
    assert exact_reward(row, "<think>\nIt is 42.\n</think>\n\nIt is 43.") == 0
    assert exact_reward(row, "<think>\nIt is 42.") == 0, "the thought does not end: there is no answer"
    assert exact_reward(row, "<think>\nIt is 42.\n</think>\n\n") == 0
    assert exact_reward(row, f"{call('calculator', expression='42')}\n") == 0, "a call is no answer"


def test_a_thought_after_a_result_is_not_part_of_the_answer_either():
    """A rollout with a tool has several turns: call, result (not part of the text), answer."""
    turns = "<think>\nuse it\n</think>\n\n" + call("calculator", expression="40+2")
    rewards = load_rewards("exact,format,tool")
    for end, exact, closed in (("It is 42.", 1, 1), ("<think>\nIt is 41.\n</think>\n\n42", 1, 1),
                               ("<think>\nIt is 42.\n</think>\n\n41", 0, 1), ("<think>\nIt is 42.", 0, 0)):  # fmt: skip
        parts = score(rewards, TOOL_ROW, turns + end).parts
        assert parts == {"exact": exact, "format": closed, "tool": 1}, end


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a #### 7", "7"),
        ("#### 1 #### 2", "2"),
        ("\\boxed{1} \\boxed{ {2} }", "{2}"),
        ("\\boxed{1", "\\boxed{1"),
        (" x ", "x"),
    ],
)
def test_the_final_answer_follows_its_marker(text, expected):
    assert final_answer(text) == expected


DIGITS, UNITS = "零一二三四五六七八九", ("", "十", "百", "千")


def in_chinese(number):
    """The Chinese numerals of 0..9999_9999, by the usual rule: 零 for a gap between digits."""
    if number >= 10_000:
        high, low = divmod(number, 10_000)
        return in_chinese(high) + "万" + ("零" if 0 < low < 1000 else "") + (in_chinese(low) if low else "")
    if number == 0:
        return "零"
    text, digits = "", [int(digit) for digit in str(number)]
    for place, digit in zip(range(len(digits) - 1, -1, -1), digits, strict=True):
        if digit:
            text += DIGITS[digit] + UNITS[place]
        elif not text.endswith("零") and any(digits[len(digits) - place :]):
            text += "零"
    return text


@given(st.integers(0, 99_999_999))
def test_chinese_numerals_are_read_as_they_are_written(number):
    assert chinese_number(in_chinese(number)) == number and last_number(f"答案是{in_chinese(number)}。") == number


@given(st.decimals(-(10**15), 10**15, allow_nan=False, places=3))
def test_a_number_agrees_with_itself_in_every_notation(number):
    plain, grouped = f"{number:f}", f"{number:,f}"
    full_width = grouped.translate({ord(c): ord(c) + 0xFEE0 for c in "0123456789.,-"})
    for answer in (plain, grouped, full_width, f"It is {grouped}.", f"等于{plain}。", f"{plain}000"):
        assert agrees(answer, plain) and last_number(f"{plain} ") == number
    assert not agrees(f"It is {number + 1:f}.", plain)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_numbers_agree_only_if_they_are_equal(one, other):
    assert agrees(f"{one:,}", str(other)) == (Fraction(one) == Fraction(other))


# ---- format ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>\nadd\n</think>\n\n42", 1), ("<think>加</think>四十二", 1), ("42", 0),
        ("<think>\nadd\n</think>\n\n", 0),
        ("<think>\n\n</think>\n\n42", 0), ("<think>\nadd 42", 0), ("add</think>42", 0),
        ("<think>\nadd\n</think>\n\n42<think>", 0),
        ("<think>\na\n</think>\n\n" + call("calculator", expression="1"), 1),
    ],
)  # fmt: skip
def test_format_wants_a_closed_thought_before_an_answer(answer, expected):
    assert format_reward(ROW, answer) == expected


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["sum"], "properties": {"sum": {"type": "integer"}}}))
    return path


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"sum": 42}', 1), ('<think>\nadd\n</think>\n\n{"sum": 42}', 1), ('```json\n{"sum": 42}\n```', 1),
        ('{"sum": "x"}', 0),
        ("42", 0), ('{"sum": 42', 0), ('<think>\n{"sum": 42}', 0), ('{"sum": 42} is it', 0), ('{"sum": NaN}', 0),
        ('{"sum": ' + "9" * 5000 + "}", 0), ("[" * 100_000, 0), ("``````", 0),
    ],
)  # fmt: skip
def test_an_answer_fits_a_json_schema(schema, answer, expected):
    (reward,) = load_rewards(f"format={schema}:0.5")
    assert score([reward], ROW, answer) == (0.5 * expected, {f"format={schema}": expected}) and not reward.failures


def test_a_wrong_schema_is_refused_and_downloads_nothing(tmp_path, monkeypatch):
    path = tmp_path / "schema.json"
    for content, problem in (("{", "Expecting"), ('{"type": "number of apples"}', "is not valid")):
        path.write_text(content)
        with one_line_error(f"--reward format={path}: not a JSON schema", problem):
            load_rewards(f"format={path}")
    with one_line_error("No such file"):
        load_rewards(f"format={tmp_path / 'nothing.json'}")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a download"))
    path.write_text('{"$ref": "http://example.invalid/x.json"}')
    (reward,) = load_rewards(f"format={path}")
    assert score([reward], ROW, "1").total == 0 and reward.num_failures == 1


def test_without_jsonschema_the_error_names_pip(schema, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with one_line_error("needs jsonschema: pip install jsonschema"):
        load_rewards(f"format={schema}")


# ---- tool, length ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (call("calculator", expression="40+2"), 1),
        ("Let me compute.\n" + call("calculator", expression="1", digits=3), 1),
        (call("calculator", expression="1", digits=None), 1), (call("calculator", expression=1), 0),
        (call("calculator"), 0),
        (call("calculator", expression="1", digits=True), 0), (call("calculator", expression="1", base=2), 0),
        (call("search", expression="1"), 0), ("42", 0), ("<tool_call>\n{broken\n</tool_call>", 0),
        (call("calculator", expression="1") + "\n" + call("search"), 0), (call("calculator", expression="1")[:-12], 0),
        ("<think>\n" + call("calculator", expression="1") + "\n</think>\n\n42", 0),
    ],
)  # fmt: skip
def test_a_tool_is_called_as_it_is_offered(answer, expected):
    assert tool_reward(TOOL_ROW, answer) == expected
    assert tool_reward(ROW, answer) == 0, "no tool is offered"


json_values = st.sampled_from([None, True, False, 0, 3, -1.5, "", "x", [], [1], {}, {"a": 1}])
types = st.sampled_from(["string", "integer", "number", "boolean", "array", "object", "null"])
types |= st.lists(types, min_size=1, max_size=2, unique=True)


@given(
    st.dictionaries(st.sampled_from("abc"), json_values), st.dictionaries(st.sampled_from("ab"), types), st.booleans()
)
def test_arguments_fit_as_jsonschema_judges(arguments, kinds, all_required):
    schema = {"type": "object", "properties": {name: {"type": kind} for name, kind in kinds.items()}}
    schema |= {"required": list(kinds) if all_required else [], "additionalProperties": False}
    assert fits(arguments, schema) == jsonschema.Draft202012Validator(schema).is_valid(arguments)


def test_length_falls_linearly():
    (reward,) = load_rewards("length=10")
    assert [score([reward], ROW, "字" * n).total for n in (0, 10, 15, 20, 50)] == pytest.approx([1, 1, 0.5, 0, 0])


# ---- sums, failures, the flag ----------------------------------------------------------------------------------------
def test_the_total_is_the_weighted_sum():
    rewards = load_rewards("exact, format:0.2,length=10:-0.5")
    answer = "<think>\nadd\n</think>\n\n42"
    assert score(rewards, ROW, answer) == (pytest.approx(1 + 0.2), {"exact": 1, "format": 1, "length=10": 0})
    assert score(rewards, ROW, "42").total == pytest.approx(1 - 0.5)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def words(prompt, answer, reference):\n    return float(len(answer.split())) if prompt and reference else 0\n"
        "def broken(prompt, answer, reference):\n    raise KeyError('x')\n"
        "def nan(prompt, answer, reference):\n    return float('nan')\n"
        "def nothing(prompt, answer, reference):\n    pass\n"
        "number = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n")
    (tmp_path / "odd_rewards.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path, "the current folder is searched for this import only"
    sys.modules.pop("my_rewards", None)


def test_a_function_of_the_current_folder_is_a_reward(module):
    rewards = load_rewards("exact,my_rewards:words:0.5")
    assert score(rewards, ROW, "it is 42") == (2.5, {"exact": 1, "my_rewards:words": 3})


def test_a_function_gets_the_prompt_the_answer_and_the_reference(module):
    seen = []
    load_rewards("my_rewards:words")
    sys.modules["my_rewards"].seen = lambda *texts: seen.append(texts) or True
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert score(load_rewards("my_rewards:seen"), PromptRow(messages, "42"), "<think>\n").total == 1
    assert seen == [("Be brief.\nHow much is 40+2?", "<think>\n", "42")]


def test_a_failing_reward_counts_0_names_its_row_once_and_is_counted(module, capsys):
    rewards = load_rewards("exact,my_rewards:broken,my_rewards:nan:2,my_rewards:nothing")
    other = PromptRow(QUESTION, "42", "en", "train.jsonl", 9)
    for row in (ROW, ROW, other):
        assert score(rewards, row, "42") == (1, {"exact": 1} | dict.fromkeys([r.name for r in rewards[1:]], 0))
    assert [reward.num_failures for reward in rewards] == [0, 3, 3, 3]
    assert rewards[1].failures == {"train.jsonl:7": 2, "train.jsonl:9": 1}
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "broken" in line] == [
        f"train.jsonl:{line}: the reward my_rewards:broken raised KeyError: 'x': it counts as 0" for line in (7, 9)
    ]
    assert sum("is nan: it counts as 0" in line for line in lines) == 2 and len(lines) == 6


def test_only_the_first_failing_rows_are_named(capsys):
    reward = WeightedReward("r", lambda row, answer: math.inf)
    for line in range(50):
        assert score([reward], PromptRow(QUESTION, "42", "en", "f", line), "").total == 0
    assert reward.num_failures == 50 and len(capsys.readouterr().err.splitlines()) == 10


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("", ["it is empty"]), (" , ", ["it is empty"]), ("exact,exact:2", ["exact is given twice"]),
        ("exakt", ["unknown reward exakt", "exact, format, tool, length"]), ("exact=3", ["unknown reward exact=3"]),
        ("format=", ["unknown reward format="]), ("exact:nan", ["the weight of exact is nan"]),
        ("length", ["length=N"]),
        ("length=0", ["length=N"]), ("length=-3", ["length=N"]), ("length=²", ["length=N"]),
        ("exact:", ["unknown reward exact:"]),
        ("my_rewards:missing", ["my_rewards has no function missing"]),
        ("my_rewards:number", ["has no function number"]),
        ("nowhere_at_all:f", ["cannot import nowhere_at_all", "put nowhere_at_all.py into the current folder"]),
        ("broken_rewards:f", ["cannot import broken_rewards", "no_such_package"]), ("odd_rewards:f", ["SyntaxError"]),
        (".my_rewards:f", ["cannot import .my_rewards"]), (":f", ["unknown reward :f"]),
    ],
)  # fmt: skip
def test_a_malformed_flag_is_one_clear_line(module, spec, parts):
    with one_line_error(f"--reward {spec.strip()}"[:9], *parts):
        load_rewards(spec)


# ---- any text --------------------------------------------------------------------------------------------------------
PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "####", "\\boxed{", "}", '{"name": "calculator", ',
          '"arguments": {"expression": "1"}}', "42", ",", ".", "-", "四十", "亿", "A", "答案是", "answer is ", "```",
          " ", "\n", "[", "\0", "\ud800", "１"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5) | st.text(st.characters(), max_size=3)).map("".join)


@settings(max_examples=300)
@given(texts, texts)
def test_no_built_in_reward_ever_fails(answer, reference):
    rewards = load_rewards("exact,format:2,tool,length=5")
    for messages in (QUESTION, TOOL_ROW.messages):
        total, parts = score(rewards, PromptRow(messages, reference, "en", "f", 1), answer)
        assert not any(reward.failures for reward in rewards)
        assert all(0 <= part <= 1 for part in parts.values()) and math.isfinite(total)
        assert all(parts[name] in (0, 1) for name in ("exact", "format", "tool"))


@given(texts)
def test_every_reference_agrees_with_itself_unless_it_is_empty(text):
    """An answer that repeats the reference is right, if the reference has a number, letter or word at all."""
    if any(character.isalnum() for character in final_answer(text)):
        assert agrees(text, text)


@pytest.mark.parametrize(
    "piece", ["1,", "1", "-", "####", "\\boxed{", "亿", "一亿", "```", " ", "A ", "答案是", "{", "\n"]
)
def test_long_texts_are_read_in_time(piece):
    text = piece * (200_000 // len(piece))
    assert agrees(text, "42") is False and isinstance(last_number(text), Decimal | None)
