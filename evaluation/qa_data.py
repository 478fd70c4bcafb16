"""Questions with keys, and the rule by which an answer is correct.

    {"question": "...", "keys": ["...", ...], "lang": "zh" or "en", "kind": "..."}      lang and kind are optional

An answer is correct if it contains any of the keys. Case is ignored. A key of Latin letters, digits or Chinese numerals
must match a whole word or number ("12" does not match "120" or "1.12"); other Chinese keys match anywhere.
Read next: qa.py (generates and scores the answers), ../2-eval.py (the command).
"""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError, require_nonempty_text
from corpus.language import detect_language
from model.chat_template import Message

MAX_ANSWER_TOKENS = 48  # of a chat model's answer
LATIN_CHARACTERS, CHINESE_NUMERALS = "0-9A-Za-zÀ-ɏ", "零〇一二两三四五六七八九十百千万亿"

KeyedQuestion = dict[str, Any]  # read_keyed_questions makes them; qa.py adds "answer", "correct" and "calls"


def system_messages(text: str) -> list[Message]:
    """The beginning of a chat with the system message of --system; [] without one. Raises UserError for a blank one."""
    return [{"role": "system", "content": require_nonempty_text(text, "--system")}] if text else []


def read_prompt_lines(path: str) -> list[tuple[str, str]]:
    """(file:line, text) of the non-empty lines; path "-": of standard input. Raises UserError where there are none."""
    try:
        data, path = (sys.stdin.buffer.read(), "stdin") if path == "-" else (Path(path).read_bytes(), path)
        lines = io.StringIO(data.decode("utf-8-sig"), newline=None).readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    found = [(f"{path}:{i}", line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{path} is empty: put one prompt, or one question with its keys, on each line")
    return found


def read_keyed_questions(path: str) -> list[KeyedQuestion]:
    """The questions of a jsonl file with lang and kind set. Raises UserError with the location of an invalid line."""
    questions = []
    for where, line in read_prompt_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise UserError(f'{where}: expected {{"question": "...", "keys": ["...", ...]}}')
        keys = row.get("keys")
        if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key.strip() for key in keys):
            raise UserError(f"{where}: keys must be a non-empty list of non-empty strings")
        question = require_nonempty_text(row["question"], f"{where}: question")
        lang, kind = str(row.get("lang") or detect_language(question)), str(row.get("kind") or "")
        questions.append({"where": where, "question": question, "keys": keys, "lang": lang, "kind": kind})
    return questions


def is_correct(answer: str, keys: list[str]) -> bool:
    """Whether the answer contains any of the keys, by the rule of the module docstring."""
    for key in map(str.strip, keys):
        before, after = "", ""  # lookarounds: the key must not be part of a longer word or number
        for characters in (LATIN_CHARACTERS, CHINESE_NUMERALS):
            before += f"(?<![{characters}])" if re.match(f"[{characters}]", key[0]) else ""
            after += f"(?![{characters}])" if re.match(f"[{characters}]", key[-1]) else ""
        before += r"(?<![0-9][.,])" if key[0].isdecimal() else ""
        after += r"(?![.,][0-9])" if key[-1].isdecimal() else ""
        if re.search(before + re.escape(key) + after, answer, re.IGNORECASE):
            return True
    return False
