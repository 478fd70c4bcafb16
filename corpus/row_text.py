"""Extracts the text, the chat or the pair of answers from a row of any layout. Every command reads rows here.

    DEFAULT_READER.read_text(row)         pretrain: the text of a document, or the text of a chat
    DEFAULT_READER.read_chat(row)         sft: the messages
    DEFAULT_READER.read_pair(row)         dpo: the prompt and two answers
    DEFAULT_READER.read_content(row)      clean, dedup, decontaminate: all texts that the three methods above read
    DEFAULT_READER.edit_row(row, edit)    clean: the row with each of these texts replaced by edit(text)
    RowReader({"prompt": "ask"})          reads the question of a chat from the key `ask` (--keys prompt=ask)

The keys that have a value determine the layout of each row; null and empty values are ignored. `RowContent.changes`
and `RowContent.unused` list changes and unused keys, which the report counts.

Read next: layouts.py (keys), chats.py (turns), readers.py (files -> rows), stats.py (the counts).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from corpus.answers import (
    NO_PAIR_KEYS,
    PAIR_SIDES,
    find_answer_pair,
    is_text_list,
    parse_answer_value,
    side_conversation,
    split_pair,
)
from corpus.chats import (
    Message,
    RowNotes,
    chat_text,
    is_blank,
    is_filled,
    is_zero_weight,
    make_message,
    message_text,
    parse_history,
    parse_messages,
)
from corpus.language import is_missing, require_text, stringify_number
from corpus.layouts import METADATA_KEYS
from corpus.row_edit import edit_value
from corpus.row_keys import FieldKeys, RowKeys, check_labels, is_comparison_key
from corpus.serialized_chats import ends_with_question, is_serialized_messages, parse_marked_text
from corpus.stats import BadRow, DroppedRow
from corpus.tool_turns import parse_tools, with_tools
from corpus.turn_rules import apply_turn_rules

_NO_TEXT_KEY, _NO_CHAT_KEYS = "no text key", "none of the keys of a chat"


@dataclass
class RowContent:
    """The content of a row. `messages` are those of a chat or the prompt of a pair; empty for a text."""

    kind: str  # "text", "chat" or "pair"
    text: str  # all texts, without role markers
    messages: list[Message] = field(default_factory=list)
    answers: tuple[list[Message], ...] = ()  # of a pair: chosen, rejected
    changes: list[str] = field(default_factory=list)  # reasons of the form "without ..." or "with ..."
    unused: list[str] = field(default_factory=list)  # keys with a value that was not read


class RowReader(RowKeys):
    """Reads rows by layouts.FIELD_KEYS; `keys` maps fields to the user's own keys (layouts.parse_keys)."""

    def read_text(self, row: Any) -> RowContent:
        """Returns the document that `pretrain` trains on. Raises BadRow if there is none."""
        return _Row(self, row).read_text()

    def read_chat(self, row: Any) -> RowContent:
        """Returns the messages that `sft` trains on, after layouts.TURN_RULES. Raises BadRow or DroppedRow."""
        return _Row(self, row).read_chat()

    def read_pair(self, row: Any) -> RowContent:
        """Returns the prompt and the two answers that `dpo` compares. Raises BadRow or DroppedRow."""
        return _Row(self, row).read_pair()

    def read_content(self, row: Any) -> RowContent:
        """Returns all texts that read_text, read_chat and read_pair read, each once; the kind is the most specific."""
        found: list[RowContent] = []
        reasons: list[BadRow] = []
        first = _Row(self, row)
        for read in first.matching_readers():
            try:
                found.append(read(_Row(self, row, first.fields)))
            except BadRow as reason:
                reasons.append(reason)
        if not found:
            specific = [reason for reason in reasons if str(reason) not in (NO_PAIR_KEYS, _NO_CHAT_KEYS, _NO_TEXT_KEY)]
            raise min(specific, key=lambda reason: not isinstance(reason, DroppedRow),
                      default=BadRow("no text key, and no chat"))  # fmt: skip
        if len(found) == 1:
            return found[0]
        texts: dict[str, None] = {}
        for other in found:
            turns = [*other.messages, *(turn for answer in other.answers for turn in answer)]
            texts.update(dict.fromkeys([*map(message_text, turns)] or [other.text]))
        best = found[0]
        unused = [key for key in best.unused if all(key in other.unused for other in found)]
        return RowContent(best.kind, "\n".join(texts), best.messages, best.answers, best.changes, unused)

    def edit_row(self, row: Any, edit: Callable[[str], str]) -> Any:
        """Returns a copy of the row with every text edited; a plain text becomes {"text": ...}."""
        if isinstance(row, str):
            return {"text": edit(row)}
        if not isinstance(row, dict):
            return edit_value(row, edit)
        return {key: edit_value(value, edit) if self.may_hold_text(key) else value for key, value in row.items()}

    def document_key(self, row: dict[str, Any]) -> str | None:
        """Returns the key of the document that `pretrain` reads; None if the row has none or is a chat."""
        return _Row(self, row).text_key()


