"""CRC-32 of files and buffers: finds bits that a disk, a memory module or a copy has changed.

    checksum(data)                  of bytes, an array or a tensor's memory, as 8 hex digits
    file_checksum(path)             of a whole file
    find_damaged_record("model.pth")    compares every record of a .pth with the CRC-32 that torch.save wrote
    with_checksum({"step": 200})    a JSON object with a field "checksum"; has_valid_checksum: whether it still fits

CRC-32 (ITU-T V.42, as in zip and png; zlib computes it) finds every change of up to 32 bits in a row and misses other
accidents once in 4 * 10^9. It does not protect against tampering: a file that is changed on purpose can get a new
checksum.
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

CHECKSUM_CHUNK_BYTES = 16 << 20  # bytes of one call; zlib lets other threads work meanwhile
MAX_CHECKSUM_THREADS = 4
LOCAL_HEADER_BYTES = 30  # bytes of a zip record's header before its name (PKZIP APPNOTE 4.3.7)


def checksum(data: Any) -> str:
    """The CRC-32 of an object with a buffer (bytes, memoryview, numpy array), as 8 hex digits."""
    view, value = memoryview(data).cast("B") if memoryview(data).nbytes else b"", 0
    for start in range(0, len(view), CHECKSUM_CHUNK_BYTES):
        value = zlib.crc32(view[start : start + CHECKSUM_CHUNK_BYTES], value)
    return f"{value:08x}"


def file_checksum(path: str | os.PathLike[str]) -> str:
    """The CRC-32 of a whole file, as 8 hex digits."""
    value = 0
    with Path(path).open("rb") as file:
        while chunk := file.read(CHECKSUM_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def write_with_checksum(file: BinaryIO, data: Any) -> str:
    """Write an object with a buffer to a file; returns its CRC-32, as 8 hex digits."""
    view, value = memoryview(data).cast("B") if memoryview(data).nbytes else b"", 0
    for start in range(0, len(view), CHECKSUM_CHUNK_BYTES):
        chunk = view[start : start + CHECKSUM_CHUNK_BYTES]
        value = zlib.crc32(chunk, value)
        file.write(chunk)
    return f"{value:08x}"


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON object as it will be read again, with the CRC-32 of all its other fields in the field checksum."""
    saved = json.loads(json.dumps({name: value for name, value in content.items() if name != "checksum"}))
    return {**saved, "checksum": _json_checksum(saved)}


def has_valid_checksum(content: dict[str, Any]) -> bool:
    """Whether a JSON object has a field checksum that fits its other fields."""
    return content.get("checksum") == _json_checksum(
        {name: value for name, value in content.items() if name != "checksum"}
    )


def _json_checksum(content: dict[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def find_damaged_record(path: str | os.PathLike[str], is_selected: Callable[[str], bool] = lambda name: True) -> str:
    """The name of the first record of an uncompressed zip file that differs from its checksum, or "".

    `is_selected` takes the name of a record. Raises zipfile.BadZipFile or OSError when the file has not the
    form of a zip file.
    """
    with zipfile.ZipFile(path) as archive, Path(path).open("rb") as file:
        records = [record for record in archive.infolist() if is_selected(record.filename)]
        if not records:
            return ""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:

            def is_intact_record(record: zipfile.ZipInfo) -> bool:
                header_start = record.header_offset
                sizes = view[header_start + LOCAL_HEADER_BYTES - 4 : header_start + LOCAL_HEADER_BYTES]
                start = (
                    header_start
                    + LOCAL_HEADER_BYTES
                    + int.from_bytes(sizes[:2], "little")
                    + int.from_bytes(sizes[2:], "little")
                )
                if record.compress_type != zipfile.ZIP_STORED or start + record.file_size > len(view):
                    return False
                value = 0
                for chunk_start in range(start, start + record.file_size, CHECKSUM_CHUNK_BYTES):
                    value = zlib.crc32(
                        view[chunk_start : min(chunk_start + CHECKSUM_CHUNK_BYTES, start + record.file_size)], value
                    )
                return value == record.CRC

            with ThreadPoolExecutor(min(MAX_CHECKSUM_THREADS, os.cpu_count() or 1)) as threads:
                results = list(threads.map(is_intact_record, records))
    return next((record.filename for record, is_intact in zip(records, results, strict=True) if not is_intact), "")
