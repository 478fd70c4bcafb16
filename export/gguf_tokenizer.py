"""Writes the tokenizer of a GGUF file: llama.cpp then gives the same ids for every text.

    byte-level BPE             tokenizer.ggml.model gpt2, with merges and the name of a pre-tokenizer
    BPE over characters and ▁  tokenizer.ggml.model llama (SentencePiece: Llama 2, TinyLlama, Mistral 7B)
        merges in order of rank                                 scores: minus the rank of the merge that makes a piece
        Prepend ▁, or Metaspace that prepends                   add_space_prefix
        <unk>, <s> and other control tokens, <0x00> ... <0xFF>  types unknown, control, byte

llama.cpp identifies a pre-tokenizer, the split of text before byte-pair merges, by a name and not by a pattern. Our own
splits at line ends, digits and "<"; llama.cpp's "superbpe" splits at numbers only. Both give the same tokens as long as
no piece of the vocabulary crosses one of our splits, which is checked before a file is written.

In a `llama` vocabulary, llama.cpp merges any two neighbours whose concatenation is a piece: the highest score first,
then the leftmost. Characters without a piece become bytes. tokenizer.json merges only the pairs that it lists. Both
give the same tokens if every pair that makes a piece is listed, as in files converted from a SentencePiece model. Other
tokenizers may lack pairs: `check_sentencepiece` compares all pieces, random pairs and a chat, and raises at the first
difference. This is a large sample, not a proof. A control token typed by a user stays text here; in llama.cpp it stays
text only if no two pieces merge to it.

Source: llama.cpp's src/llama-vocab.cpp (llm_tokenizer_spm), the gguf package; Kudo and Richardson 2018 (SentencePiece).
Read next: verify_gguf.py; gguf_export.py calls this module.
"""

import json
import math
import random
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import UserError
from corpus.tokenizer_training import vocab_bytes
from export.hf_export import bos_id
from export.verify_hf import SAMPLE_TEXTS, sample_chat_ids, sample_chat_text
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer

# Patterns of byte-level pre-tokenizers; PRE_TOKENIZERS maps each to its name in llama.cpp.
_WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PUNCTUATION_PATTERN = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
OWN_PATTERN = r"\n|\p{N}|<|[^\n\p{N}<]+"
SENTENCEPIECE_PRE_TOKENIZER = "default"  # llama.cpp's name for no pre-tokenizer
PRE_TOKENIZERS = {
    OWN_PATTERN: "superbpe",
    _WORD_PATTERN + r"\p{N}" + _PUNCTUATION_PATTERN: "qwen2",
    _WORD_PATTERN + r"\p{N}{1,3}" + _PUNCTUATION_PATTERN: "llama-bpe",
    "": "gpt-2",  # ByteLevel's own pattern
}
SPACE = "▁"
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
TOKEN_NORMAL, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED, TOKEN_UNUSED, TOKEN_BYTE = range(1, 7)  # gguf.TokenType
NUM_RANDOM_PAIRS = 4000  # random pairs of pieces that `check_sentencepiece` encodes


