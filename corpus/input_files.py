"""Opens data files as streams of UTF-8 lines: decompresses them and converts their encoding.

    expand_inputs(paths)             files and folders -> files
    InputFile(path)                  .stream.readline(size), .stream.read1(size), .head()

Read next: compression.py, damage.py, text_encoding.py (GB18030, UTF-16, ...), sniff.py (format detection).
"""

import contextlib
import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from corpus.compression import MAGIC_BYTES, Decompressor, compression_suffix
from corpus.damage import Damage, DataFile, describe_read_error
from corpus.stats import DataStats
from corpus.text_encoding import UTF8, TextEncoding, detect_encoding, utf8_reader

ENCODING_SAMPLES = 16  # positions of a long file that are sampled to detect its encoding
READ_CHUNK_BYTES = 64 << 10  # read to detect the format; also the maximum size of a plain-text document (txt_reader.py)
BUFFER_BYTES = 1 << 20
MAX_LINE = 64 << 20  # bytes; a longer line or JSON value is a bad row
SUFFIX_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Files without rows that `datasets`, transformers, and this project's clean, dedup and decontaminate write into data
# folders.
NON_DATA_FILES = frozenset(
    ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "meta.json", "metadata.json",
     "report.json", "dropped.tsv", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "vocab.json", "readme.txt", "license.txt", "notice.txt", "requirements.txt")
)  # fmt: skip
BINARY_MAGIC = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # parquet, arrow, zip, xls


