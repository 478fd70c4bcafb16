import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import GpuConfig, Row, Rows, generation_table, run_row, training_table
from benchmarks.harness import Case
from benchmarks.pretrain_throughput import throughput
from common.errors import UserError


def python(code: str) -> Row:
    return Row("group", "Mengya", Case("case", [sys.executable, "-c", code]), 1e9)


def test_without_a_gpu_there_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"no CUDA GPU: .*--device cpu --preset demo --quick"):
            gpu.main()


@pytest.mark.slow
def test_the_whole_program_on_a_cpu(monkeypatch, tmp_path):
    flags = ["--device", "cpu", "--preset", "demo", "--quick", "--out_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    gpu.main()
    text = (tmp_path / "gpu.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| demo, 4 x 128", "| generation, float32,"))]
    assert len(rows) == 5 and all("1.00" in row or "Mengya" in row or "generation" in row for row in rows), text
    assert not any(word in text for word in ("exit code", "no result", gpu.NO_TIME)), text


def test_the_rows_of_the_default_run_begin_with_the_most_telling(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/train_en_000.bin").write_bytes(b"")
    rows = Rows(GpuConfig(), tmp_path, torch.device("cpu"))
    names = [(row.group, row.name) for row in rows.all()]
    assert names[0] == ("base, 16 x 2048", "transformers") and names[1] == ("base, 16 x 2048", "Mengya")
    assert ("small, 64 x 512", "Mengya, MoE") in names and len(names) == 12


def test_a_failed_or_late_row_says_why():
    assert run_row(python("raise SystemExit('no kernel')"), 60, 1) == "case: exit code 1: no kernel"
    assert run_row(python("print('{\"x\": 1}')"), 60, 1)["x"] == 1
    assert run_row(python("print('{\"x\": 1}')"), 3, 1) == gpu.NO_TIME


def test_tables_show_ratio_mfu_and_failures():
    base = Row("small, 64 x 512", "transformers + compile", Case("a", []), 2e8)
    ours, failed = Row("small, 64 x 512", "Mengya", Case("b", []), 2e8), Row("base", "Mengya", Case("c", []), 1e9)
    numbers = {"tokens_per_second": 5e5, "peak_memory_mb": 2048.0}
    table = training_table([(base, numbers), (ours, {**numbers, "tokens_per_second": 1e6}), (failed, "killed")], 1e15)
    assert "| small, 64 x 512 | Mengya | 1,000,000 | 2.00 | 20.0% | 2.00 |" in table
    assert "| base | Mengya | killed | | | |" in table
    speeds = {"tokens_per_second_1_row": 100.0, "tokens_per_second_16_rows": 900.0, "first_token_ms_64": 3.0,
              "first_token_ms_384": 4.0, "peak_memory_mb": 512.0}  # fmt: skip
    table = generation_table([(Row("generation", "Mengya", Case("d", [])), speeds), (ours, numbers)])
    assert table.splitlines()[2] == "| generation, Mengya | 100.0 | 900.0 | 3.0 | 4.0 | 0.50 |"
    assert len(table.splitlines()) == 3


def test_throughput_is_that_of_the_second_half_of_the_log():
    rows = [{"step": i, "tokens": 100 * i, "seconds": 50.0 + i, "tokens_per_second": 9} for i in range(1, 9)]
    rows[0]["seconds"] = 1.0
    assert throughput([*rows, {"step": 8, "val_loss": {}}]) == pytest.approx(100)
