"""On real text, the default tokenizer meets its targets: characters per token in both languages, time and memory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

DATA = ROOT.parent / "shared" / "data"
TRAIN = """
import sys, time
sys.argv = sys.argv[1:]
import train_tokenizer
from trainer.metrics import peak_memory_mb
start = time.perf_counter()
train_tokenizer.main()
peak = peak_memory_mb('cpu') * 2**20 / 1e9
print(f"seconds={time.perf_counter() - start:.1f} gigabytes={peak:.2f}")
"""


@pytest.mark.real
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_compression_targets_on_real_text(tmp_path: Path) -> None:
    files = [str(DATA / f"pretrain_{language}.jsonl.xz") for language in ("zh", "en")]
    command = [sys.executable, "-c", TRAIN, "train_tokenizer.py", *files, "--out_dir", str(tmp_path / "tokenizer")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr

    def number(pattern: str) -> float:
        found = re.search(pattern, done.stdout)
        assert found, done.stdout
        return float(found.group(1))

    assert "vocabulary: 6,400 entries" in done.stdout
    assert number(r"Chinese: ([\d.]+) characters per token on [\d,]+ characters of held-out") >= 1.27
    assert number(r"English: ([\d.]+) characters per token on [\d,]+ characters of held-out") >= 3.21
    assert number(r"seconds=([\d.]+)") < 120
    assert number(r"gigabytes=([\d.]+)") < 2