def require_readable(file: str | os.PathLike[str]) -> None:
    """Raises UserError unless `file` is a readable file."""
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{file} is a folder: pass the files in it, for example {file}/*.jsonl")
    if not path.exists():
        raise UserError(f"{file}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{file}: no permission to read it")


def expand_inputs(paths: Iterable[str | os.PathLike[str]], log: Callable[[str], None] = print) -> list[str]:
    """Replaces each folder by the data files in it and in its subfolders, sorted by name.

    Hidden files, partial files and files without a known suffix are skipped; `log` gets one line per folder. A folder
    written by save_to_disk of `datasets` is replaced by its arrow files. Raises UserError for a path that does not
    exist, a folder without data files, or a dataset prepared by data_process.py.
    """
    files: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            require_readable(path)
            files.append(os.fspath(path))
            continue
        data, others = _data_files(Path(path))
        shown_names = ", ".join(other.name for other in others[:5]) + (", ..." if len(others) > 5 else "")
        if not data:
            value = f"it contains {shown_names}" if shown_names else "it is empty"
            raise UserError(
                f"{path}: no data file in this folder, {value}: pass a folder with txt, jsonl, csv, ... files"
            )
        left_out = f", {len(others):,} other files are skipped ({shown_names})" if others else ""
        log(f"{path} is a folder: {len(data):,} data files are read{left_out}")
        files += [os.fspath(file) for file in data]
    return files


def _data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns (data files, other files) of a folder and its subfolders."""
    meta = _json_object(folder / "meta.json")
    if "format" in meta and "kind" in meta:
        raise UserError(f"{folder} is a dataset prepared by data_process.py: pass the files it was prepared from")
    saved = _json_object(folder / "state.json").get("_data_files")
    if isinstance(saved, list) and (folder / "dataset_info.json").is_file():
        return [folder / str(entry["filename"]) for entry in saved], []
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    data: list[Path] = []
    others: list[Path] = []
    for entry in entries:
        hidden = entry.name.startswith((".", "_")) or entry.suffix.lower() == ".partial"
        if entry.is_dir():
            if not hidden and not entry.is_symlink():  # a link may form a cycle
                inner = _data_files(entry)
                data += inner[0]
                others += inner[1]
        elif not hidden and entry.name.lower() not in NON_DATA_FILES and _has_data_suffix(entry):
            data.append(entry)
        else:
            others.append(entry)
    return data, others


def _has_data_suffix(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in MAGIC_BYTES:
        suffixes.pop()
    return bool(suffixes) and (suffixes[-1] in SUFFIX_FORMATS or suffixes[-1] == ".txt")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


NumberedRows = Iterator[tuple[int, Any]]  # (line or row number, row)


class InputFile:
    """An open file as a stream of UTF-8 lines that end with a line feed; parquet and arrow files as they are.

    `stream` has readline, read1 and peek. Damage ends it and is recorded in `damages`. `line`: of the current row.
    """

    def __init__(self, path: Path, skip_damage: bool = False) -> None:
        """`skip_damage`: after damage in a compressed file, reading continues at the next member.

        Raises UserError for a missing or unreadable file and for a folder.
        """
        require_readable(path)
        try:
            self.file = DataFile(path)
        except OSError as error:
            raise UserError(f"{path}: {describe_read_error(error)}") from None
        self.raw = self.stream = io.BufferedReader(self.file, READ_CHUNK_BYTES)
        self.name, self.size, self.damages, self.line = os.fspath(path), self.file.size, self.file.damages, 1
        kind = compression_suffix(self.raw.peek(8)[:8])
        if self.damages:
            raise UserError(f"{path}: {self.damages[0].reason}")
        suffixes = [suffix.lower() for suffix in path.suffixes]
        named = suffixes.pop() if suffixes and suffixes[-1] in MAGIC_BYTES else ""
        self.suffix = suffixes[-1] if suffixes else ""
        if kind:
            self.stream = _chunk_stream(Decompressor(self.raw, self.file, kind, skip_damage).next_chunk)
        elif named and self.size:
            self.damages.append(Damage(f"not a {named} file, despite its suffix", 0, self.size))
            self.stream = _chunk_stream(lambda: None)
        self.is_compressed = self.stream is not self.raw
        self.encoding = self._convert_to_utf8()

    def _convert_to_utf8(self) -> TextEncoding:
        """Converts the stream to UTF-8 with line feeds; returns the encoding of the file."""
        head = self.head()
        if head.startswith(BINARY_MAGIC):
            return UTF8
        encoding = detect_encoding(self._encoding_sample(head))
        old_mac = b"\r" in head and b"\n" not in head
        if encoding.codec != "utf-8" or old_mac:
            self.stream = _chunk_stream(utf8_reader(self.stream, encoding.codec, old_mac))
        return encoding

    def _encoding_sample(self, head: bytes) -> bytes:
        """The first bytes of the file; if these are ASCII, also lines from later positions."""
        chunks = [head[: head.rfind(b"\n") + 1] or head]
        if head.isascii() and not self.is_compressed and len(head) < self.size and hasattr(os, "pread"):
            for i in range(1, ENCODING_SAMPLES):
                with contextlib.suppress(OSError):  # the reader meets and reports the same error later
                    chunk = os.pread(self.file.fileno(), READ_CHUNK_BYTES // 4, self.size * i // ENCODING_SAMPLES)
                    chunks.append(chunk[chunk.find(b"\n") + 1 : chunk.rfind(b"\n") + 1])
        return b"".join(chunks)

    def head(self) -> bytes:
        """The first bytes, without advancing the stream."""
        return self.stream.peek(READ_CHUNK_BYTES)

    @property
    def malformed_reason(self) -> str:
        """The reason for bad rows with bytes that are malformed in the encoding."""
        return self.encoding.malformed_reason.replace("{file}", shlex.quote(self.name))

    def count_long_line(self, line: bytes, line_number: int, size: int, report: DataStats) -> None:
        """Skips the rest of a line that begins with the MAX_LINE bytes `line`; counts it as estimated bad rows.

        `size`: bytes of the file before the line.
        """
        line_bytes = len(line)
        while not line.endswith(b"\n") and (line := self.stream.readline(1 << 20)):
            line_bytes += len(line)
        rows = report.estimate_rows(self.name, line_bytes, size + line_bytes)
        report.row_unreadable(f"a line longer than {MAX_LINE >> 20} MB", self.name, line_number, rows)

    def __enter__(self) -> "InputFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()


class _ChunkFile(io.RawIOBase):
    """A raw file of the chunks that `next_chunk` returns; None ends it."""

    def __init__(self, next_chunk: Callable[[], bytes | None]) -> None:
        self.next_chunk, self.rest, self.at_end = next_chunk, memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        """Fills at least READ_CHUNK_BYTES of `target`, so that the format is detected in as many bytes."""
        view, filled = memoryview(target), 0
        while filled < min(len(view), READ_CHUNK_BYTES) and not self.at_end:
            if not self.rest:
                chunk = self.next_chunk()
                self.rest, self.at_end = memoryview(chunk or b""), chunk is None
            size = min(len(view) - filled, len(self.rest))
            view[filled : filled + size] = self.rest[:size]
            self.rest = self.rest[size:]
            filled += size
        return filled


def _chunk_stream(next_chunk: Callable[[], bytes | None]) -> io.BufferedReader:
    return io.BufferedReader(_ChunkFile(next_chunk), BUFFER_BYTES)
