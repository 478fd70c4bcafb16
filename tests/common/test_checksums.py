"""Checksums: known values, and every flipped bit of a .pth's records is found."""

import json
import zipfile
import zlib

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import checksums
from common.checksums import check_zip, checksum, file_checksum, has_valid_checksum, with_checksum


def test_the_check_value_of_crc_32():
    """The catalogue of CRC algorithms gives cbf43926 for the text 123456789."""
    assert checksum(b"123456789") == "cbf43926"
    assert checksum(b"") == "00000000"
    assert checksum(np.frombuffer(b"12345678", "<u4")) == checksum(b"12345678")


@given(st.binary(max_size=200))
def test_pieces_and_files_have_the_checksum_of_the_whole(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("c") / "f"
    path.write_bytes(data)
    old, checksums.PIECE = checksums.PIECE, 7
    try:
        assert checksum(data) == file_checksum(path) == f"{zlib.crc32(data):08x}"
    finally:
        checksums.PIECE = old


def test_a_saved_model_is_whole_and_each_flipped_bit_of_its_records_is_found(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"a": torch.arange(50.0), "b": torch.ones(3, 4, dtype=torch.bfloat16), "c": "text"}, path)
    assert check_zip(path) == ""
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
            assert check_zip(path) == record.filename


def test_the_checksum_of_json_is_of_what_it_says():
    content = {"b": [1, 2.5, "二", None], "a": {"c": True}}
    again = json.loads(json.dumps(with_checksum(content), indent=3, ensure_ascii=False))
    assert has_valid_checksum(again) and not has_valid_checksum(again | {"b": [1, 2.5, "三", None]})
