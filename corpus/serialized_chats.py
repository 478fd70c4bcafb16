"""Parses chats that are stored in one text: with role markers, as JSON, as a Python literal or as numpy prints lists.

    Human: … Assistant: …, 用户：… 助手：…, ### Human: … ### Assistant: …     BELLE, HH-RLHF, Guanaco
    ### Instruction: … ### Input: … ### Response: …                           Alpaca's template
    <|im_start|>user … <|im_end|>, <|user|> …, <start_of_turn>user …          ChatML, Zephyr, Gemma
    <|start_header_id|>user<|end_header_id|> …, [INST] … [/INST] …            Llama 3, Llama 2
    [{"role": "user", …}, …], [{'role': 'user', …}, …]                        cells of csv and parquet files

    parse_marked_text(text)           the messages; [] if the text does not begin with a role marker
    edit_marked_text(text, edit)      the text with the content of every turn replaced by edit(content)
    parse_literal(text)               the value of JSON or Python text; None for other text

Text is parsed and never evaluated, so a data file cannot run code.

Read next: chats.py (turns -> messages).
"""

import ast
import json
import re
import warnings
from collections.abc import Callable
from typing import Any

from corpus.layouts import CONTENT_KEYS, ROLE_KEYS, ROLE_NAMES, TOOL_KEYS
from corpus.stats import BadRow
from model.chat_template import Message