def pre_tokenizer_name(tokenizer: ChatTokenizer) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises UserError if it has none, or would give other tokens."""
    if is_sentencepiece(tokenizer):
        check_sentencepiece(tokenizer)
        return SENTENCEPIECE_PRE_TOKENIZER
    content = json.loads(tokenizer.files["tokenizer.json"])
    kind, cut = content["model"].get("type"), content.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    byte_level = steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    normalizer = content.get("normalizer")
    if kind != "BPE" or not byte_level or normalizer not in (None, {"type": "NFC"}):
        hint = "llama.cpp has no pre-tokenizer for it"
        if kind == "Unigram":
            hint = "llama.cpp has no byte fallback for it"
        elif kind == "BPE" and byte_level:
            hint = f"llama.cpp does not apply {normalizer.get('type')}"
        raise UserError(f"--gguf: GGUF does not support this {kind} tokenizer ({hint}): use byte-level BPE")
    patterns = [step.get("pattern", {}).get("Regex", "?") for step in steps[:-1]]
    pattern = patterns[0] if len(patterns) == 1 else "?" if patterns or not steps[-1].get("use_regex", True) else ""
    if pattern not in PRE_TOKENIZERS:
        shown = " ".join(patterns)[:80]
        raise UserError(f"--gguf: llama.cpp has no pre-tokenizer with this pattern ({shown}): leave out --gguf")
    if pattern == OWN_PATTERN and (bad := piece_across_cut(tokenizer)):
        crosses = f"the piece {bad!r} crosses a line end, a digit or '<', and llama.cpp would use it"
        raise UserError(f"--gguf: {crosses}: leave out --gguf")
    return PRE_TOKENIZERS[pattern]


def piece_across_cut(tokenizer: ChatTokenizer) -> str:
    """A piece of the vocabulary that crosses a split of our own pre-tokenizer, or ""."""
    added = tokenizer.backend.get_added_tokens_decoder()
    for index, raw in enumerate(vocab_bytes(tokenizer.backend)):
        piece = raw.decode("utf-8", "replace")
        cut = any(character in "\n<" or unicodedata.category(character).startswith("N") for character in piece)
        if cut and len(piece) > 1 and index not in added:
            return piece
    return ""


def write_tokenizer(gguf: Any, writer: Any, tokenizer: ChatTokenizer, config: ModelConfig, pre: str) -> None:
    """Write pieces, merges, special tokens and the chat template."""
    if pre == SENTENCEPIECE_PRE_TOKENIZER:
        write_sentencepiece(writer, tokenizer, config)
    else:
        write_byte_level_bpe(gguf, writer, tokenizer, config)
    writer.add_tokenizer_pre(pre)
    bos = bos_id(tokenizer)
    writer.add_bos_token_id(tokenizer.eos_id if bos is None else bos)  # llama.cpp's default is token 11
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.end_of_turn_id != tokenizer.eos_id:
        writer.add_eot_token_id(tokenizer.end_of_turn_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(bos is not None and tokenizer.encode_document("a")[:1] == [bos])
    if tokenizer.format:
        writer.add_chat_template(tokenizer.format.template)


def write_byte_level_bpe(gguf: Any, writer: Any, tokenizer: ChatTokenizer, config: ModelConfig) -> None:
    names: dict[int, str] = {i: piece for piece, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added, special = tokenizer.backend.get_added_tokens_decoder(), tokenizer.special_ids
    kinds = {i: gguf.TokenType.CONTROL if i in special else gguf.TokenType.USER_DEFINED for i in added}
    pieces = [names.get(i, f"[unused{i}]") for i in range(config.vocab_size)]
    types = [kinds.get(i, gguf.TokenType.NORMAL) if i in names else gguf.TokenType.UNUSED for i in range(len(pieces))]
    merges = json.loads(tokenizer.files["tokenizer.json"])["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_space_prefix(False)


def write_sentencepiece(writer: Any, tokenizer: ChatTokenizer, config: ModelConfig) -> None:
    vocab = build_vocabulary(tokenizer, config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocab.pieces)
    writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    writer.add_add_space_prefix(vocab.add_space_prefix)
    if TOKEN_UNKNOWN in vocab.types:
        writer.add_unk_token_id(vocab.types.index(TOKEN_UNKNOWN))


# ---- SentencePiece --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SentencePieceVocabulary:
    """The tokenizer as the GGUF file stores it. The index in each list is the token id."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    add_space_prefix: bool

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The token ids that llama.cpp returns without bos. With `parse_special`, control tokens in text are parsed."""
        ids: list[int] = []
        for i, part in enumerate(
            self._patterns[parse_special].split(text)
        ):  # the separators, at odd indices, are tokens
            if i % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self._merge_pieces((" " if self.add_space_prefix else "") + part)
        return ids

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        """One group that matches tokens in text, the longest first: [without, with] those that only a parser finds."""
        patterns = []
        for kinds in ([TOKEN_USER_DEFINED], [TOKEN_USER_DEFINED, TOKEN_CONTROL, TOKEN_UNKNOWN]):
            found = [piece for piece, kind in zip(self.pieces, self.types, strict=True) if kind in kinds]
            alternatives = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
            patterns.append(re.compile(f"({alternatives or '(?!)'})"))
        return patterns

    def _merge_pieces(self, text: str) -> list[int]:
        """Merge the pair with the highest score, the leftmost first, until no pair makes a piece."""
        ids, symbols = self._ids, list(text.replace(" ", SPACE))

        def pair_score(i: int) -> float:
            joined = symbols[i] + symbols[i + 1]
            return self.scores[ids[joined]] if joined in ids else -math.inf

        scores = [pair_score(i) for i in range(len(symbols) - 1)]
        while scores and max(scores) > -math.inf:
            i = scores.index(max(scores))
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            del scores[i]
            for changed in range(max(i - 1, 0), min(i + 1, len(scores))):
                scores[changed] = pair_score(changed)
        found: list[int] = []
        for symbol in symbols:
            found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        return found


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
            kind = TOKEN_CONTROL if i in tokenizer.special_ids else TOKEN_USER_DEFINED
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
            prepends = prepends or prepend_scheme(step) != "never"
            if step.get("split", True) and any(SPACE in piece[1:] for piece in content["model"]["vocab"]):
                raise_unsupported("llama.cpp merges across words, and this one does not")
        elif not (kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE):
            raise_unsupported(f"llama.cpp has no {kind} before the merges")
    return prepends


def prepend_scheme(step: dict[str, Any]) -> str:
    """Where a Metaspace step prepends ▁: always, first (at the start of a text) or never."""
    return str(step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never"))


def metaspace_scheme(tokenizer: ChatTokenizer) -> str:
    """prepend_scheme of the tokenizer's Metaspace step; "" without the step."""
    cut = json.loads(tokenizer.files["tokenizer.json"]).get("pre_tokenizer") or {}
    steps = [step for step in cut.get("pretokenizers", [cut]) if step.get("type") == "Metaspace"]
    return prepend_scheme(steps[0]) if steps else ""


