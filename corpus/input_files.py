"""Opens data files as streams of UTF-8 lines: decompresses them and converts their encoding.

    expand_inputs(paths)             files and folders -> files
    open_input(path) -> InputFile    .readline .read .head; damage ends the stream and is recorded in .damages

Read next: compression.py, damage.py, text_encoding.py (GB18030, UTF-16, ...), sniff.py (format detection).
"""

import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError
from corpus.compression import MAGIC_BYTES, Decompressor, compression_suffix, describe_read_error
from corpus.damage import Damage
from corpus.text_encoding import UTF8, detect_encoding, utf8_chunks

ENCODING_SAMPLES = 16  # positions of a long file that are sampled to detect its encoding
READ_CHUNK_BYTES = 64 << 10  # read to detect the format; also the maximum size of a plain-text document (txt_reader.py)
BUFFER_BYTES = 1 << 20  # bytes
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


class InputFile:
    """An open file, decompressed while it is read. A read error ends the stream and is recorded in `damages`."""

    def __init__(self, raw: BinaryIO, stream: io.BufferedReader, suffix: str, name: str, damages: list[Damage]) -> None:
        self.raw, self.stream, self.suffix, self.name, self.damages = raw, stream, suffix, name, damages
        self.size = os.fstat(raw.fileno()).st_size
        self.is_compressed = stream is not raw
        self.line = 1
        self.encoding = UTF8

    @property
    def malformed_reason(self) -> str:
        """The reason for bad rows with bytes that are malformed in the encoding."""
        return self.encoding.malformed_reason.replace("{file}", shlex.quote(self.name))

    def bytes_read(self) -> int:
        """Bytes of the (compressed) file read so far."""
        return self.raw.tell()

    def add_damage(self, reason: str, rows: int = 0) -> None:
        """Records that the file is unusable from here; `rows` is the number of lost rows, 0 if unknown."""
        self.damages.append(Damage(reason, self.raw.tell(), 0, rows))

    def _read_or_end(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except OSError as error:
            self.damages.append(Damage(describe_read_error(error), self.raw.tell(), self.size - self.raw.tell()))
            self.stream = io.BufferedReader(_ChunkStream(iter(())))
            return b""

    def readline(self, size: int) -> bytes:
        return self._read_or_end(self.stream.readline, size)

    def read(self, size: int) -> bytes:
        return self._read_or_end(self.stream.read1, size)

    def head(self) -> bytes:
        """The first bytes, without advancing the stream."""
        return self._read_or_end(self.stream.peek, READ_CHUNK_BYTES)

    def __enter__(self) -> "InputFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()


class _ChunkStream(io.RawIOBase):
    """A raw stream over an iterator of bytes. All bytes before an error are delivered before it is raised."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.remainder = chunks, memoryview(b"")
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view, filled = memoryview(target), 0
        wanted_bytes = min(len(view), READ_CHUNK_BYTES)
        while filled < wanted_bytes and not self.error:
            if not self.remainder:
                try:
                    chunk = next(self.chunks, None)
                except OSError as error:
                    chunk, self.error = None, error
                if chunk is None:
                    break
                self.remainder = memoryview(chunk)
            size = min(len(view) - filled, len(self.remainder))
            view[filled : filled + size] = self.remainder[:size]
            self.remainder = self.remainder[size:]
            filled += size
        if self.error and not filled:
            raise self.error
        return filled


def open_input(path: Path, skip_damage: bool = False) -> InputFile:
    """Opens a file. `skip_damage`: after damage in a compressed file, reading continues at the next member.

    Raises UserError for a missing or unreadable file and for a folder.
    """
    require_readable(path)
    try:
        raw: Any = path.open("rb", buffering=READ_CHUNK_BYTES)
        kind = compression_suffix(raw.peek(8)[:8])
    except OSError as error:
        raise UserError(f"{path}: {describe_read_error(error)}") from None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    damages: list[Damage] = []
    stream: Any = raw
    size = os.fstat(raw.fileno()).st_size
    if kind:
        stream = io.BufferedReader(
            _ChunkStream(Decompressor(raw, kind, size, damages, skip_damage).chunks()), BUFFER_BYTES
        )
    if suffixes and suffixes[-1] in MAGIC_BYTES:
        named = suffixes.pop()
        if size and not kind:
            damages.append(Damage(f"not a {named} file, despite its suffix", 0, size))
            stream = io.BufferedReader(_ChunkStream(iter(())))
    input_file = InputFile(raw, stream, suffixes[-1] if suffixes else "", os.fspath(path), damages)
    _convert_to_utf8(input_file)
    return input_file


def _convert_to_utf8(input_file: InputFile) -> None:
    """Converts the stream to UTF-8 lines that end with a line feed."""
    head = input_file.head()
    if head.startswith(BINARY_MAGIC):
        return
    input_file.encoding = detect_encoding(_encoding_sample(input_file, head))
    old_mac = b"\r" in head and b"\n" not in head
    if input_file.encoding.codec != "utf-8" or old_mac:
        chunks = utf8_chunks(input_file.stream, input_file.encoding.codec, old_mac)
        input_file.stream = io.BufferedReader(_ChunkStream(chunks), BUFFER_BYTES)


def _encoding_sample(input_file: InputFile, head: bytes) -> bytes:
    """The first bytes of the file; if these are ASCII, also lines from later positions."""
    chunks = [head[: head.rfind(b"\n") + 1] or head]
    if head.isascii() and not input_file.is_compressed and len(head) < input_file.size and hasattr(os, "pread"):
        for i in range(1, ENCODING_SAMPLES):
            try:
                chunk = os.pread(
                    input_file.raw.fileno(), READ_CHUNK_BYTES // 4, input_file.size * i // ENCODING_SAMPLES
                )
            except OSError:  # the reader meets and reports the same error later
                continue
            chunks.append(chunk[chunk.find(b"\n") + 1 : chunk.rfind(b"\n") + 1])
    return b"".join(chunks)
