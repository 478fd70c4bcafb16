"""Trains a byte-level BPE or unigram tokenizer for Chinese and English.

    1. sample     at most `byte_budget` bytes of text, 5/7 Chinese and 2/7 English, selected by content hash
    2. words      pieces are learned inside words and runs of Chinese characters only
                      bpe      starts with single bytes; repeatedly merges the most frequent pair of neighbours
                      unigram  starts with many pieces; repeatedly drops those that lower the likelihood least
    3. phrases    the last 1/20 of the vocabulary: the most frequent pairs of words (" of the", ", and", "，但")

320 phrases shorten English text by 5 % and Chinese text by 2 %, more than 320 further pieces of words. Phrases are
merged last, so they do not change how words are split.

Every newline and every digit is one token. The vocabulary holds all 256 bytes, so no text is unknown.

Read next: tokenizer_sample.py (step 1), ../train_tokenizer.py (the command), ../model/tokenizer.py (chats -> tokens).
Sources: Sennrich et al. 2016 (BPE), Kudo 2018 (unigram), Liu et al. 2025 (SuperBPE: words first, then across spaces).
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import UserError
from model.fast_bpe import BYTE_OF_CHARACTER, LINE_PATTERN
from model.tokenizer import ChatTokenizer

MIN_VOCABULARY = 300  # the 256 bytes, the special tokens and some learned pieces
MAX_VOCABULARY = 2**32  # token ids are stored as uint16 or uint32
PHRASE_FRACTION = 1 / 20  # of the vocabulary
CHARACTER_COVERAGE = 0.99  # of the text's characters; unigram encodes the others byte by byte
MIN_PHRASE_COUNT = 5  # rarer pairs are noise
MAX_PIECE_BYTES = 24  # 8 Chinese characters: keeps boilerplate of the sample out of the vocabulary

# Pre-tokenisation for training; the alternatives are tried in this order. The length limits bound memory for text
# without spaces.
_WORD_PATTERN = (
    r"\n|\p{N}"  # newlines and digits one by one
    r"|'(?:[sdmt]|ll|re|ve)(?!\p{L})"  # contractions: "it's", "we'll"
    r"|\p{Han}{1,20}"  # Chinese has no spaces: any part of a run may become a piece
    r"| ?[^\s\p{N}\p{P}\p{S}\p{Han}]{1,40}"  # a word with the space before it
    r"|<| ?[^\s\p{N}\p{L}\p{M}<]{1,8}"  # punctuation and symbols
    r"|[^\S\n]+(?!\S)|[^\S\n]+"  # other spaces; the last one belongs to the next word
)

Phrase = tuple[str, str]


def check_vocab_size(vocab_size: int, reserved: int) -> None:
    """Raises UserError for a vocabulary size out of range."""
    if not MIN_VOCABULARY <= vocab_size <= MAX_VOCABULARY:
        raise UserError(f"--vocab_size {vocab_size}: choose {MIN_VOCABULARY} (the 256 bytes, {reserved} special tokens "
                        f"and some learned pieces) to {MAX_VOCABULARY}")  # fmt: skip


def train_tokenizer(
    algorithm: str, texts: Sequence[str], vocab_size: int, reserved: Sequence[str], progress: bool = False
) -> Tokenizer:
    """Train a tokenizer on `texts`, deterministically; ids 0, 1, ... are the `reserved` special tokens.

    `algorithm`: "bpe" or "unigram". The vocabulary is smaller than `vocab_size` if the texts have too few pieces.
    Raises UserError for a vocabulary size out of range.
    """
    check_vocab_size(vocab_size, len(reserved))
    phrases = int(vocab_size * PHRASE_FRACTION)
    train = {"bpe": _train_bpe, "unigram": _train_unigram}[algorithm]
    words = train(texts, vocab_size - phrases, list(reserved), progress)
    return _add_phrases(words, algorithm, frequent_phrases(words, texts, phrases))


# ---- words -----------------------------------------------------------------------------------------------------------
def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([_split_by(pattern), to_bytes])


def _train_bpe(texts: Sequence[str], vocab_size: int, reserved: list[str], progress: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _byte_level(_WORD_PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in reserved],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_PIECE_BYTES,
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


_WORD_SEPARATOR, _SPACE_MARKED = "\x01", 0xF0000  # used in the training text only, see _mark_word_spaces


def _train_unigram(texts: Sequence[str], vocab_size: int, reserved: list[str], progress: bool) -> Tokenizer:
    import sentencepiece

    max_pieces = vocab_size - len(reserved) - 256 - 1  # 1: the newline, added below because training text is lines
    lines = [_WORD_SEPARATOR.join(words) for words in _mark_word_spaces(texts)]
    rare_to_separator = _rare_characters(Counter(character for line in lines for character in line), max_pieces)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # One word per sentence, as often as it occurs. With sentencepiece's own word delimiter, each distinct word
            # counts once, and a frequent word that is part of no other word (" from") never becomes a piece.
            sentence_iterator=(
                word for line in lines for word in line.translate(rare_to_separator).split(_WORD_SEPARATOR) if word
            ),
            model_writer=model,
            model_type="unigram",
            vocab_size=min(max_pieces + 256 + 1, 2**30),  # 1: the unknown token, which is removed below
            hard_vocab_limit=False,  # too little text gives fewer pieces instead of an error
            seed_sentencepiece_size=min(max(5 * max_pieces, 10_000), 1_000_000),  # more: slower, same result
            max_sentencepiece_length=MAX_PIECE_BYTES // 2,  # in characters
            max_sentence_length=1 << 20,
            split_by_unicode_script=False,  # words are already split
            character_coverage=1.0,  # rare characters are already removed
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            bos_id=-1,
            eos_id=-1,
            unk_id=0,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"sentencepiece cannot train on this text ({why}): use --algorithm bpe") from None
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces: dict[str, float] = {}
    for i in range(trained.get_piece_size()):
        if trained.is_unknown(i) or trained.is_byte(i):
            continue
        piece = "".join(_unmark_space(character) for character in trained.id_to_piece(i).replace("▁", " "))
        if piece == "<" or "<" not in piece:
            pieces.setdefault(piece, trained.get_score(i))
    lowest = min(pieces.values(), default=0.0)
    bytes_ = [(f"<0x{byte:02X}>", lowest) for byte in range(256)]
    vocab = [*((token, lowest) for token in reserved), *bytes_, ("\n", lowest), *list(pieces.items())[:max_pieces]]
    return _unigram_tokenizer(vocab, reserved, _WORD_PATTERN)


def _unigram_tokenizer(vocab: list[tuple[str, float]], reserved: list[str], pattern: str) -> Tokenizer:
    # The Unigram model requires an unknown id; it is never used, because all bytes are in the vocabulary.
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=len(reserved) - 1, byte_fallback=True))
    tokenizer.pre_tokenizer = _split_by(pattern)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in reserved])
    return tokenizer


def _mark_word_spaces(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the words of each line; a leading space and the next character become one private-use character.

    A single space is so frequent that it costs a unigram model almost nothing: it would learn "point" and split every
    " point" into " " + "point". As one symbol with the first letter, the space stays in its word.
    """
    split = _split_by(_WORD_PATTERN)
    for text in texts:
        for line in text.replace(_WORD_SEPARATOR, "\n").split("\n"):
            words = [word for word, _ in split.pre_tokenize_str(line)]
            if words:
                yield [
                    chr(_SPACE_MARKED + ord(word[1])) + word[2:]
                    if word[0] == " " and len(word) > 1 and "!" <= word[1] < "\ue000"
                    else word
                    for word in words
                ]


