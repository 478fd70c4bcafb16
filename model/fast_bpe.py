"""Encodes many texts with a byte-level BPE of this project, to the ids of the `tokenizers` library, five times as fast.

    characters x y     that no merge joins: the ids before and after are independent of each other
    text               -> segments, split between all such pairs: 1.3 Chinese or 4 English characters each
    segments           -> ids, from a cache; `tokenizers` encodes those that are not in it
    last merges        whose results no other merge reads, such as phrases: found in the ids of all texts at once

`tokenizers` caches the ids of words, but phrases span words, so it gets whole lines and finds none of them in its
cache. BPE applies merges by rank. The last merges therefore follow all others, and a token takes part in one of them at
most. Without them, segments are shorter.

Read next: tokenizer.py (`ChatTokenizer.encode_arrays`), ../corpus/tokenizer_training.py (trains the merges).
"""

import json
from itertools import accumulate, pairwise, repeat
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# Every character alone decides where this pattern splits. "<" is separate, so that the unigram tokenizer never encodes
# the text "<0x41>" as the byte 0x41.
LINE_PATTERN = r"\n|\p{N}|<|[^\n\p{N}<]+"
MAX_CACHED_CHARACTERS = 4_000_000
SLOT_BITS = 18  # of the hash table of short segments; 3 MB
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio
_CODE_POINTS = 0x110000
_MODEL: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}  # nosec B105
_MODEL |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}

# Byte-level BPE writes each byte as one visible character: printable bytes as themselves, others from U+0100 (GPT-2).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def is_line_bpe(state: dict[str, Any]) -> bool:
    """Whether a parsed tokenizer.json is a BPE as corpus/tokenizer_training.py trains it; FastBPE encodes no other."""
    model, steps = state["model"], (state["pre_tokenizer"] or {}).get("pretokenizers", [])
    return (
        all(model.get(name, "") == value for name, value in _MODEL.items())
        and model["vocab"].keys() >= BYTE_OF_CHARACTER.keys()  # a byte without an id would be skipped
        and len(set(map(tuple, model["merges"]))) == len(model["merges"])
        and not state["normalizer"]
        and all(token["special"] for token in state["added_tokens"])
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and (steps[0]["pattern"], steps[0]["behavior"]) == ({"Regex": LINE_PATTERN}, "Isolated")
        and not (steps[0]["invert"] or steps[1]["add_prefix_space"] or steps[1]["use_regex"])
    )


