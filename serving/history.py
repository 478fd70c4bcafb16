"""Saved conversations of the chat page: one JSON file per conversation, in a folder that belongs to the user.

    ~/.local/share/mengya/chats/20261130-210501-5f3a9c01.json
    {"format": 1, "turns": [{"question": …, "attempt": 0, "replies": [{"model_name": …, "parts": [["content", …]],
     "messages": […], "tokens": 12, "seconds": 0.4, "stop_reason": "stop", "error": "", "is_truncated": false}]}]}

`parts` is what the page shows. `messages` is what the model reads in the next turn, in the form of training data.
Files are written atomically. A file that cannot be read is listed with its error and never overwritten. Two tabs may
continue the same conversation: the second one to write gets a file of its own, so both are kept.
Called by page.py. Read next: conversation.py, config.py (--history_dir).
"""

import datetime
import functools
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import report_write_errors, write_json
from corpus.chats import RowNotes, parse_messages
from corpus.stats import BadRow, DroppedRow
from evaluation.tool_loop import Reply, ReplyPart
from serving.conversation import ChatReply, ChatTurn, Conversation
from serving.model_list import file_version

FORMAT = 1
CHAT_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
MAX_TITLE_CHARS = 80
_PART_KINDS = ("reasoning", "content", "tool_call", "tool_result")
_REPLY_FIELDS = {
    **{"model_name": str, "seconds": (int, float), "tokens": int, "stop_reason": str, "error": str},
    "is_truncated": bool,
}
_Version = tuple[int, int]


@dataclass(frozen=True)
class SavedChat:
    """An entry of the list. `title`: the first question. If the file cannot be read, `error` says why."""

    id: str
    title: str
    error: str = ""


class ChatHistory:
    """The conversations in one folder, which is created, readable by its owner only, when the first one is saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, chat_id: str) -> Path:
        """The file of a conversation. Raises UserError for text that is no id, such as a path in the page's address."""
        if not CHAT_ID.fullmatch(chat_id):
            raise UserError(f"{chat_id[:80]!r} is no saved conversation")
        return self.folder / f"{chat_id}.json"

    def ids(self) -> list[str]:
        """The ids of the saved conversations, last written first."""
        paths = [path for path in self.folder.glob("*.json") if CHAT_ID.fullmatch(path.stem)]
        versions = {path.stem: version for path in paths if (version := _version(path))}
        return sorted(versions, key=lambda chat_id: (versions[chat_id], chat_id), reverse=True)

    def entries(self, chat_ids: list[str]) -> list[SavedChat]:
        """The entries of these conversations, without those that were deleted meanwhile."""
        versions = [(path, _version(path)) for path in map(self.path, chat_ids)]
        return [_read_entry(path, version) for path, version in versions if version]

    def load(self, chat_id: str) -> Conversation:
        """Raises UserError if the file is missing or damaged."""
        path = self.path(chat_id)
        version = _version(path)  # before reading: a file written meanwhile is noticed by `refresh` and `save`
        conversation = Conversation()
        conversation.turns = _read_turns(path)
        conversation.saved_id, conversation.saved_version = chat_id, version
        return conversation

    def refresh(self, conversation: Conversation) -> Conversation:
        """The conversation as it is on disk: another tab may have continued it (loaded again) or deleted it (empty).

        A streaming one, one that was never saved, and one whose file was damaged are returned as they are.
        """
        if not conversation.saved_id or conversation.streaming:
            return conversation
        version = _version(self.path(conversation.saved_id))
        if version == conversation.saved_version:
            return conversation
        try:
            return self.load(conversation.saved_id) if version else Conversation()
        except UserError:
            return conversation

    def save(self, conversation: Conversation) -> None:
        """Write a conversation with at least one turn. Raises UserError if writing fails.

        A conversation that was deleted meanwhile is not written again; one that another tab has continued gets a new
        id.
        """
        if not conversation.turns:
            return
        on_disk = _version(self.path(conversation.saved_id)) if conversation.saved_id else None
        if conversation.saved_version and not on_disk:
            return
        if on_disk != conversation.saved_version or not conversation.saved_id:
            conversation.saved_id = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
            conversation.saved_version = None
        path = self.path(conversation.saved_id)
        with report_write_errors(path):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "turns": [_turn_fields(turn) for turn in conversation.turns]}, indent=None)
        conversation.saved_version = _version(path)

    def delete(self, chat_ids: list[str]) -> None:
        """Raises UserError if a file cannot be removed; a missing one is fine."""
        for path in map(self.path, chat_ids):
            with report_write_errors(path):
                path.unlink(missing_ok=True)


def _version(path: Path) -> _Version | None:
    """The version of a file; None if it is missing."""
    try:
        return file_version(path)
    except OSError:
        return None


@functools.lru_cache(maxsize=4096)
def _read_entry(path: Path, _: _Version) -> SavedChat:
    try:
        title = " ".join(_read_turns(path)[0].question.split())
    except UserError as error:
        return SavedChat(path.stem, path.stem, str(error))
    return SavedChat(path.stem, title[:MAX_TITLE_CHARS])


# ---- turns <-> JSON --------------------------------------------------------------------------------------------------
def _turn_fields(turn: ChatTurn) -> dict[str, Any]:
    replies = [
        {
            **{name: getattr(reply, name) for name in _REPLY_FIELDS},
            "parts": [list(part) for part in reply.parts],
            "messages": reply.reply.messages,
        }
        for reply in turn.replies
    ]
    return {"question": turn.question, "attempt": turn.attempt, "replies": replies}


def _read_turns(path: Path) -> list[ChatTurn]:
    """Raises UserError for a file that is missing or not as `save` wrote it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # lone surrogates cannot be sent to a browser
        if _field(content, "format", int) > FORMAT:
            raise ValueError("written by a newer version")
        turns = [_read_turn(turn) for turn in _field(content, "turns", list)]
        if not turns:
            raise ValueError("no turns")
        return turns
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError, BadRow, DroppedRow) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _read_turn(content: Any) -> ChatTurn:
    replies = [_read_reply(reply) for reply in _field(content, "replies", list)]
    if not replies:
        raise ValueError("a turn without replies")
    return ChatTurn(_field(content, "question", str), replies, _field(content, "attempt", int))


def _read_reply(content: Any) -> ChatReply:
    values = {name: _field(content, name, kind) for name, kind in _REPLY_FIELDS.items()}
    parts = _field(content, "parts", list)
    for part in parts:
        is_pair = isinstance(part, list) and len(part) == 2 and part[0] in _PART_KINDS
        if not is_pair or not isinstance(part[1], str):
            raise ValueError("a part of a reply is not [kind, text]")
    messages = _field(content, "messages", list)
    messages = parse_messages(messages, RowNotes()) if messages else []
    if not all(
        message["role"] in ("assistant", "tool") and isinstance(message["content"], str) for message in messages
    ):
        raise ValueError("a message of a reply is neither an answer nor a result")
    reply = ChatReply(**values, parts=[ReplyPart(*part) for part in parts])
    if not reply.stop_reason:  # the server was stopped while it streamed
        reply.stop_reason = "stopped"
        messages += [{"role": "assistant", "content": reply.text}] if reply.text else []
    reply.reply = Reply(messages=messages, finish_reason=reply.stop_reason)
    return reply


def _field(content: Any, name: str, kind: Any) -> Any:
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name!r} is missing or of a wrong type")
    return value
