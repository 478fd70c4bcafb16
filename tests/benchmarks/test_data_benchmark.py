import json
import sys

import pytest

from benchmarks import data, data_case
from benchmarks.data import WHAT, DataBenchmarkConfig, make_cases, write_table
from benchmarks.data_inputs import DataInputsConfig, prepare_data
from benchmarks.harness import run_case
from benchmarks.peer_cases import plain_tools
from common import cli
from common.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    prepare_data(DataInputsConfig(folder, preset="demo", megabytes=0.1))
    return folder


def test_the_inputs_are_limited_and_the_same_for_all(folder):
    sizes = json.loads((folder / "sizes.json").read_text())
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 100_000 <= sizes["text"] == sum(len(text.encode()) for text in texts) < 120_000
    assert 100_000 <= sizes["chats"] < 120_000
    assert len(json.loads((folder / "prompts.json").read_text())) == sizes["questions"]


@pytest.mark.parametrize("what", ["pretrain", "sft", "clean"])
def test_our_program_prints_its_speed(what, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data_case", str(folder), what])
    data_case.main()
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["mb_per_second"] > 0 and numbers["mb_per_cpu_second"] > 0


def test_plain_tools_train_a_tokenizer_and_score_the_exam(folder):
    assert plain_tools.train_plain_tokenizer(folder)["seconds"] > 0
    prompts = json.loads((folder / "prompts.json").read_text())
    (folder / "prompts.json").write_text(json.dumps(prompts[:3]))
    assert plain_tools.score_exam(folder)["questions_per_second"] > 0
    (folder / "prompts.json").write_text(json.dumps(prompts))


def test_datasets_map_packs_the_text_into_blocks(folder):
    pytest.importorskip("datasets")
    case = next(make_cases(DataBenchmarkConfig(), "pretrain", str(folder), sys.executable))
    assert case.name == "datasets.map, 1 process"
    numbers = run_case(case)
    assert numbers["rows"] > 10 and numbers["mb_per_second_map_only"] > numbers["mb_per_second"] > 0


def test_rows_of_every_table(tmp_path):
    names = {
        what: [case.name for case in make_cases(DataBenchmarkConfig(), what, str(tmp_path), "python")] for what in WHAT
    }
    both = ["datasets.map, 1 process", "Mengya, 1 process", "datasets.map, 2 processes", "Mengya, 2 processes"]
    assert names["pretrain"] == names["sft"] == both
    assert names["clean"] == ["Mengya"] and names["tokenizer"] == ["tokenizers", "Mengya"]
    assert names["exam"] == ["transformers", "Mengya"]


def test_a_table_is_written(tmp_path):
    results = {
        "datasets.map": {"mb_per_second": [1.0], "peak_memory_mb": [300.0], "mb_per_second_map_only": [1.5]},
        "Mengya": {"mb_per_second": [4.0], "peak_memory_mb": [200.0]},
    }
    write_table(DataBenchmarkConfig(out_dir=str(tmp_path)), "pretrain", results)
    text = (tmp_path / "data-pretrain.md").read_text()
    assert "| Mengya | 4.00 | 4.00 | 200.00 | 0.67 |" in text and "the demo world" in text
    assert "datasets.map without reading the jsonl file 1.5 MB/s" in text


@pytest.mark.parametrize("flags", [["--what", "speed"], ["--processes", "0"]])
def test_wrong_flags_are_one_line_each(flags):
    with pytest.raises(UserError, match=flags[1]):
        cli.parse(DataBenchmarkConfig, "", flags)


def test_without_peers_nothing_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "peer_python", lambda names: pytest.fail("installs peers"))
    monkeypatch.setattr(data, "run_case", lambda case: {})
    numbers = {"mb_per_cpu_second": [1.0], "peak_memory_mb": [1.0]}
    monkeypatch.setattr(data, "run_rounds", lambda cases, rounds: {cases[0].name: numbers})
    monkeypatch.setattr(sys, "argv", ["data", "--what", "clean", "--out_dir", str(tmp_path)])
    data.main()
    assert (tmp_path / "data-clean.png").is_file()
