"""`make demo`: every step runs, the report is complete, and a second run reuses all results."""

import json
import subprocess
import sys
from pathlib import Path

from demo_world.report import TRAINING
from tests.helpers import ROOT


def run_demo(*flags):
    command = [sys.executable, str(ROOT / "demo.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=400)


def test_demo_runs_every_stage_and_a_second_run_reuses_the_results(tmp_path):
    out = tmp_path / "demo"
    done = run_demo("--out_dir", out, "--max_steps", 2)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["answer_accuracy"].keys() == {"before_sft", "after_sft", "after_lora", "after_dpo"}
    assert all(scores.keys() == {"zh", "en"} for scores in report["answer_accuracy"].values())
    assert report["stages"].keys() == set(TRAINING) and report["bits_per_byte"]["pretrain"].keys() == {"zh", "en"}
    assert len(report["samples"]) == 10 and report["seconds"].keys() >= set(TRAINING)
    assert all(Path(curve).read_bytes().startswith(b"\x89PNG") for curve in report["curves"])
    assert report["identity"].keys() == {"before_lora", "after_lora"}
    assert "val_chosen_preferred_before" in report["stages"]["dpo"]
    exam = report["exam"]
    assert exam["questions"] == 300 and exam["chance"] == 0.25 and exam["low"] < exam["accuracy"] < exam["high"]
    assert exam["sentence"] in " ".join(done.stdout.split())
    for line in ("results of each stage", "ten of the held-out questions", "chat with it:  "):
        assert line in done.stdout

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = run_demo("--out_dir", out, "--max_steps", 2)
    assert again.returncode == 0 and again.stdout.count("already complete") == again.stdout.count("\n[") > 10
    changed = {path.name for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"report.json"}, "a second run rewrites only the report"
