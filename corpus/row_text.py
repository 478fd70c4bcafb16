"""A row of any layout -> its text, chat or pair of answers. Every command reads rows here.

    READER.text(row)            pretrain: the text of a document, or the words of a chat
    READER.chat(row)            sft: the messages
    READER.pair(row)            dpo: the prompt and two answers
    READER.content(row)         clean, dedup, decontaminate: everything that one of the others would read
    READER.edit(row, edit)      the same row, every text that one of the others would read replaced by edit(text)

    RowReader({"prompt": "ask"})   reads the question of a chat from the key `ask` (--keys prompt=ask)

A layout is chosen by the keys that have a value, row by row: a null or empty key is ignored. What is
changed or not used is listed in `Content.changes` and `Content.unused`, and counted in the report.

Read next: layouts.py (keys), chats.py (turns), readers.py (files -> rows), stats.py (the counts).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from corpus.answers import answer_of, is_texts
from corpus.chats import (
    Message,
    Notes,
    apply_turn_rules,
    chat_text,
    history_of,
    is_blank,
    is_filled,
    is_zero,
    message,
    messages_of,
)
from corpus.language import as_text, is_missing, sound_text
from corpus.layouts import ALTERNATIVES, HARMLESS
from corpus.marked_text import is_open_question, marked_turns
from corpus.pair_answers import NO_PAIR, SIDES, best_and_worst, compared_sides, conversation_of, split_pair
from corpus.row_edit import edit_value
from corpus.row_keys import Fields, RowKeys, is_compared
from corpus.spelled_turns import spells_messages
from corpus.stats import BadRow, UnfitRow

_NO_CHAT = "none of the keys of a chat"


@dataclass
class Content:
    """The content of a row. `messages` are those of a chat, or the prompt of a pair; a text has none."""

    kind: str  # "text", "chat" or "pair"
    text: str  # all of it, without markers
    messages: list[Message] = field(default_factory=list)
    answers: tuple[list[Message], ...] = ()  # of a pair: the better one, the worse one
    changes: list[str] = field(default_factory=list)  # "without ...", "with ...": how the row was changed
    unused: list[str] = field(default_factory=list)  # keys with a value that was not read


class RowReader(RowKeys):
    """Reads rows by the keys of layouts.KEYS; `keys` maps fields to the user's own keys (layouts.parse_keys)."""

    # ---- text ----
    def text(self, row: Any, fields: Fields | None = None) -> Content:
        """The document that `pretrain` trains on. Raises BadRow when there is none."""
        if isinstance(row, str):
            return Content("text", sound_text(row, "text"))
        if not isinstance(row, dict):
            return self.chat(row)
        fields = self.fields(row) if fields is None else fields
        key = self._text_key(row, fields)
        if key is not None:
            self._skip_weightless(row, fields)
            content = Content("text", sound_text(row[key], key))
            content.unused = self._unused(row, {key}, Notes(), [message("user", content.text)])
            return content
        if "messages" in fields or "answer" in fields:
            return self.chat(row, fields)
        empty = next((key for key in row if any(name == "text" for name, _ in self.roles_of(key))), None)
        if empty is not None:
            sound_text(row[empty], empty)  # raises the reason
        raise BadRow("no text key")

    def document_key(self, row: dict[str, Any]) -> str | None:
        """The key of the text that `pretrain` reads; None where the row is no document by itself."""
        return self._text_key(row, self.fields(row))

    def _text_key(self, row: dict[str, Any], fields: Fields) -> str | None:
        """The key of the document; a passage or a completion belongs to the chat where the row is one."""
        is_chat = (
            "answer" in fields and len({*fields["answer"], *fields.get("prompt", ()), *fields.get("context", ())}) > 1
        )
        of_chat = {*fields.get("answer", ()), *fields.get("context", ())} if is_chat else ()
        return next((key for key in fields.get("text", ()) if key not in of_chat), None)

    # ---- chats ----
    def chat(self, row: Any, fields: Fields | None = None) -> Content:
        """The messages that `sft` trains on, by the rules of turns. Raises BadRow or UnfitRow with the reason."""
        notes, used = Notes(), set[str]()
        if isinstance(row, dict):
            raw = self._chat_of(row, self.fields(row) if fields is None else fields, used, notes)
        elif isinstance(row, str):
            raw = marked_turns(row)
            if not raw:
                raise BadRow("plain text, not a chat")
        else:
            raw = messages_of(row, notes)
        messages = apply_turn_rules(raw, notes)
        content = Content("chat", chat_text(messages), messages, (), list(notes.changes))
        if isinstance(row, dict):
            content.unused = self._unused(row, used, notes, messages)
        return content

    def _chat_of(self, row: dict[str, Any], fields: Fields, used: set[str], notes: Notes) -> list[Message]:
        self._skip_unwanted(row, fields, used)
        turns = self._turns_key(row, fields)
        answers = fields.get("answer", [])
        if turns is not None:
            used.add(turns)
            messages = messages_of(row[turns], notes)
            if answers and messages and messages[-1]["role"] == "user":
                used.add(answers[0])
                messages += answer_of(row[answers[0]], answers[0], notes)
        elif answers and (asked := self._prompt(row, fields, set(answers[:1]), used, notes)):
            used.add(answers[0])
            messages = [*asked, *answer_of(row[answers[0]], answers[0], notes)]
        else:
            messages = self._marked_text(row, fields, used)
        return self._with_system(row, fields, messages, used)

    def _turns_key(self, row: dict[str, Any], fields: Fields) -> str | None:
        """The key of the list of turns; plain text under such a key is an error where nothing else is a chat."""
        keys = fields.get("messages", [])
        lists = [key for key in keys if not isinstance(row[key], str) or row[key].lstrip()[:1] in ("[", "{")]
        lists += [key for key in keys if isinstance(row[key], str) and marked_turns(row[key])]
        if lists or (keys and "answer" not in fields):
            return (lists or keys)[0]
        return None

    def _skip_unwanted(self, row: dict[str, Any], fields: Fields, used: set[str]) -> None:
        """Raises UnfitRow for a row that is marked as not to be trained."""
        is_kto = "completion" in row or "kto_tag" in row  # elsewhere a label of numbers is a class
        good, bad = (("true", "1"), ("false", "0")) if is_kto else (("true",), ("false",))
        for key in fields.get("label", ()):
            label = str(row[key]).strip().lower()
            if label in (*good, *bad):
                used.add(key)
                if label in bad:
                    raise UnfitRow(f"an answer that is marked as bad ({key} is false)")
        self._skip_weightless(row, fields)

    @staticmethod
    def _skip_weightless(row: dict[str, Any], fields: Fields) -> None:
        for key in fields.get("weight", ()):
            if is_zero(row[key]):
                raise UnfitRow(f"a row with {key} 0")

    def _prompt(
        self, row: dict[str, Any], fields: Fields, taken: set[str], used: set[str], notes: Notes
    ) -> list[Message]:
        """History and question, the context behind it on a new line; [] where the row has no question."""
        key = next((key for key in fields.get("prompt", ()) if key not in taken), None)
        contexts = [key for key in fields.get("context", ()) if key not in taken]
        if key is None and contexts:
            key, contexts = contexts[0], contexts[1:]
        past = next((key for key in fields.get("history", ()) if key not in taken), None)
        if key is None and past and isinstance(row[past], str) and row[past].lstrip()[:1] not in ("[", "{"):
            key, past = past, None  # SHP calls its question history
        if key is None:
            return []
        value = as_text(row[key])
        used.update((key, *contexts))
        turns: list[Message] = []
        if past:
            used.add(past)
            turns += history_of(row[past], notes)
        holds_turns = isinstance(value, (list, dict)) and not is_texts(value)
        if holds_turns or spells_messages(value) or (isinstance(value, str) and is_open_question(value)):
            asked = messages_of(value, notes)
        else:
            asked = [message("user", _joined_text(value, key))]
        if contexts:
            more = [_joined_text(row[key], key) for key in contexts]
            asked = [*asked[:-1], {**asked[-1], "content": "\n".join([asked[-1]["content"], *more])}]
        return turns + asked

    def _marked_text(self, row: dict[str, Any], fields: Fields, used: set[str]) -> list[Message]:
        """A chat written into one text with Human: and Assistant: or with ChatML's markers."""
        for key in (*fields.get("text", ()), *fields.get("prompt", ())):
            turns = marked_turns(row[key]) if isinstance(row[key], str) else []
            if turns:
                used.add(key)
                return turns
        if "chosen" in fields and "rejected" in fields:
            raise BadRow("a pair of answers: data_process.py dpo reads it")
        prompt, answer = (self.present(row, name) for name in ("prompt", "answer"))
        if answer is not None and answer not in fields.get("answer", ()) and (prompt or "context" in fields):
            if is_missing(row[answer]):
                raise BadRow(f"{answer} is null")
            raise UnfitRow("an empty answer")
        if prompt is not None and "answer" in fields and prompt not in fields.get("prompt", ()):
            sound_text(row[prompt], prompt)
        turns_key = self.present(row, "messages")
        if turns_key is not None:
            raise BadRow("the list of messages is null" if is_missing(row[turns_key]) else "no messages")
        raise BadRow(_NO_CHAT)

    def _with_system(
        self, row: dict[str, Any], fields: Fields, messages: list[Message], used: set[str]
    ) -> list[Message]:
        keys = fields.get("system", [])
        if not keys or (messages and messages[0]["role"] == "system" and not is_blank(messages[0]["content"])):
            return messages
        used.add(keys[0])
        return [message("system", sound_text(row[keys[0]], keys[0])), *messages]

    # ---- pairs ----
    def pair(self, row: Any, fields: Fields | None = None) -> Content:
        """The prompt and two answers that `dpo` compares. Raises UnfitRow where nothing is compared."""
        if not isinstance(row, dict):
            raise BadRow(NO_PAIR)
        fields = self.fields(row) if fields is None else fields
        notes, used = Notes(), set[str]()
        self._skip_unwanted(row, fields, used)
        values = self._sides(row, fields, used)
        before = self._prompt(row, fields, used, used, notes)
        if not before and "messages" in fields:
            used.add(fields["messages"][0])
            before = messages_of(row[fields["messages"][0]], notes)
            if "chosen" not in fields and before and before[-1]["role"] == "assistant":
                before = before[:-1]  # ms-swift: the better answer is the chat's last
        if not before and (blank := self.present(row, "prompt")) is not None and isinstance(values[0], str):
            sound_text(row[blank], blank)  # raises the reason
        conversations = []
        for side, value in zip(SIDES, values, strict=True):
            whole = conversation_of(side, value, before, notes)
            whole = self._with_system(row, fields, whole, used)
            messages = apply_turn_rules(whole, notes, cut=False)
            conversations.append([message(turn["role"], turn["content"]) for turn in messages])  # weights are for SFT
        prompt, *answers = split_pair(*conversations)
        turns = [*prompt, *answers[0], *answers[1]]
        unused = self._unused(row, used, notes, turns)
        return Content("pair", chat_text(turns), prompt, tuple(answers), list(notes.changes), unused)

    def _sides(self, row: dict[str, Any], fields: Fields, used: set[str]) -> tuple[Any, Any]:
        """The better and the worse answer: two keys, a ranked list, or two answers and a mark."""
        better, worse = (fields.get(side, [None])[0] or self.present(row, side) for side in SIDES)
        if better is not None and worse is not None and ("chosen" in fields or "rejected" in fields):
            used.update((better, worse))
            return row[better], row[worse]
        whole = [*fields.get("answer", ()), *fields.get("messages", ())]
        if better is None and "rejected" in fields and whole:
            used.update((whole[0], fields["rejected"][0]))
            return row[whole[0]], row[fields["rejected"][0]]
        if compared := compared_sides(row, used):
            return compared
        for key in fields.get("answer", ()):
            if (
                isinstance(row[key], (list, tuple))
                and len(row[key]) > 1
                and not (key in ALTERNATIVES and is_texts(row[key]))
            ):
                used.add(key)
                return best_and_worst(row[key])
        raise BadRow(NO_PAIR)

    # ---- everything ----
    def content(self, row: Any) -> Content:
        """Everything that text(), chat() or pair() would read, each text once; `kind` is the most specific of them."""
        found: list[Content] = []
        reasons: list[BadRow] = []
        fields = self.fields(row) if isinstance(row, dict) else {}
        for read in self._readers(row, fields):
            try:
                found.append(read(row, fields))
            except BadRow as reason:
                reasons.append(reason)
        if not found:
            raise next((reason for reason in reasons if isinstance(reason, UnfitRow)), self._reason(row, reasons))
        best = found[0]
        if len(found) == 1:
            return best
        texts: dict[str, None] = {}
        for other in found:
            turns = [*other.messages, *(turn for answer in other.answers for turn in answer)]
            texts.update(dict.fromkeys([turn["content"] for turn in turns] or [other.text]))
        unused = self._common_unused(found)
        return Content(best.kind, "\n".join(texts), best.messages, best.answers, best.changes, unused)

    def _readers(self, row: Any, fields: Fields) -> list[Callable[[Any, Fields | None], Content]]:
        """Those of pair(), chat() and text() that may read this row, the most specific first."""
        if not isinstance(row, dict):
            return [self.chat, self.text] if isinstance(row, str) else [self.chat]
        text = self._text_key(row, fields)
        ranked = any(isinstance(row[key], (list, tuple)) for key in fields.get("answer", ()))
        pair = "chosen" in fields or "rejected" in fields or ranked or any(map(is_compared, row))
        marked = text is not None and isinstance(row[text], str) and bool(marked_turns(row[text]))
        chat = "messages" in fields or "answer" in fields or marked
        applies = ((pair, self.pair), (chat, self.chat), (text is not None, self.text))
        return [read for may_read, read in applies if may_read] or [self.chat, self.text]

    @staticmethod
    def _common_unused(found: list[Content]) -> list[str]:
        return [key for key in found[0].unused if all(key in other.unused for other in found)]

    @staticmethod
    def _reason(row: Any, reasons: list[BadRow]) -> BadRow:
        """The most specific reason: that a kind of keys is missing only if there is no other."""
        missing = (NO_PAIR, _NO_CHAT, "no text key")
        return next((reason for reason in reasons if str(reason) not in missing), BadRow("no text key, and no chat"))

    def edit(self, row: Any, edit: Callable[[str], str]) -> Any:
        """A copy of the row with every text edited; a plain text becomes {"text": ...}."""
        if isinstance(row, str):
            return {"text": edit(row)}
        if not isinstance(row, dict):
            return edit_value(row, edit)
        return {key: edit_value(value, edit) if self.holds_text(key) else value for key, value in row.items()}

    def _unused(self, row: dict[str, Any], used: set[str], notes: Notes, messages: list[Message]) -> list[str]:
        """The keys with a value that was not read, except metadata and text that a message repeats."""
        unused = []
        for key, value in row.items():
            if key in used or key in HARMLESS or str(key).lower() in HARMLESS or not is_filled(value):
                continue
            if not isinstance(value, str) or not any(value == turn["content"] for turn in messages):
                unused.append(str(key))
        return [*unused, *notes.unused]


def _joined_text(value: Any, key: str) -> str:
    return "\n".join(value) if is_texts(value) else sound_text(value, key)


READER = RowReader()
