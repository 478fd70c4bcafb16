"""Compare the vocabulary size and compression of tokenizers on the same text.

    characters per token, zh or en = characters of the documents in that language / their tokens
    bytes per token                = UTF-8 bytes of all documents / their tokens
    unknown                        = fraction of unknown tokens (<unk>)

Documents are encoded without special tokens. Bytes per token are comparable only between tokenizers without unknown
tokens, because <unk> may replace a whole word. Rows are sorted by bytes per token, largest first.
Reads a tokenizer.json or a SentencePiece model, or a folder that contains one.
Called by ../train_tokenizer.py --compare. Read next: ../corpus/tokenizer_training.py (trains a tokenizer).
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from common.errors import UserError
from common.files import write_text
from corpus.language import LANGUAGES, detect_language
from corpus.readers import read_texts
from corpus.stats import DataStats

TABLE_HEADERS = ("tokenizer", "entries", "chars/token zh", "chars/token en", "bytes/token", "unknown")
EncodeFunction = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer of the library tokenizers or sentencepiece. `unknown_id`: id of the unknown token, -1 without one."""

    name: str
    vocab_size: int
    encode: EncodeFunction
    unknown_id: int


@dataclass(frozen=True)
class TokenizerStats:
    """One row of the table. `characters_per_token` is by language and omits languages without text."""

    name: str
    vocab_size: int
    characters_per_token: dict[str, float]
    bytes_per_token: float
    unknown_fraction: float


# ---- tokenizers ------------------------------------------------------------------------------------------------------
def load_any_tokenizer(path: str | os.PathLike[str]) -> LoadedTokenizer:
    """Load a tokenizer.json, a SentencePiece *.model, or a folder that contains one. Raises UserError if it cannot."""
    tokenizer_path = Path(path)
    if not tokenizer_path.exists():
        raise UserError(f"{path}: no such file or folder: give the file or folder of a tokenizer")
    files = (
        [tokenizer_path]
        if tokenizer_path.is_file()
        else [tokenizer_path / "tokenizer.json", *sorted(tokenizer_path.glob("*.model"))]
    )
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{path} contains no tokenizer: expected a tokenizer.json or a SentencePiece *.model")
    name = os.fspath(path).rstrip("/")
    try:
        return _load_sentencepiece(name, file) if file.suffix == ".model" else _load_tokenizer_json(name, file)
    except Exception as error:  # both libraries raise plain Exception
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"cannot read the tokenizer {file} ({reason}): damaged or not a tokenizer") from None


def _load_tokenizer_json(name: str, file: Path) -> LoadedTokenizer:
    backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True  # "<unk>" in a text is encoded as ordinary text
    unknown = getattr(backend.model, "unk_token", None)
    index = backend.token_to_id(unknown) if isinstance(unknown, str) else None
    encode: EncodeFunction = lambda texts: [
        found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]
    return LoadedTokenizer(name, backend.get_vocab_size(with_added_tokens=True), encode, -1 if index is None else index)


def _load_sentencepiece(name: str, file: Path) -> LoadedTokenizer:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(file.read_bytes())
    return LoadedTokenizer(name, model.GetPieceSize(), lambda texts: model.Encode(texts), model.unk_id())


# ---- texts -----------------------------------------------------------------------------------------------------------
def read_texts_by_language(files: Sequence[str]) -> dict[str, list[str]]:
    """Return {language: documents of the files}. Raises UserError if the files have no text."""
    found: dict[str, list[str]] = {lang: [] for lang in LANGUAGES}
    for document in read_texts(files, DataStats()):
        found[detect_language(document.text)].append(document.text)
    if not any(found.values()):
        raise UserError(f"{', '.join(files)}: no text to compare tokenizers on")
    return found


# ---- the table -------------------------------------------------------------------------------------------------------
def measure_tokenizers(tokenizers: Iterable[LoadedTokenizer], texts: dict[str, list[str]]) -> list[TokenizerStats]:
    """Encode the texts with every tokenizer and return one row for each, largest bytes per token first."""
    characters = {lang: sum(map(len, documents)) for lang, documents in texts.items() if documents}
    utf8_bytes = sum(len(text.encode()) for documents in texts.values() for text in documents)
    counted = []
    for tokenizer in tokenizers:
        ids = {lang: tokenizer.encode(texts[lang]) for lang in characters}
        tokens = {lang: sum(map(len, found)) for lang, found in ids.items()}
        total = max(sum(tokens.values()), 1)
        unknown = sum(row.count(tokenizer.unknown_id) for found in ids.values() for row in found)
        per_token = {lang: characters[lang] / max(tokens[lang], 1) for lang in characters}
        counted.append(
            TokenizerStats(tokenizer.name, tokenizer.vocab_size, per_token, utf8_bytes / total, unknown / total)
        )
    return sorted(counted, key=lambda row: row.bytes_per_token, reverse=True)


def table_cells(row: TokenizerStats) -> list[str]:
    """Return the cells of a row in the order of TABLE_HEADERS; "–" for a language without text."""
    languages = (row.characters_per_token.get(lang) for lang in LANGUAGES)
    shown = ("–" if value is None else f"{value:.3f}" for value in languages)
    return [row.name, f"{row.vocab_size:,}", *shown, f"{row.bytes_per_token:.3f}", f"{row.unknown_fraction:.1%}"]


def describe_texts(texts: dict[str, list[str]], files: Sequence[str]) -> str:
    """Return one line with the size and the source of the texts."""
    amounts = (f"{sum(map(len, documents)):,} characters of {lang}" for lang, documents in texts.items() if documents)
    source = (
        ", ".join(files) or "the built-in demo world (short generated sentences; choose other text with --compare_on)"
    )
    return f"on {' and '.join(amounts)} from {source}"


def compare_tokenizers(folders: Sequence[str], texts: dict[str, list[str]], files: Sequence[str], out: str) -> None:
    """Print a table of the tokenizers on the texts, which are from `files`; write it to `out` as Markdown, if given."""
    rows = measure_tokenizers([load_any_tokenizer(folder) for folder in folders], texts)
    measured_texts = describe_texts(texts, files)
    table = Table(*TABLE_HEADERS, box=None)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*table_cells(row))
    Console().print(table)
    print(measured_texts)
    if out:
        lines = [f"| {' | '.join(TABLE_HEADERS)} |", "|---" + "|---:" * 5 + "|"]
        lines += [f"| {' | '.join(table_cells(row)).replace('_', chr(92) + '_')} |" for row in rows]
        write_text(out, "\n".join(["# Tokenizers", "", f"Measured {measured_texts}.", "", *lines]) + "\n")
        print(f"written: {out}")
