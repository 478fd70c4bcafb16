"""Promise: a folder stands for the data files in it; skipped files and unreadable folders are reported."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from corpus.input_files import expand_inputs
from corpus.readers import read_rows
from corpus.stats import DataStats
from tests.helpers import run_script

ROW = '{"text": "one"}\n'


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)


def test_a_folder_is_read_as_its_data_files_in_order(tmp_path):
    data = ["a.jsonl", "b.csv.gz", "c/1.parquet", "c/d/2.TXT", "e.arrow", "f.json.zst"]
    others = ["README.md", "readme.txt", ".hidden.jsonl", "_cache/x.jsonl", "a.jsonl.part", "b.gz", "c/.git/1.json",
              "c/dataset_info.json", "config.json", "x.partial/1.jsonl", "z.xlsx"]  # fmt: skip
    make(tmp_path, *reversed(data), *others)
    said: list[str] = []
    assert expand_inputs([tmp_path], said.append) == [str(tmp_path / name) for name in data]
    (line,) = said
    assert "6 data files are read, 8 other files are skipped" in line and "README.md" in line
    alone = str(tmp_path / ".hidden.jsonl")
    assert expand_inputs([alone, tmp_path / "c"], said.append)[0] == alone, "a hidden file passed by name is read"


def test_folders_without_data_and_missing_paths_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    make(tmp_path, "other/README.md", "other/book.xlsx")
    for path, words in (
        ("empty", "no data file in this folder, it is empty"),
        ("other", "no data file in this folder, it contains README.md, book.xlsx"),
        ("none", "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            expand_inputs([tmp_path / path])


def test_prepared_datasets_are_rejected_and_the_output_of_clean_is_read(tmp_path, pretrain_dir):
    make(tmp_path, "dataset/sft/train.jsonl", "dataset/sft/val.jsonl")
    (tmp_path / "dataset" / "sft" / "meta.json").write_text('{"format": 1, "kind": "messages", "rows": {}}')
    for folder in (pretrain_dir, tmp_path / "dataset" / "sft", tmp_path / "dataset"):
        with pytest.raises(UserError, match=r"is a dataset prepared by data_process.py"):
            expand_inputs([folder])
    make(tmp_path, "clean/text_000.jsonl", "clean/text_001.jsonl", "clean/dropped.tsv", "clean/report.json")
    files = expand_inputs([tmp_path / "clean"], lambda line: None)
    assert [Path(file).name for file in files] == ["text_000.jsonl", "text_001.jsonl"]


def test_folders_saved_by_datasets_are_read(tmp_path):
    """The files of save_to_disk are written with pyarrow, because `datasets` is not a dependency."""
    pyarrow = pytest.importorskip("pyarrow")
    ipc = pytest.importorskip("pyarrow.ipc")
    for split, count in (("test", 2), ("train", 5)):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
        for part, name in enumerate(names):
            table = pyarrow.table({"text": [f"{split} {part} {i}" for i in range(count)]})
            with ipc.new_stream(folder / name, table.schema) as writer:
                writer.write_table(table)
        (folder / "cache-1234.arrow").write_bytes(b"of map()")
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    texts = {
        name: [row["text"] for file in expand_inputs([tmp_path / name], lambda line: None)
               for _, row in read_rows(file, DataStats())]
        for name in ("saved/train", "saved")
    }  # fmt: skip
    assert texts["saved/train"] == [f"train {part} {i}" for part in range(2) for i in range(5)]
    assert len(texts["saved"]) == 14


def test_train_tokenizer_reads_a_folder(monkeypatch, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for i in range(3):
        rows = "".join(json.dumps({"text": f"今天第{j}个人说，天气很好。 row {j} of {i}"}) + "\n" for j in range(100))
        (tmp_path / "raw" / f"{i}.jsonl").write_text(rows)
    (tmp_path / "raw" / "gbk.txt").write_bytes("我们一起去公园散步吧，这是一个很好的天气！\n\n".encode("gbk") * 20)
    flags = ["--vocab_size", "400", "--out_dir", tmp_path / "tokenizer"]
    run_script(monkeypatch, "train_tokenizer.py", tmp_path / "raw", *flags)
    said = capsys.readouterr().out
    assert "4 data files are read" in said and "gbk.txt: read as GB18030" in said
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