class FastBPE:
    """Encodes text in which special tokens are plain text. `state`: a tokenizer.json for which `is_line_bpe` holds."""

    def __init__(self, state: dict[str, Any]) -> None:
        vocab, merges = state["model"]["vocab"], state["model"]["merges"]
        operands = {piece for merge in merges for piece in merge}
        lines = Tokenizer.from_str(json.dumps(state)).pre_tokenizer
        first = len(merges)  # of the last merges
        while first and _is_last_merge(merges[first - 1], operands, lines):
            first -= 1
        state = {**state, "model": {**state["model"], "merges": merges[:first]}}
        self.backend = Tokenizer.from_str(json.dumps(state))
        self.backend.encode_special_tokens = True
        self._find_splits([left + right for left, right in merges[:first]])

        pairs = sorted((vocab[a] << 32 | vocab[b], rank, vocab[a + b]) for rank, (a, b) in enumerate(merges[first:]))
        self.pairs, self.ranks, self.results = np.array([(-1, 0, 0), *pairs], np.int64).T.copy()
        self.is_left, self.is_right = np.zeros((2, max(vocab.values()) + 1), bool)
        self.is_left[self.pairs[1:] >> 32] = self.is_right[self.pairs[1:] & 0xFFFFFFFF] = True
        self._clear()

    def _find_splits(self, pieces: list[str]) -> None:
        """Set `splits[before[x] + after[y]]`: whether no piece spans the boundary between the characters x and y.

        A piece may begin or end inside a character: then no text is split next to the character on its other side.
        """
        joined, never_after, never_before, lead_bytes = set(), set(), set(), set()
        for piece in pieces:
            # "surrogateescape" maps each byte of an incomplete character to U+DC80 … U+DCFF
            text = bytes(BYTE_OF_CHARACTER.get(c, 0) for c in piece).decode("utf-8", "surrogateescape")
            for x, y in pairwise(text):
                x_complete, y_complete = (not "\udc80" <= c <= "\udcff" for c in (x, y))
                if x_complete and y_complete:
                    joined.add((x, y))
                elif x_complete:
                    never_after.add(x)
                elif y_complete:
                    never_before.add(y)
                elif y >= "\udcc0":
                    lead_bytes.add(ord(y) - 0xDC00)
        rows = {x: i for i, x in enumerate({x for x, _ in joined} | never_after, start=1)}
        columns = {y: i for i, y in enumerate({y for _, y in joined} | never_before, start=2)}
        self.before, self.after = np.zeros((2, _CODE_POINTS), np.uint32)
        splits = np.ones((len(rows) + 1, len(columns) + 2), bool)
        self.before[[*map(ord, rows)]] = np.array([*rows.values()], np.uint32) * splits.shape[1]
        self.after[[*map(ord, columns)]] = [*columns.values()]
        splits[[rows[x] for x, _ in joined], [columns[y] for _, y in joined]] = False
        splits[[rows[x] for x in never_after]] = False
        splits[:, [1, *(columns[y] for y in never_before)]] = False
        for byte in lead_bytes:
            bits = 6 if byte < 0xE0 else 12 if byte < 0xF0 else 18  # of the continuation bytes
            start = (byte & (0x1F if bits == 6 else 0x0F if bits == 12 else 0x07)) << bits
            self.after[start : start + (1 << bits)] = 1
        self.splits = splits.ravel()

    def _clear(self) -> None:
        """Empty the cache. Entry i has the ids flat[offsets[i] : offsets[i] + lengths[i]]."""
        self.entries: dict[str, int] = {}  # of all segments
        self.slot_keys = np.full(1 << SLOT_BITS, -1, np.int64)  # of segments of 1 to 3 characters, by hash
        self.slot_entries = np.zeros(1 << SLOT_BITS, np.int32)
        self.flat, self.lengths, self.offsets = np.zeros((3, 0), np.int64)
        self.cached_characters = 0

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, arrays of shape (tokens,), uint32. Raises UnicodeEncodeError for a lone surrogate."""
        joined = "".join(texts)
        if not joined:
            return [np.zeros(0, np.uint32) for _ in texts]
        codes = np.frombuffer(joined.encode("utf-32-le"), "<u4")
        text_ends = np.fromiter(accumulate(map(len, texts)), np.int64, len(texts))
        is_end = np.append(self.splits[self.before[codes[:-1]] + self.after[codes[1:]]], True)
        is_end[text_ends[text_ends > 0] - 1] = True
        ends = np.flatnonzero(is_end) + 1  # of the segments
        starts = np.append(0, ends[:-1])
        entries = self._find_entries(joined, codes, starts, ends)
        lengths = self.lengths[entries]
        token_ends = np.cumsum(lengths)
        ids = self.flat[np.repeat(self.offsets[entries] - token_ends + lengths, lengths) + np.arange(token_ends[-1])]
        text_ends = np.append(0, token_ends)[np.searchsorted(ends, text_ends, "right")]
        ids, text_ends = self._apply_last_merges(ids, text_ends)
        return np.split(ids.astype(np.uint32), text_ends[:-1])

    def _find_entries(self, joined: str, codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The cache entry of each segment; encodes new segments."""
        if self.cached_characters > MAX_CACHED_CHARACTERS:
            self._clear()
        sizes, padded = ends - starts, np.append(codes, [0, 0]).astype(np.int64)
        keys = padded[starts] | (padded[starts + 1] << 21) * (sizes > 1) | (padded[starts + 2] << 42) * (sizes > 2)
        slots = (keys.astype(np.uint64) * _HASH_FACTOR >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        is_short = sizes <= 3
        entries: np.ndarray = np.where(
            (self.slot_keys[slots] == keys) & is_short, self.slot_entries[slots], np.int32(-1)
        )
        others = np.flatnonzero(entries < 0)
        segments = [
            joined[start:end] for start, end in zip(starts[others].tolist(), ends[others].tolist(), strict=True)
        ]
        found = np.fromiter(map(self.entries.get, segments, repeat(-1)), np.int32, len(segments))
        if len(missing := np.flatnonzero(found < 0)):
            new = [segments[i] for i in missing.tolist()]
            self._add_entries([*dict.fromkeys(new)])
            found[missing] = [self.entries[segment] for segment in new]
        entries[others] = found
        others = others[is_short[others]]
        self.slot_keys[slots[others]], self.slot_entries[slots[others]] = keys[others], entries[others]
        return entries

    def _add_entries(self, segments: list[str]) -> None:
        ids = [encoding.ids for encoding in self.backend.encode_batch_fast(segments, add_special_tokens=False)]
        self.entries.update(zip(segments, range(len(self.entries), len(self.entries) + len(segments)), strict=True))
        self.lengths = np.append(self.lengths, [*map(len, ids)])
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.flat = np.append(self.flat, [i for segment_ids in ids for i in segment_ids])
        self.cached_characters += sum(map(len, segments))

    def _apply_last_merges(self, ids: np.ndarray, text_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Merge neighbouring ids of one text, the pair of the lowest rank first, the left one of equal pairs."""
        may_merge = self.is_left[ids[:-1]] & self.is_right[ids[1:]]
        inner_ends = text_ends[(text_ends > 0) & (text_ends < len(ids))]
        may_merge[inner_ends - 1] = False
        at = np.flatnonzero(may_merge)
        keys = ids[at] << 32 | ids[at + 1]
        pair = np.searchsorted(self.pairs, keys, "right") - 1
        is_pair = self.pairs[pair] == keys
        at, pair = at[is_pair], pair[is_pair]
        order = self.ranks[pair] * len(ids) + at
        while (touches := np.diff(at) == 1).any():  # two pairs share a token: those with no earlier neighbour win
            first_earlier = order[:-1] < order[1:]
            loses = np.append(False, touches & first_earlier) | np.append(touches & ~first_earlier, False)
            beaten = np.append(False, touches & ~loses[:-1]) | np.append(touches & ~loses[1:], False)
            at, pair, order = at[~beaten], pair[~beaten], order[~beaten]
        ids[at] = self.results[pair]
        return np.delete(ids, at + 1), text_ends - np.searchsorted(at + 1, text_ends)


def _is_last_merge(merge: list[str], operands: set[str], lines: Any) -> bool:
    """Whether no merge reads the result, and the merge joins whole characters of one line."""
    left, right = merge
    try:
        text = "".join(bytes(BYTE_OF_CHARACTER[c] for c in piece).decode() for piece in merge)
    except (KeyError, UnicodeDecodeError):
        return False
    return left + right not in operands and len(lines.pre_tokenize_str(text)) == 1
