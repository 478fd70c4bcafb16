"""Chats written into one text: Human: … Assistant: …, 用户：… 助手：…, or ChatML's <|im_start|>role … <|im_end|>.

    marked_turns(text)         the messages, or [] for text that does not begin with a user's marker
    edit_marked(text, edit)    the same text with the words of every turn edited

Read next: chats.py (turns -> messages).
"""

import re
from collections.abc import Callable
from typing import Any

from corpus.layouts import ROLES

Message = dict[str, Any]

_MARKER = re.compile(r"(?:^|\n)[ \t]*(?:###[ \t]*|<\|)?(Human|User|Assistant|用户|助手)(?:\|>)?[ \t]*[:：]")
_MARKED = re.compile(r"\s*(?:###\s*|<\|)?(?:Human|User|用户)(?:\|>)?\s*[:：]")
_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|$)", re.DOTALL)


def message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def marked_turns(text: str) -> list[Message]:
    """The turns of text marked with Human:/Assistant:, 用户：/助手： or ChatML; [] where it does not begin with a user.

    A last assistant marker without text ends the question, as in BELLE's multi-turn set; it is not a turn.
    """
    if text.startswith("<|im_start|>"):
        chatml = [message(ROLES.get(name.lower(), ""), content) for name, content in _CHATML.findall(text)]
        return chatml if all(turn["role"] for turn in chatml) else []
    if not is_marked(text):
        return []
    pieces = _MARKER.split(text)
    roles = ["assistant" if name in ("Assistant", "助手") else "user" for name in pieces[1::2]]
    if pieces[0].strip() or "assistant" not in roles:
        return []
    turns = [message(role, content.strip()) for role, content in zip(roles, pieces[2::2], strict=True)]
    return turns[:-1] if roles[-1] == "assistant" and not turns[-1]["content"] else turns


def edit_marked(text: str, edit: Callable[[str], str]) -> str:
    """Marked text with the words of every turn edited; the markers and the white space around the words stay."""
    pieces: list[str] = []
    start = 0
    for marker in _MARKER.finditer(text):
        pieces += [_edit_words(text[start : marker.start()], edit), marker[0]]
        start = marker.end()
    return "".join([*pieces, _edit_words(text[start:], edit)])


def _edit_words(piece: str, edit: Callable[[str], str]) -> str:
    words = piece.strip()
    return piece.replace(words, edit(words), 1) if words else piece


def is_marked(text: str) -> bool:
    """True for text that begins with the marker of a user."""
    return bool(_MARKED.match(text))


def is_open_question(text: str) -> bool:
    """True for marked text that ends with the marker of the answer to come."""
    if not is_marked(text):
        return False
    *_, speaker, behind = _MARKER.split(text)
    return speaker in ("Assistant", "助手") and not behind.strip()
