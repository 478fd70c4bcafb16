"""Writes the tokenizer of a GGUF file: llama.cpp then gives the same ids for every text.

    byte-level BPE             tokenizer.ggml.model gpt2, with merges and the name of a pre-tokenizer
    BPE over characters and ▁  tokenizer.ggml.model llama, with scores (gguf_sentencepiece.py)

llama.cpp identifies a pre-tokenizer, the split of text before byte-pair merges, by a name and not by a pattern. Our own
splits at line ends, digits and "<"; llama.cpp's "superbpe" splits at numbers only. Both give the same tokens as long as
no piece of the vocabulary crosses one of our splits, which is checked before a file is written.

Source: llama.cpp's src/llama-vocab.cpp, the gguf package.
Read next: gguf_sentencepiece.py, verify_gguf.py; gguf_export.py calls this module.
"""

import json
import unicodedata
from typing import Any

from common.errors import UserError
from corpus.tokenizer_training import vocab_bytes
from export.gguf_sentencepiece import TOKEN_UNKNOWN, build_vocabulary, check_sentencepiece, is_sentencepiece
from export.hf_export import bos_id
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
        raise UserError(
            f"--gguf: llama.cpp has no pre-tokenizer with this pattern ({' '.join(patterns)[:80]}): leave out --gguf"
        )
    if pattern == OWN_PATTERN and (bad := piece_across_cut(tokenizer)):
        raise UserError(
            f"--gguf: the piece {bad!r} crosses a line end, a digit or '<', and llama.cpp would use it: "
            "leave out --gguf"
        )
    return PRE_TOKENIZERS[pattern]


def piece_across_cut(tokenizer: ChatTokenizer) -> str:
    """A piece of the vocabulary that crosses a split of our own pre-tokenizer, or ""."""
    special = tokenizer.special_ids
    for index, raw in enumerate(vocab_bytes(tokenizer.backend)):
        piece = raw.decode("utf-8", "replace")
        cut = any(character in "\n<" or unicodedata.category(character).startswith("N") for character in piece)
        if cut and len(piece) > 1 and index not in special:
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
    added = tokenizer.backend.get_added_tokens_decoder()
    kinds = {i: gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED for i, token in added.items()}
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
