"""Promise: datatrove's executors keep the same rows as one machine; a missing package is a one-line error."""

import json
import os
import sys
from pathlib import Path

import pytest

import data_process
from common.errors import UserError
from tests.helpers import run_process
from tests.planted import planted_rows

ROWS = 900


@pytest.fixture(scope="module")
def input_files(tmp_path_factory) -> list[Path]:
    """Three files with duplicates within and across files, and one bad row."""
    folder = tmp_path_factory.mktemp("parts")
    rows = list(planted_rows(ROWS, 0.3))
    rows[10], rows[700] = {"text": rows[5]["text"], "id": 10}, {"text": rows[5]["text"], "id": 700}  # exact duplicates
    files = []
    for i in range(3):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[i * 300 : (i + 1) * 300]]
        files.append(folder / f"part{i}.jsonl")
        files[-1].write_text("\n".join([*lines, "{broken"] if i == 1 else lines) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def expected(input_files, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("here") / "out"
    data_process.main(["dedup", *map(str, input_files), "--out_dir", str(out_dir)])
    return out_dir


def kept_text(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("text_*.jsonl")))


def assert_same_output(ours: Path, theirs: Path) -> None:
    assert kept_text(ours) == kept_text(theirs) != ""
    assert not theirs.with_name(theirs.name + ".partial").exists()
    one, other = (json.loads((folder / "report.json").read_text()) for folder in (ours, theirs))
    for name in ("read", "kept", "characters_read", "characters_dropped", "languages", "bad", "history"):
        assert one[name] == other[name], name
    counts = [{name: (rule["rows"], rule["dropped"]) for name, rule in r["rules"].items()} for r in (one, other)]
    assert counts[0] == counts[1] and counts[0]["exact duplicate"] == (2, 2) and one["bad"]
    assert sorted(p.name for p in theirs.iterdir() if "text" not in p.name) == [
        "dropped.tsv",
        "report.json",
        "report.md",
    ]
    lines = [(folder / "dropped.tsv").read_text().splitlines() for folder in (ours, theirs)]
    assert [line.split("\t")[:2] for line in lines[0]] == [line.split("\t")[:2] for line in lines[1]]


def test_local_executor_keeps_the_rows_of_one_machine(input_files, expected, tmp_path, capfd):
    data_process.main(["dedup", *map(str, input_files), "--out_dir", str(tmp_path / "out"), "--executor", "local"])
    assert_same_output(expected, tmp_path / "out")
    output = capfd.readouterr()
    assert "sign: 3 tasks done\nbuckets: 14 tasks done" in output.out and output.err == ""


def test_a_repeated_command_runs_only_the_incomplete_tasks(input_files, expected, tmp_path, monkeypatch, capfd):
    from curation import cluster_dedup

    command = ["dedup", *map(str, input_files), "--out_dir", str(tmp_path / "out"), "--executor", "local"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cluster_dedup, "write_rows_of_file", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        data_process.main(command)
    monkeypatch.setattr(cluster_dedup, "read_documents_of_file", lambda *args: pytest.fail("signed again"))
    data_process.main(command)
    assert_same_output(expected, tmp_path / "out")


def test_bad_files_are_reported_in_one_line(input_files, tmp_path, capfd):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{a\n" * 10 + '{"text": "x"}\n')
    with pytest.raises(UserError, match="10 of 11 rows read are bad"):
        data_process.main(["dedup", str(broken), "--out_dir", str(tmp_path / "out"), "--executor", "local"])
    assert capfd.readouterr().err == "" and not (tmp_path / "out").exists()


SBATCH = """#!/usr/bin/env bash
# Replaces Slurm: runs the tasks of the array immediately and in order, each in its own process.
while [[ $1 == --* ]]; do [[ $1 == --export=* ]] && export RUN_OFFSET="${1##*RUN_OFFSET=}"; shift; done
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for ((task = 0; task <= ${last:-0}; task++)); do
  SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "$1" >>"$SBATCH_LOG" 2>&1 || exit 1
done
echo "Submitted batch job $RANDOM"
"""
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'
SCONTROL = "#!/usr/bin/env bash\necho localhost\n"


@pytest.mark.slow
def test_slurm_executor_keeps_the_rows_of_one_machine(input_files, expected, tmp_path, monkeypatch):
    """datatrove's executor writes and submits its job scripts; sbatch, srun and scontrol are replaced by scripts."""
    programs_dir = tmp_path / "bin"
    programs_dir.mkdir()
    for name, content in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs_dir / name).write_text(content)
        (programs_dir / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs_dir}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "log.txt"))
    flags = ["--executor", "slurm", "--partition", "cpu", "--out_dir", tmp_path / "out"]
    done = run_process(sys.executable, "data_process.py", "dedup", *input_files, *flags)
    assert done.returncode == 0 and "submitted: five job arrays" in done.stdout, done.stderr[-3000:]
    assert_same_output(expected, tmp_path / "out")


@pytest.mark.slow
def test_ray_executor_keeps_the_rows_of_one_machine(input_files, expected, tmp_path):
    flags = ["--executor", "ray", "--workers", "2", "--out_dir", tmp_path / "out"]
    done = run_process(sys.executable, "data_process.py", "dedup", *input_files, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_output(expected, tmp_path / "out")


def test_a_missing_package_is_reported_in_one_line(input_files, tmp_path):
    for module, flags, words in (
        ("datatrove", ["--executor", "local"], '--executor local needs datatrove: pip install "datatrove>='),
        ("ray", ["--executor", "ray"], '--executor ray needs ray: pip install "ray>='),
        ("rensa", ["--executor", "local"], '--executor local needs rensa: pip install "rensa>='),
    ):
        hide = f"import sys; sys.modules[{module!r}] = None; import data_process; from common.errors import *\n"
        call = f"data_process.main({['dedup', str(input_files[0]), '--out_dir', str(tmp_path / 'out'), *flags]!r})"
        done = run_process(sys.executable, "-c", f"{hide}with fail_in_one_line(): {call}")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
