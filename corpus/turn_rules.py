"""Turn rules (layouts.TURN_RULES): makes the roles of a chat follow each other as chat formats expect.

    system?  (user  (assistant with calls  tool+)*  assistant?)+

Consecutive messages of one role are joined; results of tools follow a call. A chat is cut at whole turns: a turn begins
at a user message, so a call keeps its results.

    apply_turn_rules(messages, notes)    the messages of a row -> a chat
    trim_unanswered(messages)            without the messages after the last answer and its results
    first_turns(messages, end)           the whole turns within the first `end` messages

Read next: chats.py (a row's value -> messages), tool_turns.py (tools, calls, thoughts).
"""

from itertools import pairwise
from typing import Any

from corpus.chats import Message, RowNotes, is_blank
from corpus.language import require_text
from corpus.serialized_chats import make_message
from corpus.stats import BadRow, DroppedRow
from corpus.tool_turns import read_markers

WITHOUT_OPENING = "without the assistant's opening message"
JOINED_ROLES = "with consecutive messages of one role joined"
CUT_AT_EMPTY = "cut before an empty message"


def trim_unanswered(messages: list[Message]) -> list[Message]:
    """Returns the messages up to the last answer, or to the results of its calls; [] if there is no answer."""
    if messages and messages[-1]["role"] == "assistant":
        return messages
    end = max((i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    while 0 < end < len(messages) and messages[end]["role"] == "tool":
        end += 1
    return messages[:end]


def first_turns(messages: list[Message], end: int) -> list[Message]:
    """Returns the whole turns within the first `end` messages, up to the last answer; [] if there is none."""
    while 0 < end < len(messages) and messages[end]["role"] != "user":
        end -= 1
    return trim_unanswered(messages[:end])


def apply_turn_rules(messages: list[Message], notes: RowNotes, cut_at_empty: bool = True) -> list[Message]:
    """Applies layouts.TURN_RULES: returns an optional system message, then alternating user and assistant messages.

    `cut_at_empty`: if True, the chat is cut before its first empty message; if False, an empty message raises BadRow.
    Raises BadRow or DroppedRow if the messages break the rules.
    """
    messages = read_markers(messages, notes.changes)
    if not _roles_alternate(messages):
        messages = _make_roles_alternate(messages, notes, cut_at_empty)
    for turn in messages:
        if turn["content"] != "" or not (turn["role"] == "tool" or turn.get("tool_calls") or turn.get("tools")):
            require_text(turn["content"], turn["role"] + " message")
    return messages


def _roles_alternate(messages: list[Message]) -> bool:
    """True if no rule applies: an optional system message, then alternating user and assistant, none empty."""
    roles = [turn["role"] for turn in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    alternates = turns and turns[::2] == ["user"] * len(turns[::2]) and turns[1::2] == ["assistant"] * len(turns[1::2])
    return bool(alternates) and not any(is_blank(turn["content"]) for turn in messages)


def _make_roles_alternate(messages: list[Message], notes: RowNotes, cut_at_empty: bool) -> list[Message]:
    runs: list[list[Message]] = []  # consecutive messages of one role
    for new in messages:
        role, previous_role = new["role"], runs[-1][0]["role"] if runs else ""
        if role == "system" and previous_role not in ("", "system"):
            raise DroppedRow("a system message after the start")
        if role == "tool" and not (previous_role == "tool" or (runs and runs[-1][-1].get("tool_calls"))):
            raise DroppedRow("a tool result that follows no call")
        if role == "system" and is_blank(new["content"]) and not new.get("tools"):
            continue  # some datasets put an empty system message into every row
        if role == "assistant" and previous_role in ("", "system"):
            notes.changes[WITHOUT_OPENING] = None
        elif role == previous_role and role != "tool":
            runs[-1].append(new)
        else:
            runs.append([new])
    turns = [_join_messages(run, notes) if len(run) > 1 else run[0] for run in runs]
    if not any(turn["role"] == "user" for turn in turns):
        raise DroppedRow("only assistant messages") if WITHOUT_OPENING in notes.changes else BadRow("no messages")
    empty = next((i for i, turn in enumerate(turns) if _is_empty(turn)), None)
    if empty is not None and cut_at_empty:
        kept = trim_unanswered(turns[:empty])
        if not kept and turns[empty]["role"] == "assistant":
            raise DroppedRow("an empty answer")
        if kept:
            notes.changes[CUT_AT_EMPTY] = None
            turns = kept
    return turns


def _is_empty(turn: Message) -> bool:
    """True for a message without content. Calls and tools need none, and a tool may return nothing."""
    return is_blank(turn["content"]) and not (turn["role"] == "tool" or turn.get("tool_calls") or turn.get("tools"))


def _join_messages(run: list[Message], notes: RowNotes) -> Message:
    """Joins consecutive messages of one role; the result has weight 0 if any of them has weight 0.

    Raises DroppedRow if one has text after a call.
    """
    role = run[0]["role"]
    calls = [call for turn in run for call in turn.get("tool_calls", ())]
    if any(turn.get("tool_calls") and not is_blank(later["content"]) for turn, later in pairwise(run)):
        raise DroppedRow("text after a tool call")
    tools = [tool for turn in run for tool in turn.get("tools", ())]
    thoughts = [turn["reasoning_content"] for turn in run if "reasoning_content" in turn]
    parts: dict[str, Any] = {"tools": tools} if tools else {}
    parts |= {"reasoning_content": "\n".join(filter(None, thoughts))} if thoughts else {}
    parts |= {"tool_calls": calls} if calls else {}
    filled = [turn["content"] for turn in run if not is_blank(turn["content"])]
    if len(filled) > 1:
        notes.changes[JOINED_ROLES] = None
        filled = ["\n".join(require_text(text, role + " message") for text in filled)]
    untrained = {"weight": 0} if any(turn.get("weight") == 0 for turn in run) else {}
    content = filled[0] if filled else "" if parts else run[0]["content"]
    return {**make_message(role, content), **parts, **untrained}
