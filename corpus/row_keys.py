"""Which keys of a row hold which field: the inverse of layouts.KEYS, with the user's own keys (--keys) in their place.

Read next: layouts.py (the keys), row_text.py (what is read from them).
"""

from functools import lru_cache
from typing import Any

from corpus.chats import is_filled
from corpus.layouts import COMPARISONS, KEYS

_COMPARED = frozenset(key.lower() for first, second, _, _ in COMPARISONS for key in (first, second))
_NO_TEXT = ("label", "weight")  # fields whose keys hold no text

Fields = dict[str, list[str]]  # field of layouts.KEYS -> the row's filled keys, first choice first


@lru_cache(maxsize=4096)
def is_compared(key: Any) -> bool:
    """True for the key of an answer that stands beside another one (layouts.COMPARISONS)."""
    return str(key).strip().lower() in _COMPARED


class RowKeys:
    """The fields that the keys of a row hold; `keys` maps fields to the user's own keys (layouts.parse_keys)."""

    def __init__(self, keys: dict[str, str] | None = None) -> None:
        self.keys = dict(keys or {})
        self._table: dict[str, list[tuple[str, int]]] = {}
        for name, usual in KEYS.items():
            own = self.keys.get(name)
            for rank, key in enumerate((own,) if own else usual):
                if own or key not in self.keys.values():
                    self._table.setdefault(key, []).append((name, rank))

    def job(self) -> dict[str, Any]:
        """The user's own keys as a part of a job's settings; {} without any."""
        return {"keys": self.keys} if self.keys else {}

    def fields(self, row: dict[str, Any]) -> Fields:
        """The filled keys of every field."""
        ranked: dict[str, list[tuple[int, str]]] = {}
        for key, value in row.items():
            if (roles := self.roles_of(key)) and is_filled(value):
                for name, rank in roles:
                    ranked.setdefault(name, []).append((rank, key))
        return {name: [key for _, key in sorted(keys)] for name, keys in ranked.items()}

    def roles_of(self, key: str) -> list[tuple[str, int]]:
        """The fields that a key may hold, each with its rank among the keys of that field."""
        return self._table.get(key) or self._table.get(str(key).strip().lower(), [])

    def present(self, row: dict[str, Any], name: str) -> str | None:
        """The first key of a field that the row has, filled or not."""
        present = [(rank, key) for key in row for other, rank in self.roles_of(key) if other == name]
        return min(present)[1] if present else None

    def holds_text(self, key: str) -> bool:
        """True for a key whose value a command may train on."""
        return is_compared(key) or any(name not in _NO_TEXT for name, _ in self.roles_of(key))
