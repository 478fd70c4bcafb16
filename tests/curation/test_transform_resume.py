"""Promise: the transforms stream their input, resume after a kill to the same bytes, and give the same bytes for any
number of workers."""

import json
import signal
import subprocess
import sys
import time

import pytest

import data_process
from common.errors import UserError
from curation import transform
from tests.helpers import ROOT, read_folder, run_process

ZH = "河流从山里来，穿过村庄和田野，最后流进了大海，两岸的人们靠它生活。"
ROWS = [f"第{i}篇：{ZH}" + ("电话13800138000。" if i % 7 == 0 else "") if i % 5 else "短" for i in range(1200)]


@pytest.fixture
def path(tmp_path):
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in ROWS]
    rows[100:100] = ["{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path / "a.jsonl"


def run_clean(path, out_dir, *flags):
    data_process.main(["clean", str(path), "--out_dir", str(out_dir), *flags])
    return read_folder(out_dir)


@pytest.mark.parametrize("killed_at", [1, 3, 6])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, path, monkeypatch, killed_at, capsys):
    monkeypatch.setattr(transform, "TRANSFORM_BATCH_ROWS", 100)
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(transform, "OUTPUT_FILE_BYTES", 20_000)
    expected = run_clean(path, tmp_path / "whole")
    assert "text_003.jsonl" in expected
    add, calls = transform._OutputFolder.add, []

    def fail_once(self, rows, decisions):
        calls.append(len(rows))
        if len(calls) == killed_at:
            self.kept.write(b"half a line")
            raise KeyboardInterrupt
        add(self, rows, decisions)

    monkeypatch.setattr(transform._OutputFolder, "add", fail_once)
    with pytest.raises(KeyboardInterrupt):
        run_clean(path, tmp_path / "out")
    saved = killed_at > 1  # in the first batch there is no progress to resume: no folder is kept, no message printed
    assert ("the same command continues it" in capsys.readouterr().out) is saved
    assert (tmp_path / "out.partial").exists() is saved
    assert run_clean(path, tmp_path / "out") == expected
    assert sum(calls) == len(ROWS) + calls[killed_at - 1], (
        "only the rows of the interrupted batch are transformed twice"
    )
    assert not (tmp_path / "out.partial").exists()


def test_a_run_ended_by_sigkill_resumes_to_the_same_bytes(tmp_path, path):
    setup = "import data_process, curation.transform as r, corpus.job_state as p; r.TRANSFORM_BATCH_ROWS = 50; "
    setup += "p.CHECKPOINT_SECONDS = 0; "
    call = f"data_process.main(['clean', {str(path)!r}, '--out_dir', {str(tmp_path / 'out')!r}])"
    child = subprocess.Popen([sys.executable, "-c", setup + call], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out.partial" / "progress.json").exists() and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert run_clean(path, tmp_path / "out") == run_clean(path, tmp_path / "whole")


def test_a_run_with_other_rules_restarts(tmp_path, path, monkeypatch):
    monkeypatch.setattr(transform, "TRANSFORM_BATCH_ROWS", 100)
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patched:
        patched.setattr(transform, "write_reports", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_clean(path, tmp_path / "out")
    assert (tmp_path / "out.partial" / "progress.json").is_file()
    assert run_clean(path, tmp_path / "out", "--skip", "personal") == run_clean(
        path, tmp_path / "whole", "--skip", "personal"
    )


def test_a_run_never_resumes_from_the_output_of_other_rules(tmp_path, path, monkeypatch):
    monkeypatch.setattr(transform, "TRANSFORM_BATCH_ROWS", 100)
    expected = run_clean(path, tmp_path / "whole")
    for seconds, flags in (
        (0, ()),
        (20, ("--skip", "personal")),
    ):  # the second run is interrupted before it saves progress
        with monkeypatch.context() as patched:
            patched.setattr("corpus.job_state.CHECKPOINT_SECONDS", seconds)
            patched.setattr(transform, "write_reports", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run_clean(path, tmp_path / "out", *flags)
    assert run_clean(path, tmp_path / "out") == expected


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, path):
    assert run_clean(path, tmp_path / "one") == run_clean(path, tmp_path / "three", "--workers", "3")


def test_bad_input_leaves_nothing_behind(tmp_path, path):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{broken\n')
    with pytest.raises(UserError, match="1 of 2 rows read are bad"):
        run_clean(tmp_path / "bad.jsonl", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        run_clean(path, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["a.jsonl", "bad.jsonl", "full"]


def test_a_full_disk_is_reported_in_one_line(tmp_path, path):
    def small_disk():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run_process(
        sys.executable, "data_process.py", "clean", path, "--out_dir", tmp_path / "out", preexec_fn=small_disk
    )
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["clean", "dedup", "decontaminate"])
def test_memory_does_not_grow_with_the_file_size(tmp_path, kind):
    """Twelve times as many rows, all different, raise the peak memory by less than 25 MB."""
    exam = tmp_path / "exam.txt"
    exam.write_text("哪一条河流经过的国家首都最多，请选出正确的一项来回答？")
    peaks = []
    for count in (500, 6000):
        path = tmp_path / f"{count}.jsonl"
        rows = (json.dumps({"text": f"{i}。" + "".join(f"{ZH}{i * k}" for k in range(30))}) for i in range(count))
        path.write_text("\n".join(rows))
        flags = {"decontaminate": ["--against", str(exam)], "clean": ["--skip", "repeated_ngrams"], "dedup": []}[kind]
        arguments = [kind, str(path), "--out_dir", str(tmp_path / f"out{count}"), *flags]
        code = (
            f"import data_process; from trainer.metrics import peak_memory_mb as p; data_process.main({arguments!r}); "
        )
        done = run_process(sys.executable, "-c", code + "print('peak', p('cpu'))")
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split("peak ")[-1]))
    assert path.stat().st_size > 25e6 and peaks[1] - peaks[0] < 25, peaks
