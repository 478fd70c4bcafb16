"""CRC-32 checksums of files and buffers, to detect data corruption by disks, memory or copies.

    checksum(data)                      8 hex digits for bytes, an array or a tensor's memory
    file_checksum(path)                 the same for a file
    find_damaged_record("model.pth")    compares each record of a .pth with the CRC-32 that torch.save wrote
    with_checksum({"step": 200})        adds a field "checksum" to a JSON object; has_valid_checksum verifies it

CRC-32 (ITU-T V.42, as in zip and png; computed by zlib) detects every burst error of up to 32 bits and misses other
errors with probability 2^-32. It does not protect against deliberate changes.
"""

import json
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

CHECKSUM_CHUNK_BYTES = 16 << 20  # bytes per zlib call, which releases the GIL
MAX_CHECKSUM_THREADS = 4
LOCAL_HEADER_BYTES = 30  # size of a zip record's header before its name (PKZIP APPNOTE 4.3.7)


def checksum(data: Any) -> str:
    """The CRC-32 of an object with a buffer (bytes, memoryview, numpy array), as 8 hex digits."""
    return f"{_crc32(memoryview(data).cast('B') if memoryview(data).nbytes else b''):08x}"


def _crc32(view: memoryview | bytes) -> int:
    value = 0
    for start in range(0, len(view), CHECKSUM_CHUNK_BYTES):
        value = zlib.crc32(view[start : start + CHECKSUM_CHUNK_BYTES], value)
    return value


def file_checksum(path: str | os.PathLike[str]) -> str:
    """The CRC-32 of a file, as 8 hex digits."""
    value = 0
    with Path(path).open("rb") as file:
        while chunk := file.read(CHECKSUM_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def write_with_checksum(file: BinaryIO, data: Any) -> str:
    """Write an object with a buffer to a file; returns its CRC-32, as 8 hex digits."""
    file.write(data)
    return checksum(data)


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON object after a JSON round trip, with a field "checksum": the CRC-32 of all other fields."""
    saved = json.loads(json.dumps({name: value for name, value in content.items() if name != "checksum"}))
    return {**saved, "checksum": _json_checksum(saved)}


def has_valid_checksum(content: dict[str, Any]) -> bool:
    """Whether the field "checksum" of a JSON object matches its other fields."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return content.get("checksum") == _json_checksum(rest)


def _json_checksum(content: dict[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def find_damaged_record(path: str | os.PathLike[str], is_selected: Callable[[str], bool] = lambda name: True) -> str:
    """The name of the first record of an uncompressed zip file whose checksum does not match, or "".

    Only records whose name passes `is_selected` are verified. Raises zipfile.BadZipFile or OSError if the file is not a
    zip file.
    """
    with zipfile.ZipFile(path) as archive, Path(path).open("rb") as file:
        records = [record for record in archive.infolist() if is_selected(record.filename)]
        if not records:
            return ""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:

            def is_intact_record(record: zipfile.ZipInfo) -> bool:
                header_end = record.header_offset + LOCAL_HEADER_BYTES
                sizes = view[header_end - 4 : header_end]  # of the name and of the extra field, two bytes each
                start = header_end + int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")
                if record.compress_type != zipfile.ZIP_STORED or start + record.file_size > len(view):
                    return False
                return _crc32(view[start : start + record.file_size]) == record.CRC

            with ThreadPoolExecutor(min(MAX_CHECKSUM_THREADS, os.cpu_count() or 1)) as threads:
                results = list(threads.map(is_intact_record, records))
    return next((record.filename for record, is_intact in zip(records, results, strict=True) if not is_intact), "")
