"""`make demo`: every step runs, the report is complete, and a second run, or one with --rl, reuses all results."""

import json
from pathlib import Path

import pytest

from demo_world.report import TRAINING
from tests.faults.inject import Injector

pytest.importorskip("fcntl", reason="the demo's processes are forked")


@pytest.fixture
def run_demo():
    """Run two steps of each training of demo.py. Its 18 processes are forks of one that has imported torch."""
    injector = Injector()
    command = ["demo.py", "--lang", "en", "--max_steps", 2, "--out_dir"]
    yield lambda out, *more: injector.run([*command, out, *more], [], timeout=400)
    injector.close()


def test_demo_runs_every_stage_and_later_runs_reuse_the_results(run_demo, tmp_path):
    out = tmp_path / "demo"
    done = run_demo(out)
    assert done.code == 0, done.output
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
    assert exam["sentence"] in " ".join(done.output.split())
    for line in (
        "results of each stage",
        "ten of the held-out questions",
        "report to open in a browser:  ",
        "chat with it:  ",
    ):
        assert line in done.output

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = run_demo(out)
    assert again.code == 0 and again.output.count("already complete") == again.output.count("\n[") > 10
    changed = {path.name for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"report.json", "report.html"}, "a second run rewrites only the report"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "dpo_256" in page and 'id="scores"' in page, "written after the last questions and the exam"

    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    further = run_demo(out, "--rl")
    assert further.code == 0, further.output
    assert further.output.count("already complete") == again.output.count("already complete"), "the same steps before"
    assert {path.name for path in files if path.stat().st_mtime_ns != files[path]} == {
        "report.json",
        "report.html",
        "steps.json",
    }
    more = json.loads((out / "report.json").read_text(encoding="utf-8"))
    result = more.pop("rl")
    assert more.keys() == report.keys() and more["answer_accuracy"] == report["answer_accuracy"]
    assert result["accuracy"]["calculator"].keys() == {"tools", "grpo"}
    assert result["accuracy"]["arithmetic"].keys() == result["accuracy"]["world"].keys() == {"dpo", "tools", "grpo"}
    assert result["steps"] == 2 and len(result["samples"]) == 2
    assert Path(result["curves"]).read_bytes().startswith(b"\x89PNG")
    for line in ("tools, thoughts and reinforcement learning", "two sampled answers", "--tools calculator"):
        assert line in further.output
