"""Rewards that a program computes from an answer, and their weighted sum.

    reward(prompt, answer, reference) -> float           a plain function of three texts; `answer` with its markers

    --reward exact                                       1 if the answer agrees with the reference, else 0
    --reward exact,format:0.2,length=200:0.1             a weighted sum; a weight follows the last colon (default: 1)
    --reward format=schema.json                          1 if the answer is JSON that fits the JSON schema
    --reward exact,my_module:my_function:0.5             a function of a module in the current folder

    built in                                             (a thought is not part of the answer)
    exact      its last number, option letter or words are the reference: reward_text.py
    format     a closed thought, <think>…</think>, before an answer
    tool       the answer calls tools that the prompt offers, with the arguments that they require
    length=N   1 up to N characters, then linear down to 0 at 2 N

Read next: reward_text.py (numbers, letters and words), ../corpus/prompt_data.py (the prompts), grpo.py (the loss).
"""

import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError, import_package
from corpus.chats import chat_text
from corpus.prompt_data import PromptRow
from model.answer_parts import AnswerParts, parse_answer
from trainer.reward_text import agrees

Reward = Callable[[str, str, str], float]  # of the prompt's text, the generated text and the reference
RowReward = Callable[[PromptRow, str], float]
MAX_NAMED_ROWS = 10  # of each reward that are named when it fails

JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip


class Score(NamedTuple):
    """The reward of one answer: the weighted sum, and each reward by name, without its weight."""

    total: float
    parts: dict[str, float]


@dataclass(frozen=True)
class WeightedReward:
    """A reward of --reward. `failures`: row ("file:line") -> how often the reward failed on its answers."""

    name: str
    function: RowReward
    weight: float = 1.0
    failures: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def num_failures(self) -> int:
        """Answers for which the reward raised an error or returned no finite number: they counted as 0."""
        return self.failures.total()


def score(rewards: list[WeightedReward], row: PromptRow, answer: str) -> Score:
    """The rewards of a generated answer, with its markers, to the prompt of `row`.

    A reward that raises an error or returns no finite number counts as 0; the first of each row is printed.
    """
    parts = {reward.name: _value(reward, row, answer) for reward in rewards}
    return Score(sum(reward.weight * parts[reward.name] for reward in rewards), parts)


def _value(reward: WeightedReward, row: PromptRow, answer: str) -> float:
    try:
        value = float(reward.function(row, answer))
        problem = "" if math.isfinite(value) else f"is {value}"
    except Exception as error:  # code of the user: training continues without this answer
        value, problem = 0.0, f"raised {type(error).__name__}: {error}"
    if not problem:
        return value
    where = f"{row.file}:{row.line}"
    if where not in reward.failures and len(reward.failures) < MAX_NAMED_ROWS:
        print(f"{where}: the reward {reward.name} {problem}: it counts as 0", file=sys.stderr)
    reward.failures[where] += 1
    return 0.0


# ---- the flag --------------------------------------------------------------------------------------------------------
def load_rewards(spec: str) -> list[WeightedReward]:
    """The rewards of --reward, "exact,format:0.2,my_module:my_function:0.5". Imports the modules that it names.

    Raises UserError for a malformed or unknown reward, and for a module or schema that cannot be read.
    """
    rewards = [_load_reward(part.strip(), spec) for part in spec.split(",") if part.strip()]
    names = [reward.name for reward in rewards]
    if not rewards or len(set(names)) < len(names):
        problem = f"{max(names, key=names.count)} is given twice" if rewards else "it is empty"
        raise UserError(f"--reward {spec}: {problem}: write NAME:WEIGHT,…, each reward once")
    return rewards


def _load_reward(text: str, spec: str) -> WeightedReward:
    name, colon, end = text.rpartition(":")
    try:
        weight = float(end) if colon else 1.0
    except ValueError:
        name, weight = "", 1.0  # the text ends with the function of a module, or with a file name
    name = name or text
    if not math.isfinite(weight):
        raise UserError(f"--reward {spec}: the weight of {name} is {weight}: give a finite number")
    kind, equals, argument = name.partition("=")
    if kind in BUILT_IN and (not equals or (argument and kind in WITH_ARGUMENT)):
        return WeightedReward(name, BUILT_IN[kind](argument), weight)
    module, colon, function = name.partition(":")
    if not colon or not module or not function or equals:
        known = ", ".join(BUILT_IN)
        raise UserError(f"--reward {spec}: unknown reward {name}: write one of {known} or module:function")
    return WeightedReward(name, _import_reward(module, function), weight)