_SPEAKERS = "Human|HUMAN|User|USER|Assistant|ASSISTANT|System|SYSTEM|FUNCTION RESPONSE|用户|人类|助手|系统"
_STYLES = tuple((re.compile(rf"\s*(?:{begin})"), re.compile(marker)) for begin, marker in (
    # (start of a text of this style, its role marker)
    (r"(?:Human|HUMAN|User|USER|System|SYSTEM|用户|人类|系统)[ \t]*[:：]", rf"(?:^|\n)[ \t]*({_SPEAKERS})[ \t]*[:：]"),
    (rf"###[ \t]*(?:{_SPEAKERS})[ \t]*[:：]", rf"\n?###[ \t]*({_SPEAKERS})[ \t]*[:：]"),
    (r"###[ \t]*Instruction:|Below is an instruction", r"(?:^|\n)[ \t]*###[ \t]*(Instruction|Input|Response):"),
    (r"<\|im_start\|>", r"<\|im_start\|>(\w+)\n"),
    (rf"<\|(?i:{_SPEAKERS})\|>", rf"<\|((?i:{_SPEAKERS}))\|>[ \t]*[:：]?"),
    (r"(?:<bos>)?<start_of_turn>", r"(?:<bos>)?<start_of_turn>(\w+)\n"),
    (r"(?:<\|begin_of_text\|>)?<\|start_header_id\|>",
     r"(?:<\|begin_of_text\|>)?<\|start_header_id\|>(\w+)<\|end_header_id\|>"),
    (r"(?:<s>)?[ \t]*\[INST\]", r"(?:<s>)?[ \t]*\[(/?INST)\]"),
))  # fmt: skip
_FIRST_LETTER = re.compile(r"\s*(?:[HUS#<\[用人系]|Below)")  # fast rejection of most other text
_END_MARKERS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end|>", "</s>")
_LLAMA_SYSTEM = re.compile(r"<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)
_SPEAKER_ROLES = {**ROLE_NAMES, "instruction": "user", "input": "user", "response": "assistant", "inst": "user",
          "/inst": "assistant", "function response": "tool"}  # fmt: skip


def make_message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def parse_marked_text(text: str) -> list[Message]:
    """Returns the messages of marked text; [] if it does not begin with a marker or has no assistant message.

    A last assistant marker without text is not a message: in BELLE's multi-turn dataset it follows the question.
    """
    marker = _find_marker(text)
    if marker is None:
        return []
    before, *pieces = marker.split(text)
    turns = [make_message("system", before.strip())] if before.strip() else []
    for name, piece in zip(pieces[::2], pieces[1::2], strict=True):
        role, words = _SPEAKER_ROLES.get(name.lower(), ""), _turn_text(piece)
        system = _LLAMA_SYSTEM.match(words) if name == "INST" else None
        if system:
            turns.append(make_message("system", system[1].strip()))
            words = system[2].strip()
        if name == "Input" and turns and turns[-1]["role"] == "user":
            turns[-1]["content"] += "\n" + words
        else:
            turns.append(make_message(role, words))
    roles = [turn["role"] for turn in turns]
    if not all(roles) or "assistant" not in roles or roles[0] not in ("user", "system"):
        return []
    return turns[:-1] if roles[-1] == "assistant" and not turns[-1]["content"] else turns


def edit_marked_text(text: str, edit: Callable[[str], str]) -> str:
    """Replaces the content of every turn by edit(content); keeps markers and the white space around the content."""
    pieces: list[str] = []
    start = 0
    marker = _find_marker(text)
    for found in marker.finditer(text) if marker else ():
        pieces += [_edit_turn_text(text[start : found.start()], edit), found[0]]
        start = found.end()
    return "".join([*pieces, _edit_turn_text(text[start:], edit)])


def ends_with_question(text: str) -> bool:
    """True for marked text whose last message is a question, perhaps followed by an empty assistant marker."""
    turns = parse_marked_text(text)
    return bool(turns) and turns[-1]["role"] == "user"


def _find_marker(text: str) -> re.Pattern[str] | None:
    """The role marker of the style that the text begins with; None for unmarked text."""
    if not _FIRST_LETTER.match(text):
        return None
    return next((marker for begin, marker in _STYLES if begin.match(text)), None)


def _turn_text(piece: str) -> str:
    words = piece.strip()
    end = next((end for end in _END_MARKERS if words.endswith(end)), "")
    return words.removesuffix(end).rstrip()


def _edit_turn_text(piece: str, edit: Callable[[str], str]) -> str:
    words = _turn_text(piece)
    return piece.replace(words, edit(words), 1) if words else piece


# ---- JSON and Python literals ----------------------------------------------------------------------------------------
def is_serialized_messages(value: Any) -> bool:
    """True for text that is a list of messages with roles, written as JSON or as a Python literal."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return False
    turns = parse_literal(value)
    return isinstance(turns, list) and all(isinstance(turn, dict) and is_message(turn) for turn in turns)


def is_message(turn: dict[str, Any]) -> bool:
    """True for an object with a known role and with a key for text or for tool calls."""
    has_role = any(isinstance(turn.get(key), str) and turn[key].strip().lower() in ROLE_NAMES for key in ROLE_KEYS)
    return has_role and any(key in turn for key in (*CONTENT_KEYS, *TOOL_KEYS))


def is_tool_call(value: Any) -> bool:
    """True for a list of function calls, [{"name": ..., "arguments": ...}], perhaps as text."""
    is_text = isinstance(value, str) and value.startswith("[{") and "arguments" in value
    calls = parse_literal(value) if is_text else value
    return (
        isinstance(calls, list)
        and bool(calls)
        and all(isinstance(c, dict) and {"name", "arguments"} <= c.keys() for c in calls)
    )


def parse_serialized_list(text: str, field: str) -> Any:
    """Parses `text` as JSON or as a Python literal. Raises BadRow if it is neither."""
    value = parse_literal(text)
    if value is None:
        raise BadRow(f"{field} is neither JSON nor a Python list")
    return value


def parse_literal(text: str) -> Any:
    """Parses `text` as JSON, as a Python literal or as numpy output; returns None if all fail."""
    for parse in (json.loads, ast.literal_eval, _parse_numpy_list):
        try:
            with warnings.catch_warnings():  # data with invalid escapes such as '\d' would print a SyntaxWarning
                warnings.simplefilter("ignore")
                return parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _parse_numpy_list(text: str) -> Any:
    """Parses numpy's text for an array of objects, which has no commas; pandas writes lists to csv like this."""
    if "}\n {" not in text:
        raise ValueError
    return ast.literal_eval(text.replace("}\n {", "}, {"))
