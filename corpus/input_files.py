"""Opening a data file, compressed or not and in any of the usual encodings, as a stream of UTF-8 lines.

    expand_inputs(paths)           files and folders -> files
    open_source(path) -> Source    .readline .read .head; damage ends the file and is noted in .damages

Read next: compression.py, damage.py, text_encoding.py (GB18030, UTF-16, ...), sniff.py (telling the format).
"""

import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError
from corpus.compression import MAGIC, Unpacked, kind_of, read_error
from corpus.damage import Damage
from corpus.text_encoding import UTF8, detect_encoding, utf8_pieces

SAMPLES = 16  # places of a long file that are read to find its encoding
PIECE = 64 << 10  # bytes read to find the format; also the size of one piece of plain text, see txt_reader.py
BUFFER = 1 << 20  # bytes that a stream keeps
SUFFIX_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Files of a data folder that hold no rows: what `datasets`, transformers and our own clean, dedup and decontaminate
# write beside them.
NO_ROWS = frozenset(
    ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "meta.json", "metadata.json",
     "report.json", "dropped.tsv", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "vocab.json", "readme.txt", "license.txt", "notice.txt", "requirements.txt")
)  # fmt: skip
BINARY_MAGIC = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # parquet, arrow, zip, xls


def check_input(file: str | os.PathLike[str]) -> None:
    """Raises UserError unless `file` is a readable file."""
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{file} is a folder: name the files in it, for example {file}/*.jsonl")
    if not path.exists():
        raise UserError(f"{file}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{file}: no permission to read it")


def expand_inputs(paths: Iterable[str | os.PathLike[str]], say: Callable[[str], None] = print) -> list[str]:
    """The files to read: a folder is read as the data files in it and below it, in the order of their names.

    Hidden and partial files and those without a known suffix are left out; `say` gets a line with both numbers. A
    folder that `datasets` saved (save_to_disk) is read as its arrow files. Raises UserError for a path that does not
    exist, a folder without data files, and a folder that data_process.py made for training.
    """
    files: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            check_input(path)
            files.append(os.fspath(path))
            continue
        data, others = _data_files(Path(path))
        shown = ", ".join(other.name for other in others[:5]) + (", ..." if len(others) > 5 else "")
        if not data:
            found = f"it holds {shown}" if shown else "it is empty"
            raise UserError(
                f"{path}: no data file in this folder, {found}: name a folder with txt, jsonl, csv, ... files"
            )
        left_out = f", {len(others):,} other files are left out ({shown})" if others else ""
        say(f"{path} is a folder: {len(data):,} data files are read{left_out}")
        files += [os.fspath(file) for file in data]
    return files


def _data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(data files, other files) of a folder and the folders in it."""
    meta = _json_object(folder / "meta.json")
    if "format" in meta and "kind" in meta:
        raise UserError(f"{folder} is a data set that data_process.py made for training: name the files it was made of")
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
            if not hidden and not entry.is_symlink():  # a link may lead back here
                inner = _data_files(entry)
                data += inner[0]
                others += inner[1]
        elif not hidden and entry.name.lower() not in NO_ROWS and _has_data_suffix(entry):
            data.append(entry)
        else:
            others.append(entry)
    return data, others


def _has_data_suffix(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in MAGIC:
        suffixes.pop()
    return bool(suffixes) and (suffixes[-1] in SUFFIX_FORMATS or suffixes[-1] == ".txt")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Source:
    """A file opened for reading, unpacked on the fly. What cannot be read ends it and is noted in `damages`."""

    def __init__(self, raw: BinaryIO, stream: io.BufferedReader, suffix: str, name: str, damages: list[Damage]) -> None:
        self.raw, self.stream, self.suffix, self.name, self.damages = raw, stream, suffix, name, damages
        self.size = os.fstat(raw.fileno()).st_size
        self.packed = stream is not raw
        self.line = 1
        self.encoding = UTF8

    @property
    def malformed(self) -> str:
        """The reason of rows with bytes that the encoding does not have."""
        return self.encoding.malformed.replace("{file}", shlex.quote(self.name))

    def position(self) -> int:
        """Bytes of the (packed) file read so far."""
        return self.raw.tell()

    def damage(self, reason: str, rows: int = 0) -> None:
        """The file cannot be used from here on; `rows` rows are lost, or unknown."""
        self.damages.append(Damage(reason, self.raw.tell(), 0, rows))

    def _guard(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except OSError as error:
            self.damages.append(Damage(read_error(error), self.raw.tell(), self.size - self.raw.tell()))
            self.stream = io.BufferedReader(_PieceStream(iter(())))
            return b""

    def readline(self, size: int) -> bytes:
        return self._guard(self.stream.readline, size)

    def read(self, size: int) -> bytes:
        return self._guard(self.stream.read1, size)

    def head(self) -> bytes:
        """The first bytes, without advancing."""
        return self._guard(self.stream.peek, PIECE)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()


class _PieceStream(io.RawIOBase):
    """A raw stream over pieces of bytes. All that came before an error is delivered before the error is raised."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.rest = pieces, memoryview(b"")
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view, filled = memoryview(target), 0
        want = min(len(view), PIECE)
        while filled < want and not self.error:
            if not self.rest:
                try:
                    piece = next(self.pieces, None)
                except OSError as error:
                    piece, self.error = None, error
                if piece is None:
                    break
                self.rest = memoryview(piece)
            size = min(len(view) - filled, len(self.rest))
            view[filled : filled + size] = self.rest[:size]
            self.rest = self.rest[size:]
            filled += size
        if self.error and not filled:
            raise self.error
        return filled


def open_source(path: Path, skip_damage: bool = False) -> Source:
    """Opens a file. `skip_damage`: after damage in a compressed file reading continues where another stream begins."""
    check_input(path)
    try:
        raw: Any = path.open("rb", buffering=PIECE)
        kind = kind_of(raw.peek(8)[:8])
    except OSError as error:
        raise UserError(f"{path}: {read_error(error)}") from None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    damages: list[Damage] = []
    stream: Any = raw
    size = os.fstat(raw.fileno()).st_size
    if kind:
        stream = io.BufferedReader(_PieceStream(Unpacked(raw, kind, size, damages, skip_damage).pieces()), BUFFER)
    if suffixes and suffixes[-1] in MAGIC:
        named = suffixes.pop()
        if size and not kind:
            damages.append(Damage(f"not a {named} archive, whatever its name says", 0, size))
            stream = io.BufferedReader(_PieceStream(iter(())))
    source = Source(raw, stream, suffixes[-1] if suffixes else "", os.fspath(path), damages)
    _to_utf8(source)
    return source


def _to_utf8(source: Source) -> None:
    """Convert the encoding and the line ends of `source`: it yields UTF-8 lines that end with a line feed."""
    head = source.head()
    if head.startswith(BINARY_MAGIC):
        return
    source.encoding = detect_encoding(_sample(source, head))
    old_mac = b"\r" in head and b"\n" not in head
    if source.encoding.codec != "utf-8" or old_mac:
        pieces = utf8_pieces(source.stream, source.encoding.codec, old_mac)
        source.stream = io.BufferedReader(_PieceStream(pieces), BUFFER)


def _sample(source: Source, head: bytes) -> bytes:
    """The first bytes; of a file that begins with ASCII only, also some of its later lines."""
    pieces = [head[: head.rfind(b"\n") + 1] or head]
    if head.isascii() and not source.packed and len(head) < source.size and hasattr(os, "pread"):
        for i in range(1, SAMPLES):
            try:
                piece = os.pread(source.raw.fileno(), PIECE // 4, source.size * i // SAMPLES)
            except OSError:  # read again, and reported, where the reader comes to it
                continue
            pieces.append(piece[piece.find(b"\n") + 1 : piece.rfind(b"\n") + 1])
    return b"".join(pieces)
