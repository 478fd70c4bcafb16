"""Extracts the text, the chat or the pair of answers from a row of any layout. Every command reads rows here.

    DEFAULT_READER.read_text(row)         pretrain: the text of a document, or the text of a chat
    DEFAULT_READER.read_chat(row)         sft: the messages
    DEFAULT_READER.read_pair(row)         dpo: the prompt and two answers
    DEFAULT_READER.read_content(row)      clean, dedup, decontaminate: all texts that the three methods above read
    DEFAULT_READER.edit_row(row, edit)    clean: the row with each of these texts replaced by edit(text)

    RowReader({"prompt": "ask"})    reads the question of a chat from the key `ask` (--keys prompt=ask)

The keys that have a value determine the layout of each row; null and empty values are ignored. `RowContent.changes`
and `RowContent.unused` list changes and unused keys, which the report counts.

Read next: layouts.py (keys), chats.py (turns), readers.py (files -> rows), stats.py (the counts).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from corpus.answers import is_text_list, parse_answer
from corpus.chats import (
    Message,
    RowNotes,
    apply_turn_rules,
    chat_text,
    is_blank,
    is_filled,
    is_zero_weight,
    make_message,
    parse_history,
    parse_messages,
)
from corpus.language import is_missing, require_text, stringify_number
from corpus.layouts import METADATA_KEYS, UNORDERED_ANSWER_KEYS
from corpus.marked_text import ends_with_question, parse_marked_text
from corpus.pair_answers import (
    NO_PAIR_KEYS,
    PAIR_SIDES,
    best_and_worst_answers,
    find_compared_answers,
    side_conversation,
    split_pair,
)
from corpus.row_edit import edit_value
from corpus.row_keys import FieldKeys, RowKeys, is_comparison_key
from corpus.spelled_turns import spells_messages
from corpus.stats import BadRow, DroppedRow

_NO_CHAT_KEYS = "none of the keys of a chat"


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

    # ---- text ----
    def read_text(self, row: Any, fields: FieldKeys | None = None) -> RowContent:
        """Returns the document that `pretrain` trains on. Raises BadRow if there is none."""
        if isinstance(row, str):
            return RowContent("text", require_text(row, "text"))
        if not isinstance(row, dict):
            return self.read_chat(row)
        fields = self.filled_fields(row) if fields is None else fields
        key = self._text_key(row, fields)
        if key is not None:
            self._require_weight(row, fields)
            content = RowContent("text", require_text(row[key], key))
            content.unused = self._unused_keys(row, {key}, RowNotes(), [make_message("user", content.text)])
            return content
        if "messages" in fields or "answer" in fields:
            return self.read_chat(row, fields)
        empty = next((key for key in row if any(name == "text" for name, _ in self.key_fields(key))), None)
        if empty is not None:
            require_text(row[empty], empty)  # raises the reason
        raise BadRow("no text key")

    def document_key(self, row: dict[str, Any]) -> str | None:
        """Returns the key of the document that `pretrain` reads; None if the row has none or is a chat."""
        return self._text_key(row, self.filled_fields(row))

    def _text_key(self, row: dict[str, Any], fields: FieldKeys) -> str | None:
        """The key of the document; in a chat row, passage and completion belong to the chat."""
        is_chat = (
            "answer" in fields and len({*fields["answer"], *fields.get("prompt", ()), *fields.get("context", ())}) > 1
        )
        of_chat = {*fields.get("answer", ()), *fields.get("context", ())} if is_chat else ()
        return next((key for key in fields.get("text", ()) if key not in of_chat), None)

    # ---- chats ----
    def read_chat(self, row: Any, fields: FieldKeys | None = None) -> RowContent:
        """Returns the messages that `sft` trains on, after layouts.TURN_RULES. Raises BadRow or DroppedRow."""
        notes, used_keys = RowNotes(), set[str]()
        if isinstance(row, dict):
            raw = self._read_messages(row, self.filled_fields(row) if fields is None else fields, used_keys, notes)
        elif isinstance(row, str):
            raw = parse_marked_text(row)
            if not raw:
                raise BadRow("plain text, not a chat")
        else:
            raw = parse_messages(row, notes)
        messages = apply_turn_rules(raw, notes)
        content = RowContent("chat", chat_text(messages), messages, (), list(notes.changes))
        if isinstance(row, dict):
            content.unused = self._unused_keys(row, used_keys, notes, messages)
        return content

    def _read_messages(
        self, row: dict[str, Any], fields: FieldKeys, used_keys: set[str], notes: RowNotes
    ) -> list[Message]:
        self._require_trainable(row, fields, used_keys)
        turns = self._turns_key(row, fields)
        answers = fields.get("answer", [])
        if turns is not None:
            used_keys.add(turns)
            messages = parse_messages(row[turns], notes)
            if answers and messages and messages[-1]["role"] == "user":
                used_keys.add(answers[0])
                messages += parse_answer(row[answers[0]], answers[0], notes)
        elif answers and (question := self._read_prompt(row, fields, set(answers[:1]), used_keys, notes)):
            used_keys.add(answers[0])
            messages = [*question, *parse_answer(row[answers[0]], answers[0], notes)]
        else:
            messages = self._read_marked_text(row, fields, used_keys)
        return self._add_system(row, fields, messages, used_keys)

    def _turns_key(self, row: dict[str, Any], fields: FieldKeys) -> str | None:
        """The key of the list of turns. Plain text under it is an error, unless the row has an answer key."""
        keys = fields.get("messages", [])
        lists = [key for key in keys if not isinstance(row[key], str) or row[key].lstrip()[:1] in ("[", "{")]
        lists += [key for key in keys if isinstance(row[key], str) and parse_marked_text(row[key])]
        if lists or (keys and "answer" not in fields):
            return (lists or keys)[0]
        return None

    def _require_trainable(self, row: dict[str, Any], fields: FieldKeys, used_keys: set[str]) -> None:
        """Raises DroppedRow for a row whose label or weight excludes it from training."""
        is_kto = "completion" in row or "kto_tag" in row  # in other datasets a numeric label is a class
        good, bad = (("true", "1"), ("false", "0")) if is_kto else (("true",), ("false",))
        for key in fields.get("label", ()):
            label = str(row[key]).strip().lower()
            if label in (*good, *bad):
                used_keys.add(key)
                if label in bad:
                    raise DroppedRow(f"an answer that is marked as bad ({key} is false)")
        self._require_weight(row, fields)

    @staticmethod
    def _require_weight(row: dict[str, Any], fields: FieldKeys) -> None:
        for key in fields.get("weight", ()):
            if is_zero_weight(row[key]):
                raise DroppedRow(f"a row with {key} 0")

    def _read_prompt(
        self, row: dict[str, Any], fields: FieldKeys, excluded: set[str], used_keys: set[str], notes: RowNotes
    ) -> list[Message]:
        """Returns history and question, with the context appended on a new line; [] if the row has no question."""
        key = next((key for key in fields.get("prompt", ()) if key not in excluded), None)
        contexts = [key for key in fields.get("context", ()) if key not in excluded]
        if key is None and contexts:
            key, contexts = contexts[0], contexts[1:]
        history = next((key for key in fields.get("history", ()) if key not in excluded), None)
        if key is None and history and isinstance(row[history], str) and row[history].lstrip()[:1] not in ("[", "{"):
            key, history = history, None  # in SHP, history is the question
        if key is None:
            return []
        value = stringify_number(row[key])
        used_keys.update((key, *contexts))
        turns: list[Message] = []
        if history:
            used_keys.add(history)
            turns += parse_history(row[history], notes)
        holds_turns = isinstance(value, (list, dict)) and not is_text_list(value)
        if holds_turns or spells_messages(value) or (isinstance(value, str) and ends_with_question(value)):
            question = parse_messages(value, notes)
        else:
            question = [make_message("user", _join_texts(value, key))]
        if contexts:
            texts = [_join_texts(row[key], key) for key in contexts]
            question = [*question[:-1], {**question[-1], "content": "\n".join([question[-1]["content"], *texts])}]
        return turns + question

    def _read_marked_text(self, row: dict[str, Any], fields: FieldKeys, used_keys: set[str]) -> list[Message]:
        """Reads a chat from text with role markers; raises the most specific reason if there is none."""
        for key in (*fields.get("text", ()), *fields.get("prompt", ())):
            turns = parse_marked_text(row[key]) if isinstance(row[key], str) else []
            if turns:
                used_keys.add(key)
                return turns
        if "chosen" in fields and "rejected" in fields:
            raise BadRow("a pair of answers: data_process.py dpo reads it")
        prompt, answer = (self.first_key(row, name) for name in ("prompt", "answer"))
        if answer is not None and answer not in fields.get("answer", ()) and (prompt or "context" in fields):
            if is_missing(row[answer]):
                raise BadRow(f"{answer} is null")
            raise DroppedRow("an empty answer")
        if prompt is not None and "answer" in fields and prompt not in fields.get("prompt", ()):
            require_text(row[prompt], prompt)
        turns_key = self.first_key(row, "messages")
        if turns_key is not None:
            raise BadRow("the list of messages is null" if is_missing(row[turns_key]) else "no messages")
        raise BadRow(_NO_CHAT_KEYS)

    def _add_system(
        self, row: dict[str, Any], fields: FieldKeys, messages: list[Message], used_keys: set[str]
    ) -> list[Message]:
        keys = fields.get("system", [])
        if not keys or (messages and messages[0]["role"] == "system" and not is_blank(messages[0]["content"])):
            return messages
        used_keys.add(keys[0])
        return [make_message("system", require_text(row[keys[0]], keys[0])), *messages]

    # ---- pairs ----
    def read_pair(self, row: Any, fields: FieldKeys | None = None) -> RowContent:
        """Returns the prompt and the two answers that `dpo` compares. Raises BadRow or DroppedRow."""
        if not isinstance(row, dict):
            raise BadRow(NO_PAIR_KEYS)
        fields = self.filled_fields(row) if fields is None else fields
        notes, used_keys = RowNotes(), set[str]()
        self._require_trainable(row, fields, used_keys)
        values = self._answer_pair(row, fields, used_keys)
        prompt_turns = self._read_prompt(row, fields, used_keys, used_keys, notes)
        if not prompt_turns and "messages" in fields:
            used_keys.add(fields["messages"][0])
            prompt_turns = parse_messages(row[fields["messages"][0]], notes)
            if "chosen" not in fields and prompt_turns and prompt_turns[-1]["role"] == "assistant":
                prompt_turns = prompt_turns[:-1]  # ms-swift: the last answer of the chat is the chosen one
        if not prompt_turns and (key := self.first_key(row, "prompt")) is not None and isinstance(values[0], str):
            require_text(row[key], key)  # raises the reason
        conversations = []
        for side, value in zip(PAIR_SIDES, values, strict=True):
            conversation = side_conversation(side, value, prompt_turns, notes)
            conversation = self._add_system(row, fields, conversation, used_keys)
            messages = apply_turn_rules(conversation, notes, cut_at_empty=False)
            # Pairs have no weights; those are for SFT.
            conversations.append([make_message(turn["role"], turn["content"]) for turn in messages])
        prompt, *answers = split_pair(*conversations)
        turns = [*prompt, *answers[0], *answers[1]]
        unused = self._unused_keys(row, used_keys, notes, turns)
        return RowContent("pair", chat_text(turns), prompt, tuple(answers), list(notes.changes), unused)

    def _answer_pair(self, row: dict[str, Any], fields: FieldKeys, used_keys: set[str]) -> tuple[Any, Any]:
        """Returns (chosen, rejected) from two keys, a ranked list, or two answers and a preference key."""
        chosen, rejected = (fields.get(side, [None])[0] or self.first_key(row, side) for side in PAIR_SIDES)
        if chosen is not None and rejected is not None and ("chosen" in fields or "rejected" in fields):
            used_keys.update((chosen, rejected))
            return row[chosen], row[rejected]
        answer_keys = [*fields.get("answer", ()), *fields.get("messages", ())]
        if chosen is None and "rejected" in fields and answer_keys:
            used_keys.update((answer_keys[0], fields["rejected"][0]))
            return row[answer_keys[0]], row[fields["rejected"][0]]
        if compared := find_compared_answers(row, used_keys):
            return compared
        for key in fields.get("answer", ()):
            if (
                isinstance(row[key], (list, tuple))
                and len(row[key]) > 1
                and not (key in UNORDERED_ANSWER_KEYS and is_text_list(row[key]))
            ):
                used_keys.add(key)
                return best_and_worst_answers(row[key])
        raise BadRow(NO_PAIR_KEYS)

    # ---- everything ----
    def read_content(self, row: Any) -> RowContent:
        """Returns all texts that read_text, read_chat and read_pair read, each once; the kind is the most specific."""
        found: list[RowContent] = []
        reasons: list[BadRow] = []
        fields = self.filled_fields(row) if isinstance(row, dict) else {}
        for read in self._matching_readers(row, fields):
            try:
                found.append(read(row, fields))
            except BadRow as reason:
                reasons.append(reason)
        if not found:
            raise next(
                (reason for reason in reasons if isinstance(reason, DroppedRow)),
                self._most_specific_reason(row, reasons),
            )
        best = found[0]
        if len(found) == 1:
            return best
        texts: dict[str, None] = {}
        for other in found:
            turns = [*other.messages, *(turn for answer in other.answers for turn in answer)]
            texts.update(dict.fromkeys([turn["content"] for turn in turns] or [other.text]))
        unused = self._common_unused(found)
        return RowContent(best.kind, "\n".join(texts), best.messages, best.answers, best.changes, unused)

    def _matching_readers(self, row: Any, fields: FieldKeys) -> list[Callable[[Any, FieldKeys | None], RowContent]]:
        """Those of read_pair, read_chat and read_text that may read this row, the most specific first."""
        if not isinstance(row, dict):
            return [self.read_chat, self.read_text] if isinstance(row, str) else [self.read_chat]
        text = self._text_key(row, fields)
        ranked = any(isinstance(row[key], (list, tuple)) for key in fields.get("answer", ()))
        pair = "chosen" in fields or "rejected" in fields or ranked or any(map(is_comparison_key, row))
        marked = text is not None and isinstance(row[text], str) and bool(parse_marked_text(row[text]))
        chat = "messages" in fields or "answer" in fields or marked
        applies = ((pair, self.read_pair), (chat, self.read_chat), (text is not None, self.read_text))
        return [read for may_read, read in applies if may_read] or [self.read_chat, self.read_text]

    @staticmethod
    def _common_unused(found: list[RowContent]) -> list[str]:
        return [key for key in found[0].unused if all(key in other.unused for other in found)]

    @staticmethod
    def _most_specific_reason(row: Any, reasons: list[BadRow]) -> BadRow:
        """The first reason other than missing keys, if there is one."""
        missing = (NO_PAIR_KEYS, _NO_CHAT_KEYS, "no text key")
        return next((reason for reason in reasons if str(reason) not in missing), BadRow("no text key, and no chat"))

    def edit_row(self, row: Any, edit: Callable[[str], str]) -> Any:
        """Returns a copy of the row with every text edited; a plain text becomes {"text": ...}."""
        if isinstance(row, str):
            return {"text": edit(row)}
        if not isinstance(row, dict):
            return edit_value(row, edit)
        return {key: edit_value(value, edit) if self.may_hold_text(key) else value for key, value in row.items()}

    def _unused_keys(
        self, row: dict[str, Any], used_keys: set[str], notes: RowNotes, messages: list[Message]
    ) -> list[str]:
        """The filled keys that were not read, except metadata and texts that equal a message."""
        unused = []
        for key, value in row.items():
            if key in used_keys or key in METADATA_KEYS or str(key).lower() in METADATA_KEYS or not is_filled(value):
                continue
            if not isinstance(value, str) or not any(value == turn["content"] for turn in messages):
                unused.append(str(key))
        return [*unused, *notes.unused]


def _join_texts(value: Any, key: str) -> str:
    return "\n".join(value) if is_text_list(value) else require_text(value, key)


DEFAULT_READER = RowReader()