class _Row:
    """One reading of a row: its filled fields, the keys that were read, and notes for the report."""

    def __init__(self, reader: RowReader, row: Any, fields: FieldKeys | None = None) -> None:
        self.reader, self.row = reader, row
        self.fields = fields or (reader.filled_fields(row) if isinstance(row, dict) else {})
        self.used: set[str] = set()
        self.notes = RowNotes()

    def keys(self, name: str) -> list[str]:
        """The filled keys of a field, in order of priority."""
        return self.fields.get(name, [])

    def matching_readers(self) -> list[Callable[["_Row"], RowContent]]:
        """Those of read_pair, read_chat and read_text that may read this row, the most specific first."""
        if not isinstance(self.row, dict):
            return [_Row.read_chat, _Row.read_text] if isinstance(self.row, str) else [_Row.read_chat]
        text = self.text_key()
        ranked = any(isinstance(self.row[key], (list, tuple)) for key in self.keys("answer"))
        pair = "chosen" in self.fields or "rejected" in self.fields or ranked or any(map(is_comparison_key, self.row))
        marked = text is not None and isinstance(self.row[text], str) and bool(parse_marked_text(self.row[text]))
        chat = "messages" in self.fields or "answer" in self.fields or marked
        applies = ((pair, _Row.read_pair), (chat, _Row.read_chat), (text is not None, _Row.read_text))
        return [read for may_read, read in applies if may_read] or [_Row.read_chat, _Row.read_text]

    def read_text(self) -> RowContent:
        if isinstance(self.row, str):
            return RowContent("text", require_text(self.row, "text"))
        if not isinstance(self.row, dict):
            return self.read_chat()
        key = self.text_key()
        if key is not None:
            self._require_weight()
            text, self.used = require_text(self.row[key], key), {key}
            unused = self._unused_keys([make_message("user", text)]) if len(self.row) > 1 else []
            return RowContent("text", text, unused=unused)
        if "messages" in self.fields or "answer" in self.fields:
            return self.read_chat()
        for key in self.row:
            if any(name == "text" for name, _ in self.reader.key_fields(key)):
                require_text(self.row[key], key)  # raises the reason: an unfilled key
        raise BadRow(_NO_TEXT_KEY)

    def text_key(self) -> str | None:
        """The key of the document; in a chat row, passage and completion belong to the chat."""
        if not (texts := self.keys("text")) or not (answers := self.keys("answer")):
            return texts[0] if texts else None
        of_chat = {*answers, *self.keys("context")}
        is_chat = len(of_chat.union(self.keys("prompt"))) > 1
        return next((key for key in texts if not (is_chat and key in of_chat)), None)

    # ---- chats ----
    def read_chat(self) -> RowContent:
        messages = apply_turn_rules(self._messages(), self.notes)
        unused = self._unused_keys(messages)
        return RowContent("chat", chat_text(messages), messages, changes=list(self.notes.changes), unused=unused)

    def _messages(self) -> list[Message]:
        """The messages of the row, before the turn rules."""
        if isinstance(self.row, str):
            if not (messages := parse_marked_text(self.row)):
                raise BadRow("plain text, not a chat")
            return messages
        if not isinstance(self.row, dict):
            return parse_messages(self.row, self.notes)
        self._require_trainable()
        turns, answer = self._turns_key(), next(iter(self.keys("answer")), None)
        if turns is not None:
            self.used.add(turns)
            messages = parse_messages(self.row[turns], self.notes)
            if answer is not None and messages and messages[-1]["role"] == "user":
                self.used.add(answer)
                messages += parse_answer_value(self.row[answer], answer, self.notes)
        elif answer is not None and (messages := self._prompt({answer})):
            self.used.add(answer)
            messages += parse_answer_value(self.row[answer], answer, self.notes)
        else:
            messages = self._marked_text()
        return self._add_system(messages)

    def _turns_key(self) -> str | None:
        """The key of the list of turns. Plain text under it is an error, unless the row has an answer key."""
        row, keys = self.row, self.keys("messages")
        lists = [key for key in keys if not isinstance(row[key], str) or row[key].lstrip()[:1] in ("[", "{")]
        lists += [key for key in keys if isinstance(row[key], str) and parse_marked_text(row[key])]
        return next(iter(lists if lists or "answer" in self.fields else keys), None)

    def _require_trainable(self) -> None:
        """Raises DroppedRow for a row whose label or weight excludes it from training."""
        self.used.update(check_labels(self.row, self.keys("label")))
        self._require_weight()

    def _require_weight(self) -> None:
        for key in self.keys("weight"):
            if is_zero_weight(self.row[key]):
                raise DroppedRow(f"a row with {key} 0")

    def _prompt(self, excluded: set[str]) -> list[Message]:
        """Returns history and question, with the context appended on a new line; [] if the row has no question."""
        row = self.row
        prompts, contexts, histories = (
            [key for key in self.keys(name) if key not in excluded] for name in ("prompt", "context", "history")
        )
        history = histories[0] if histories else None
        if prompts:
            key = prompts[0]
        elif contexts:
            key, *contexts = contexts
        elif history and isinstance(row[history], str) and row[history].lstrip()[:1] not in ("[", "{"):
            key, history = history, None  # in SHP, history is the question
        else:
            return []
        value = stringify_number(row[key])
        self.used |= {key, *contexts}
        turns: list[Message] = []
        if history:
            self.used.add(history)
            turns += parse_history(row[history], self.notes)
        holds_turns = isinstance(value, (list, dict)) and not is_text_list(value)
        if holds_turns or is_serialized_messages(value) or (isinstance(value, str) and ends_with_question(value)):
            question = parse_messages(value, self.notes)
        else:
            question = [make_message("user", _join_texts(value, key))]
        if contexts:
            texts = [_join_texts(row[key], key) for key in contexts]
            question = [*question[:-1], {**question[-1], "content": "\n".join([question[-1]["content"], *texts])}]
        return turns + question

    def _marked_text(self) -> list[Message]:
        """Reads a chat from text with role markers; raises the most specific reason if there is none."""
        row, first_key = self.row, self.reader.first_key
        for key in (*self.keys("text"), *self.keys("prompt")):
            if isinstance(row[key], str) and (turns := parse_marked_text(row[key])):
                self.used.add(key)
                return turns
        if {"chosen", "rejected"} <= self.fields.keys():
            raise BadRow("a pair of answers: data_process.py dpo reads it")
        prompt, answer = first_key(row, "prompt"), first_key(row, "answer")
        if answer is not None and answer not in self.keys("answer") and (prompt or "context" in self.fields):
            if is_missing(row[answer]):
                raise BadRow(f"{answer} is null")
            raise DroppedRow("an empty answer")
        if prompt is not None and "answer" in self.fields and prompt not in self.keys("prompt"):
            require_text(row[prompt], prompt)
        if (turns_key := first_key(row, "messages")) is not None:
            raise BadRow("the list of messages is null" if is_missing(row[turns_key]) else "no messages")
        raise BadRow(_NO_CHAT_KEYS)

    def _add_system(self, messages: list[Message]) -> list[Message]:
        """The messages with the row's system text and tools in the first one, unless it has its own."""
        key, tools = next(iter(self.keys("system")), None), next(iter(self.keys("tools")), None)
        if key and not (messages and messages[0]["role"] == "system" and not is_blank(messages[0]["content"])):
            self.used.add(key)
            messages = [make_message("system", require_text(self.row[key], key)), *messages]
        if tools:
            self.used.add(tools)
            messages = with_tools(messages, parse_tools(self.row[tools]))
        return messages

    # ---- pairs ----
    def read_pair(self) -> RowContent:
        if not isinstance(self.row, dict):
            raise BadRow(NO_PAIR_KEYS)
        self._require_trainable()
        chosen, rejected = (next(iter(self.keys(side)), self.reader.first_key(self.row, side)) for side in PAIR_SIDES)
        values = find_answer_pair(self.row, self.fields, (chosen, rejected), self.used)
        prompt = self._prompt(self.used)
        if not prompt and (lists := self.keys("messages")):
            self.used.add(lists[0])
            prompt = parse_messages(self.row[lists[0]], self.notes)
            if "chosen" not in self.fields and prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]  # ms-swift: the last answer of the chat is the chosen one
        if not prompt and (key := self.reader.first_key(self.row, "prompt")) is not None and isinstance(values[0], str):
            require_text(self.row[key], key)  # raises the reason
        conversations = []
        for side, value in zip(PAIR_SIDES, values, strict=True):
            conversation = self._add_system(side_conversation(side, value, prompt, self.notes))
            messages = apply_turn_rules(conversation, self.notes, cut_at_empty=False)
            # Pairs have no weights; those are for SFT.
            conversations.append([{k: part for k, part in turn.items() if k != "weight"} for turn in messages])
        prompt, *answers = split_pair(*conversations)
        turns = [*prompt, *answers[0], *answers[1]]
        unused = self._unused_keys(turns)
        return RowContent("pair", chat_text(turns), prompt, tuple(answers), list(self.notes.changes), unused)

    def _unused_keys(self, messages: list[Message]) -> list[str]:
        """The filled keys that were not read, except metadata and texts that equal a message."""
        if not isinstance(self.row, dict):
            return []
        unused = []
        for key, value in self.row.items():
            if key in self.used or key in METADATA_KEYS or str(key).lower() in METADATA_KEYS or not is_filled(value):
                continue
            if not isinstance(value, str) or not any(value == turn["content"] for turn in messages):
                unused.append(str(key))
        return [*unused, *self.notes.unused]


def _join_texts(value: Any, key: str) -> str:
    return "\n".join(value) if is_text_list(value) else require_text(value, key)


DEFAULT_READER = RowReader()
