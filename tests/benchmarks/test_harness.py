import signal
import subprocess
import sys
from unittest import mock

import pytest

from benchmarks import harness
from benchmarks.harness import Case, bar_chart, markdown_table, ratios, run_case, run_rounds
from common.errors import UserError


def python(code: str, name: str = "case") -> Case:
    return Case(name, [sys.executable, "-c", code])


def test_a_case_returns_the_numbers_of_its_last_line_and_its_peak_memory():
    found = run_case(python("x = bytearray(80_000_000); print('noise'); print('{\"speed\": 3}')"))
    assert found["speed"] == 3 and found["peak_memory_mb"] > 76


@pytest.mark.parametrize(
    ("code", "timeout", "message"),
    [
        ("raise SystemExit('no such peer')", 60, "case: exit code 1: no such peer"),
        ("raise SystemExit('[rank1]: RuntimeError: no memory\\n===== summary =====')", 60, "RuntimeError: no memory$"),
        ("print('hello')", 60, "not a JSON object of numbers: 'hello'"),
        ("print('[1]')", 60, "not a JSON object of numbers"),
        ("import time; time.sleep(60)", 0.5, "case: no result after 0.5 seconds"),
    ],
)
def test_a_failing_case_ends_with_one_line(code, timeout, message):
    with pytest.raises(UserError, match=message):
        run_case(python(code), timeout)


def test_an_interrupted_benchmark_ends_its_case(monkeypatch):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(
        harness.subprocess, "Popen", lambda *given, **more: started.append(real(*given, **more)) or started[0]
    )
    monkeypatch.setattr(harness.os, "wait4", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_case(python("import time; time.sleep(60)"))
    monkeypatch.undo()
    assert started[0].wait(30) == -signal.SIGKILL


def test_a_missing_command_is_named():
    with pytest.raises(UserError, match="peer: /no/such/python: No such file"):
        run_case(Case("peer", ["/no/such/python"]))


def test_rounds_are_interleaved_and_start_with_another_case(tmp_path):
    log = tmp_path / "order"
    code = "open({!r}, 'a').write({!r}); print('{{\"x\": 1}}')"
    results = run_rounds([python(code.format(str(log), name), name) for name in "abc"], rounds=3)
    assert log.read_text() == "abcbcacab"
    assert results["b"]["x"] == [1, 1, 1]


def test_a_ratio_is_taken_within_a_round_and_its_median_shown():
    results = {"peer": {"speed": [10.0, 20.0, 40.0]}, "ours": {"speed": [20.0, 60.0, 80.0], "other": [1.0]}}
    assert ratios(results, "speed", "ours", "peer") == [2, 3, 2]
    lines = markdown_table(results, "speed", "peer").splitlines()
    assert lines[0] == "| median of 3 (range) | speed | / peer |"
    assert lines[3] == "| ours | 60 (20 to 80) | 2.00 (2.00 to 3.00) |"


def test_a_table_of_two_metrics_has_a_ratio_of_each():
    results = {
        "peer": {"speed": [10.0], "memory": [4.0]},
        "ours": {"speed": [20.0], "memory": [2.0]},
        "new": {"speed": [5.0]},
    }
    lines = markdown_table(results, ["speed", "memory"], "peer").splitlines()
    assert lines[0] == "| median of 1 (range) | speed | / peer | memory | / peer |"
    assert lines[3:] == ["| ours | 20 | 2.00 | 2 | 0.50 |", "| new | 5 | 0.50 |  |  |"]


def test_a_number_that_a_case_must_print_is_named():
    case = Case("case", [sys.executable, "-c", "print('{\"x\": 1}')"], metrics=["x", "speed"])
    with pytest.raises(UserError, match="case: its last line has no speed"):
        run_case(case)


def test_the_picture_is_written(tmp_path):
    bar_chart({"a": {"speed": [1.0, 2.0]}, "b": {"speed": [3.0]}}, "speed", tmp_path / "speed.png", "title")
    bar_chart(
        {"a": {"speed": [1.0], "memory": [2.0]}, "b": {"speed": [3.0]}}, ["speed", "memory"], tmp_path / "two.png", ""
    )
    for name in ("speed.png", "two.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_a_peer_without_a_memory_figure_of_its_own_gets_its_resident_set():
    case = Case("peer", [sys.executable, "-c", "print('{\"speed\": 3}')"], metrics=("speed", "peak_memory_mb"))
    assert run_case(case)["peak_memory_mb"] > 1
