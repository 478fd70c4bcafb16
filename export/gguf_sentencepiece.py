"""Converts a SentencePiece BPE tokenizer (Llama 2, TinyLlama, Mistral 7B) to llama.cpp's `llama` tokenizer.

    tokenizer.json                                          GGUF
    merges in order of rank                                 scores: minus the rank of the merge that makes a piece
    Prepend ▁, or Metaspace that prepends                   add_space_prefix
    <unk>, <s> and other control tokens, <0x00> ... <0xFF>  types unknown, control, byte

llama.cpp merges any two neighbours whose concatenation is a piece: the highest score first, then the leftmost.
Characters without a piece become bytes. tokenizer.json merges only the pairs that it lists. Both give the same tokens
if every pair that makes a piece is listed, as in files converted from a SentencePiece model. Other tokenizers may lack
pairs: `check_sentencepiece` compares all pieces, random pairs and a chat, and raises at the first difference. This is a
large sample, not a proof. A control token typed by a user stays text here; in llama.cpp it stays text only if no two
pieces merge to it.

Source: llama.cpp's src/llama-vocab.cpp (llm_tokenizer_spm); Kudo and Richardson 2018 (SentencePiece).
Read next: gguf_tokenizer.py, which calls this module.
"""

import heapq
import json
import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import UserError
from export.verify_hf import SAMPLE_TEXTS, sample_chat_ids, sample_chat_text
from model.tokenizer import ChatTokenizer

SPACE = "▁"
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
TOKEN_NORMAL, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED, TOKEN_UNUSED, TOKEN_BYTE = range(1, 7)  # gguf.TokenType
NUM_RANDOM_PAIRS = 4000  # random pairs of pieces that `check_sentencepiece` encodes


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """The tokenizer as the GGUF file stores it. The index in each list is the token id."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    add_space_prefix: bool

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The token ids that llama.cpp returns without bos. With `parse_special`, control tokens in text are parsed."""
        pattern = self._all_tokens if parse_special else self._user_defined
        ids: list[int] = []
        for i, part in enumerate(pattern.split(text)):  # the separators, at odd indices, are tokens
            if i % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self._merge_pieces((" " if self.add_space_prefix else "") + part)
        return ids

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @cached_property
    def _all_tokens(self) -> re.Pattern[str]:
        return self._type_pattern(TOKEN_USER_DEFINED, TOKEN_CONTROL, TOKEN_UNKNOWN)

    @cached_property
    def _user_defined(self) -> re.Pattern[str]:
        return self._type_pattern(TOKEN_USER_DEFINED)

    def _type_pattern(self, *kinds: int) -> re.Pattern[str]:
        """A pattern with one group that matches the tokens of these types, the longest first."""
        found = [piece for piece, kind in zip(self.pieces, self.types, strict=True) if kind in kinds]
        return re.compile("(" + ("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)") + ")")

    def _merge_pieces(self, text: str) -> list[int]:
        token_ids = self._ids
        symbols = list(text.replace(" ", SPACE))
        following = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def push_candidate(left: int, right: int) -> None:
            joined = symbols[left] + symbols[right] if left >= 0 <= right else ""
            if joined in token_ids:
                heapq.heappush(queue, (-self.scores[token_ids[joined]], left, right, joined))

        for i in range(len(symbols) - 1):
            push_candidate(i, i + 1)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
                continue  # stale: one of the two was already merged with another neighbour
            symbols[left], symbols[right] = joined, ""
            following[left] = following[right]
            if following[right] >= 0:
                before[following[right]] = left
            push_candidate(before[left], left)
            push_candidate(left, following[left])
        ids: list[int] = []
        for symbol in filter(None, symbols):
            found = token_ids.get(symbol)
            ids += [found] if found is not None else [token_ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return ids


def is_sentencepiece(tokenizer: ChatTokenizer) -> bool:
    """Whether the tokenizer is a BPE over characters that writes a space as ▁."""
    content = json.loads(tokenizer.files["tokenizer.json"])
    steps = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False)
    return content["model"].get("type") == "BPE" and SPACE in steps and "ByteLevel" not in steps


