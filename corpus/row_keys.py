"""Maps the keys of a row to fields: the inverse of layouts.FIELD_KEYS, with the user's own keys (--keys).

Read next: layouts.py (the keys), row_text.py (reads the fields).
"""

from functools import lru_cache
from typing import Any

from corpus.chats import is_filled
from corpus.layouts import COMPARISON_KEYS, FIELD_KEYS
from corpus.stats import DroppedRow

_COMPARISON_KEY_NAMES = frozenset(key.lower() for first, second, _, _ in COMPARISON_KEYS for key in (first, second))
_NON_TEXT_FIELDS = ("tools", "label", "weight")  # fields without text

FieldKeys = dict[str, list[str]]  # field of layouts.FIELD_KEYS -> the row's filled keys, in order of priority


@lru_cache(maxsize=4096)
def is_comparison_key(key: Any) -> bool:
    """True for the key of one of two compared answers (layouts.COMPARISON_KEYS)."""
    return str(key).strip().lower() in _COMPARISON_KEY_NAMES


def check_labels(row: dict[str, Any], keys: list[str]) -> list[str]:
    """The keys that hold a label of KTO, good or bad. Raises DroppedRow if one is bad."""
    is_kto = "completion" in row or "kto_tag" in row  # in other datasets a numeric label is a class
    good, bad = (("true", "1"), ("false", "0")) if is_kto else (("true",), ("false",))
    labels = {key: str(row[key]).strip().lower() for key in keys}
    for key, label in labels.items():
        if label in bad:
            raise DroppedRow(f"an answer that is marked as bad ({key} is false)")
    return [key for key, label in labels.items() if label in good]


class RowKeys:
    """Maps keys to fields; `keys` maps fields to the user's own keys (layouts.parse_keys)."""

    def __init__(self, keys: dict[str, str] | None = None) -> None:
        self.keys = dict(keys or {})
        self._table: dict[str, list[tuple[str, int]]] = {}
        for name, usual_keys in FIELD_KEYS.items():
            own_key = self.keys.get(name)
            for rank, key in enumerate((own_key,) if own_key else usual_keys):
                if own_key or key not in self.keys.values():
                    self._table.setdefault(key, []).append((name, rank))

    def key_settings(self) -> dict[str, Any]:
        """Returns the user's own keys as a part of the job settings; {} if there are none."""
        return {"keys": self.keys} if self.keys else {}

    def filled_fields(self, row: dict[str, Any]) -> FieldKeys:
        """Returns the filled keys of every field."""
        ranked: dict[str, list[tuple[int, str]]] = {}
        for key, value in row.items():
            if (fields := self.key_fields(key)) and is_filled(value):
                for name, rank in fields:
                    ranked.setdefault(name, []).append((rank, key))
        return {name: [key for _, key in sorted(keys)] for name, keys in ranked.items()}

    def key_fields(self, key: str) -> list[tuple[str, int]]:
        """Returns the fields that a key may hold, each with the priority of the key (0: first)."""
        return self._table.get(key) or self._table.get(str(key).strip().lower(), [])

    def first_key(self, row: dict[str, Any], name: str) -> str | None:
        """Returns the first key of a field in the row, filled or not; None if the row has none."""
        present = [(rank, key) for key in row for other, rank in self.key_fields(key) if other == name]
        return min(present)[1] if present else None

    def may_hold_text(self, key: str) -> bool:
        """True for a key whose value may be trained on."""
        return is_comparison_key(key) or any(name not in _NON_TEXT_FIELDS for name, _ in self.key_fields(key))