def _import_reward(module: str, function: str) -> RowReward:
    """The plain function `function` of a module in the current folder, as a reward of a row."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # the module is the user's code, which may raise anything
        raise UserError(
            f"--reward {module}:{function}: cannot import {module} ({type(error).__name__}: {error}): put {module}.py "
            "into the current folder"
        ) from None
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise UserError(
            f"--reward {module}:{function}: {module} has no function {function}: define it or correct the name"
        )
    reward: Reward = found
    return lambda row, answer: reward(chat_text(row.messages), answer, row.reference)


# ---- built in --------------------------------------------------------------------------------------------------------
def answer_parts(answer: str) -> AnswerParts:
    """The parts of a generated text of one or several turns: after the result of a call the model may think again."""
    parts = parse_answer(answer)
    _, marker, last_turn = parts.content.rpartition("<think>")
    if not parts.tool_calls or not marker:
        return parts
    last = parse_answer(marker + last_turn)
    return AnswerParts(last.reasoning, last.content, parts.tool_calls)


def exact_reward(row: PromptRow, answer: str) -> float:
    """1 if the answer, without its thought, agrees with the reference; else 0."""
    return float(agrees(answer_parts(answer).content, row.reference))


def format_reward(row: PromptRow, answer: str) -> float:
    """1 for a thought with its end and an answer or a call after it; else 0."""
    thought, content, calls = answer_parts(answer)
    ends = bool(content.strip()) or (bool(calls) and answer.rstrip().endswith("</tool_call>"))
    is_clean = not any(marker in content for marker in ("<think>", "</think>"))
    return float(bool(thought and thought.strip()) and ends and is_clean)


def tool_reward(row: PromptRow, answer: str) -> float:
    """1 if the answer calls tools, and each call is one of an offered tool with fitting arguments; else 0."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in row.tools}
    calls = answer_parts(answer).tool_calls
    return float(bool(calls) and all(name in schemas and fits(given, schemas[name]) for name, given in calls))


def fits(arguments: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Whether a call has the required arguments and no unknown ones, each of the type in the schema of the tool."""
    types = schema.get("properties")
    if types is None:
        return True
    return set(schema.get("required") or ()) <= arguments.keys() <= types.keys() and all(
        _has_type(value, types[name].get("type")) for name, value in arguments.items()
    )


def _has_type(value: Any, names: Any) -> bool:
    """Whether a JSON value has a type of JSON schema, or one of a list of types. Without a type every value fits."""
    for name in names if isinstance(names, list) else [names]:
        types = JSON_TYPES.get(name)
        if types is None or (isinstance(value, types) and isinstance(value, bool) == (name == "boolean")):
            return True
    return False


def length_reward(argument: str) -> RowReward:
    """1 for a generated text of at most `argument` characters, then linear down to 0 at twice as many."""
    if not argument.isdecimal() or not int(argument):
        raise UserError(f"--reward length={argument}: write length=N, N characters")
    limit = int(argument)
    return lambda row, answer: min(1.0, max(0.0, 2 - len(answer) / limit))


def schema_reward(path: str) -> RowReward:
    """1 if the answer, without its thought, is JSON that fits the JSON schema in the file `path`; else 0."""
    advice = f"--reward format={path} needs jsonschema: pip install jsonschema"
    jsonschema, referencing = (import_package(name, advice) for name in ("jsonschema", "referencing"))
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except (OSError, ValueError, RecursionError, jsonschema.exceptions.SchemaError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "message", None) or error
        raise UserError(f"--reward format={path}: not a JSON schema ({reason}): correct the file") from None
    validator = kind(schema, registry=referencing.Registry())  # an empty registry: a reference downloads nothing

    def reward(row: PromptRow, answer: str) -> float:
        try:
            value = json.loads(_without_fence(answer_parts(answer).content), parse_constant=_refuse_constant)
            return float(validator.is_valid(value))
        except (ValueError, RecursionError):
            return 0.0

    return reward


def _without_fence(text: str) -> str:
    """The text of an answer that is one block of code, ```json … ```; any other answer unchanged."""
    text = text.strip()
    is_block = len(text) > 6 and text.startswith("```") and text.endswith("```")
    return text[3:-3].removeprefix("json") if is_block else text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


BUILT_IN: dict[str, Callable[[str], RowReward]] = {
    "exact": lambda _: exact_reward,
    "format": lambda path: schema_reward(path) if path else format_reward,
    "tool": lambda _: tool_reward,
    "length": length_reward,
}
WITH_ARGUMENT = ("format", "length")