def build_vocabulary(tokenizer: ChatTokenizer, vocab_size: int) -> SentencePieceVocabulary:
    """The vocabulary for llama.cpp, not compared yet. Raises UserError for a step that llama.cpp does not have."""
    content = json.loads(tokenizer.files["tokenizer.json"])
    model = content["model"]
    prefix = has_space_prefix(content)
    ids: dict[str, int] = tokenizer.backend.get_vocab(with_added_tokens=True)
    if not model.get("byte_fallback") or not BYTE_PIECES.keys() <= ids.keys():
        raise_unsupported("llama.cpp encodes unknown characters as bytes, and this one has no byte fallback")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if any(part in BYTE_PIECES for merge in merges for part in merge):
        raise_unsupported("llama.cpp never merges bytes of unknown characters, and this one does")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    names = {i: piece for piece, i in ids.items()}
    pieces = [names.get(i, f"[unused{i}]") for i in range(vocab_size)]
    scores = [-float(ranks.get(piece, len(merges))) for piece in pieces]
    added = tokenizer.backend.get_added_tokens_decoder()
    types = []
    for i, piece in enumerate(pieces):
        kind = TOKEN_NORMAL if i in names else TOKEN_UNUSED
        if i in added:
            kind = TOKEN_CONTROL if added[i].special else TOKEN_USER_DEFINED
        types.append(TOKEN_BYTE if piece in BYTE_PIECES else TOKEN_UNKNOWN if piece == model.get("unk_token") else kind)
    return SentencePieceVocabulary(pieces, scores, types, prefix)


def has_space_prefix(content: dict[str, Any]) -> bool:
    """Whether a ▁ is prepended to text. Raises UserError for a step before the merges that llama.cpp does not have."""
    normalizer, cut = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    prepends = False
    for step in [*steps, *(cut.get("pretokenizers", [cut]) if cut else [])]:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prepends = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE:
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            prepends = prepends or scheme != "never"
            if step.get("split", True) and any(SPACE in piece[1:] for piece in content["model"]["vocab"]):
                raise_unsupported("llama.cpp merges across words, and this one does not")
        elif not (kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE):
            raise_unsupported(f"llama.cpp has no {kind} before the merges")
    return prepends


def metaspace_scheme(tokenizer: ChatTokenizer) -> str:
    """prepend_scheme of the Metaspace step: always, first (at the start of a text) or never; "" without the step."""
    cut = json.loads(tokenizer.files["tokenizer.json"]).get("pre_tokenizer") or {}
    for step in cut.get("pretokenizers", [cut]):
        if step.get("type") == "Metaspace":
            return str(step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"))
    return ""


def tokenizer_caveat(tokenizer: ChatTokenizer) -> str:
    """A note on text that llama.cpp tokenizes differently, or ""."""
    if is_sentencepiece(tokenizer) and metaspace_scheme(tokenizer) in ("always", "first"):
        return "; text that begins with a space has one more ▁ in llama.cpp"
    return ""


def check_sentencepiece(tokenizer: ChatTokenizer) -> None:
    """Raises UserError if llama.cpp cannot represent the tokenizer, naming the step or the first differing text."""
    vocab = build_vocabulary(tokenizer, tokenizer.vocab_size)
    normal_pieces = [piece for piece, kind in zip(vocab.pieces, vocab.types, strict=True) if kind == TOKEN_NORMAL]
    rng = random.Random(0)
    texts = [
        *SAMPLE_TEXTS,
        *normal_pieces,
        *("".join(rng.choices(normal_pieces, k=2)) for _ in range(NUM_RANDOM_PAIRS if normal_pieces else 0)),
    ]
    texts = [text.replace(SPACE, " ") for text in texts]
    if tokenizer_caveat(tokenizer):
        texts = [text.lstrip(" ") for text in texts]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if vocab.encode(text) != ids:
            raise_unsupported(
                f"llama.cpp, which merges any two neighbours that make a piece, tokenizes {text[:40]!r} differently"
            )
    chat = sample_chat_ids(tokenizer)
    if chat and vocab.encode(sample_chat_text(tokenizer), parse_special=True) != chat:
        prefixed = metaspace_scheme(tokenizer) == "first"
        raise_unsupported(
            "llama.cpp adds a ▁ after each control token of a chat, this one only at the start of a text"
            if prefixed
            else "llama.cpp tokenizes a rendered chat differently"
        )


def raise_unsupported(reason: str) -> None:
    raise UserError(f"--gguf: GGUF does not support this SentencePiece tokenizer: {reason}: leave out --gguf")