def tokenizer_caveat(tokenizer: ChatTokenizer) -> str:
    """A note on text that llama.cpp tokenizes differently, or ""."""
    if is_sentencepiece(tokenizer) and metaspace_scheme(tokenizer) in ("always", "first"):
        return "; text that begins with a space has one more ▁ in llama.cpp"
    return ""


def check_sentencepiece(tokenizer: ChatTokenizer) -> None:
    """Raises UserError if llama.cpp cannot represent the tokenizer, naming the step or the first differing text."""
    vocab = build_vocabulary(tokenizer, tokenizer.vocab_size)
    normal_pieces = [piece for piece, kind in zip(vocab.pieces, vocab.types, strict=True) if kind == TOKEN_NORMAL]
    rng, num_pairs = random.Random(0), NUM_RANDOM_PAIRS if normal_pieces else 0
    pairs = ["".join(rng.choices(normal_pieces, k=2)) for _ in range(num_pairs)]
    texts = [text.replace(SPACE, " ") for text in (*SAMPLE_TEXTS, *normal_pieces, *pairs)]
    if tokenizer_caveat(tokenizer):
        texts = [text.lstrip(" ") for text in texts]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if vocab.encode(text) != ids:
            reason = (
                f"llama.cpp, which merges any two neighbours that make a piece, tokenizes {text[:40]!r} differently"
            )
            raise_unsupported(reason)
    chat = sample_chat_ids(tokenizer)
    if chat and vocab.encode(sample_chat_text(tokenizer), parse_special=True) != chat:
        if metaspace_scheme(tokenizer) == "first":
            raise_unsupported(
                "llama.cpp adds a ▁ after each control token of a chat, this one only at the start of a text"
            )
        raise_unsupported("llama.cpp tokenizes a rendered chat differently")


def raise_unsupported(reason: str) -> None:
    raise UserError(f"--gguf: GGUF does not support this SentencePiece tokenizer: {reason}: leave out --gguf")
