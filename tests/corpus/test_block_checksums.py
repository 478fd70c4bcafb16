"""CRC-32 of files and blocks is right for any sequence of writes, resumes and reads."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.block_checksums import BLOCK_BYTES, ChecksummedFile, VerifiedBlocks

SIZES = st.lists(
    st.sampled_from([0, 1, 5, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES]), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(before=SIZES, lost=SIZES, after=SIZES)
def test_checksums_match_the_bytes_after_any_writes_and_a_resume(tmp_path_factory, before, lost, after):
    """Writes of any size, a flush, a kill after more writes than the saved size, a resume, more writes."""
    path, content = tmp_path_factory.mktemp("sums") / "a.bin", b""
    random = np.random.default_rng(0)
    file = ChecksummedFile(path)
    for size in before:
        content += (piece := random.bytes(size))
        file.write(piece)
    file.flush()
    assert path.read_bytes() == content and file.tell() == len(content)
    state = (file.size, file.checksum)
    for size in lost:
        file.write(random.bytes(size))
    file.close()
    file = ChecksummedFile(path, *state)
    for size in after:
        content += (piece := random.bytes(size))
        file.write(piece)
    file.close()
    file.close()
    assert path.read_bytes() == content and file.size == len(content)
    assert file.checksum == f"{zlib.crc32(content):08x}"
    assert file.block_checksums().tolist() == [
        zlib.crc32(content[at : at + BLOCK_BYTES]) for at in range(0, len(content), BLOCK_BYTES)
    ]


def test_a_file_that_changed_or_shrank_is_not_resumed(tmp_path):
    file = ChecksummedFile(tmp_path / "a.bin")
    file.write(b"123456789")
    file.close()
    (tmp_path / "a.bin").write_bytes(b"123456788 and more")
    with pytest.raises(UserError, match=r"a\.bin has changed since an earlier run wrote it"):
        ChecksummedFile(tmp_path / "a.bin", 9, file.checksum)
    with pytest.raises(OSError, match="shorter"):
        ChecksummedFile(tmp_path / "a.bin", 10, file.checksum)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES + 3]))
def test_every_block_is_verified_before_use(data, size):
    content = np.random.default_rng(0).bytes(size)
    sums = np.array([zlib.crc32(content[at : at + BLOCK_BYTES]) for at in range(0, size, BLOCK_BYTES)], "<u4")
    blocks, bad = VerifiedBlocks(size, sums), data.draw(st.integers(0, len(sums) - 1))
    sums[bad] ^= 1
    for _ in range(5):
        begin = data.draw(st.integers(0, size - 1))
        end = data.draw(st.integers(begin + 1, size))
        if not blocks.is_verified(begin, end):
            first, last = blocks.block_range(begin, end)
            assert first <= begin < end <= last <= size and first % BLOCK_BYTES == 0
            found = blocks.find_mismatch(content[first:last], first)
            assert found == (bad * BLOCK_BYTES if first <= bad * BLOCK_BYTES < last else -1)
            assert blocks.is_verified(begin, end) == (found < 0)
    assert not blocks.verified[bad]