def _unmark_space(character: str) -> str:
    return " " + chr(ord(character) - _SPACE_MARKED) if ord(character) >= _SPACE_MARKED else character


def _rare_characters(counts: Counter[str], max_pieces: int) -> dict[int, str]:
    """Translation table that replaces rare characters by the word separator; they are encoded as bytes."""
    excluded = {_WORD_SEPARATOR, "\0", "▁", "\u2585", "\t", "\r"}
    candidates = [character for character, _ in counts.most_common() if character not in excluded]
    total, seen, keep = sum(counts.values()), 0, set()
    for character in candidates[: max_pieces // 2]:
        if seen > CHARACTER_COVERAGE * total:
            break
        keep.add(character)
        seen += counts[character]
    return {ord(character): _WORD_SEPARATOR for character in counts if character not in keep}


# ---- phrases ---------------------------------------------------------------------------------------------------------
def frequent_phrases(words: Tokenizer, texts: Sequence[str], number: int) -> list[Phrase]:
    """The `number` most frequent pairs of neighbouring tokens that are whole words.

    In Chinese, which has no spaces, the last and first token of a run count as words. Pairs with spaces, newlines or
    digits are excluded.
    """
    names = {i: piece for piece, i in words.get_vocab().items()}
    meanings = [piece.decode("utf-8", "replace") for piece in vocab_bytes(words)]
    han = np.array(["一" <= text[-1:] <= "鿿" for text in meanings])
    usable = np.array([_is_word(text) for text in meanings])
    counts: Counter[int] = Counter()
    documents = iter(texts)
    while batch := list(islice(documents, 256)):
        for encoding in words.encode_batch(batch, add_special_tokens=False):
            ids, word = np.array(encoding.ids, np.int64), np.array(encoding.word_ids, np.int64)
            if len(ids) < 2:
                continue
            boundary = np.concatenate([[True], word[1:] != word[:-1], [True]])
            whole = (boundary[1:] & boundary[:-1] | han[ids]) & usable[ids]
            pair = whole[:-1] & whole[1:] & boundary[1:-1] & ~(han[ids[:-1]] & han[ids[1:]])
            counts.update((ids[:-1][pair] * len(names) + ids[1:][pair]).tolist())
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]
    pairs = [divmod(key, len(names)) for key, count in ranked if count >= MIN_PHRASE_COUNT]
    return [(names[left], names[right]) for left, right in pairs]


