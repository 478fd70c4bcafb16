"""Checksums: known values, and every flipped bit in the records of a .pth is detected."""

import json
import zipfile
import zlib

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import checksums
from common.checksums import checksum, file_checksum, find_damaged_record, has_valid_checksum, with_checksum


def test_checksum_of_the_crc32_check_string():
    """The catalogue of CRC algorithms gives cbf43926 for the text 123456789."""
    assert checksum(b"123456789") == "cbf43926"
    assert checksum(b"") == "00000000"
    assert checksum(np.frombuffer(b"12345678", "<u4")) == checksum(b"12345678")


@given(st.binary(max_size=200))
def test_chunked_and_file_checksums_equal_the_whole(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("c") / "f"
    path.write_bytes(data)
    old, checksums.CHECKSUM_CHUNK_BYTES = checksums.CHECKSUM_CHUNK_BYTES, 7
    try:
        assert checksum(data) == file_checksum(path) == f"{zlib.crc32(data):08x}"
    finally:
        checksums.CHECKSUM_CHUNK_BYTES = old


def test_every_flipped_bit_of_a_saved_model_is_detected(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"a": torch.arange(50.0), "b": torch.ones(3, 4, dtype=torch.bfloat16), "c": "text"}, path)
    assert find_damaged_record(path) == ""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.file_size]
    for record in records:
        head = record.header_offset
        names = int.from_bytes(data[head + 26 : head + 28], "little") + int.from_bytes(
            data[head + 28 : head + 30], "little"
        )
        start = head + 30 + names
        for at in {start, start + record.file_size // 2, start + record.file_size - 1}:
            broken = bytearray(data)
            broken[at] ^= 1 << at % 8
            path.write_bytes(broken)
            assert find_damaged_record(path) == record.filename


def test_json_checksum_ignores_formatting_and_detects_changes():
    content = {"b": [1, 2.5, "二", None], "a": {"c": True}}
    again = json.loads(json.dumps(with_checksum(content), indent=3, ensure_ascii=False))
    assert has_valid_checksum(again) and not has_valid_checksum(again | {"b": [1, 2.5, "三", None]})