def _is_word(text: str) -> bool:
    return bool(text.strip()) and not any(c in "�\n<" or (c.isnumeric() and not "一" <= c <= "鿿") for c in text)


def _add_phrases(words: Tokenizer, algorithm: str, phrases: Sequence[Phrase]) -> Tokenizer:
    """The tokenizer `words` with the phrases appended; it splits text into lines instead of words."""
    state: dict[str, Any] = json.loads(words.to_str())
    model = state["model"]
    known = set(words.get_vocab())
    score = dict(model["vocab"]) if algorithm == "unigram" else {}
    for left, right in phrases:
        if left + right in known:
            continue
        known.add(left + right)
        if algorithm == "bpe":  # merged last, after all merges inside words
            model["vocab"][left + right] = len(model["vocab"])
            model["merges"].append([left, right])
        else:  # slightly more probable than the two tokens
            model["vocab"].append([left + right, score[left] + score[right] + 0.5])
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = _byte_level(LINE_PATTERN) if algorithm == "bpe" else _split_by(LINE_PATTERN)
    return tokenizer


# ---- inspection ------------------------------------------------------------------------------------------------------
def vocab_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id, a list of vocab_size entries; for a special token, its name."""
    byte_level = json.loads(tokenizer.to_str())["decoder"]["type"] == "ByteLevel"
    special = tokenizer.get_added_tokens_decoder()
    found = [b""] * tokenizer.get_vocab_size()
    for piece, i in tokenizer.get_vocab().items():
        if i in special:
            found[i] = piece.encode()
        elif byte_level:
            found[i] = bytes(BYTE_OF_CHARACTER[character] for character in piece)
        else:
            lone_byte = len(piece) == 6 and piece.startswith("<0x")
            found[i] = bytes([int(piece[3:5], 16)]) if lone_byte else piece.encode()
    return found


def print_pieces(tokenizer: ChatTokenizer, text: str) -> None:
    """Print the tokens of a text and their ids; bytes of a character that spans several tokens print as <E6>."""
    table, ids = vocab_bytes(tokenizer.backend), tokenizer.encode(text)
    pieces = [_printable_piece(table[i]) for i in ids]
    print(" | ".join(pieces))
    print(f"{len(text)} characters, {len(ids)} tokens, {len(text) / max(len(ids), 1):.2f} characters per token")
    for i, piece in zip(ids, pieces, strict=True):
        print(f"{i:>8}  {piece}")


def _printable_piece(piece: bytes) -> str:
    """The piece as one printable line: ␣ for spaces, control characters escaped, incomplete characters as <E6>."""

    def show(character: str) -> str:
        if "\udc80" <= character <= "\udcff":
            return f"<{ord(character) - 0xDC00:02X}>"
        return character if character.isprintable() else character.encode("unicode_escape").decode()

    return "".join(map(show, piece.decode("utf-8", "surrogateescape").replace(" ", "␣")))
