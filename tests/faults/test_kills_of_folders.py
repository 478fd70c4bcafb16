"""Promise: SIGKILL at any file operation of a folder or file replacement leaves the old or the new content.

A forked child counts the audit events (PEP 578) of file operations below a folder and kills itself at the N-th.
Repeating the replacement gives the new content and leaves no temporary files.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import is_temporary, write_text
from common.locks import lock_output
from corpus.dataset_meta import read_meta, write_meta
from corpus.dataset_writer import dataset_staging_folder, replace_dataset
from corpus.shard_writer import ShardWriter
from corpus.tokenize_chats import tokenize_chats
from export.hf_export import staging_folder
from export.model_facts import LINEAGE_FILE
from model.tokenizer import load_tokenizer
from tests.helpers import make_chat_row

OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
MAX_KILLS = 400  # more than the operations of any case


def run_and_kill(write_new: Callable[[], None], folder: Path, at: int) -> bool:
    """Run `write_new` in a forked child; True if it was killed before its operation `at` below `folder`."""
    if (child := os.fork()) == 0:
        try:
            count_and_kill(str(folder), at)
            write_new()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), "write_new failed"
    return status != 0


def count_and_kill(folder: str, at: int) -> None:
    left = at

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in OPERATIONS) and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def folder_text(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_at_every_operation(
    write_new: Callable[[], None], write_old: Callable[[], None], folder: Path, result: Path, record_attacks
) -> None:
    """Kill `write_new` at each of its operations; `write_old` creates the state before it."""
    write_old()
    before = folder_text(result) if result.exists() else None
    write_new()
    after, kills, unchanged = folder_text(result), 0, 0
    for at in range(1, MAX_KILLS):
        for path in folder.iterdir():
            _clear(path)
        write_old()
        if not run_and_kill(write_new, folder, at):
            break
        kills += 1
        with lock_output(result):  # the next run of the command starts with it
            pass
        found = folder_text(result) if result.exists() else None
        assert found in (before, after), f"killed at operation {at}: partly written"
        unchanged += found == before
        write_new()
        assert folder_text(result) == after
        left = [path.name for path in folder.iterdir() if is_temporary(path) or path.name.endswith(".partial")]
        assert not left, f"killed at operation {at}"
    assert kills >= 5 and unchanged > 0
    record_attacks("kills at operations of a replacement", kills, old_content=unchanged, new_content=kills - unchanged)


def _clear(path: Path) -> None:
    for inner in path.iterdir() if path.is_dir() else ():
        _clear(inner)
    path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("older", [True, False])
def test_a_data_folder_is_the_old_one_or_the_new_one(tmp_path, older, record_attacks):
    out = tmp_path / "pretrain"

    def write(folder: Path, ids: list[int]) -> None:
        writer = ShardWriter(folder, "train", "uint16")
        for _ in range(3):
            writer.add(ids)
        write_meta(folder, {"kind": "pretrain", "dtype": "uint16", "splits": {"train": writer.close()}})

    def write_old() -> None:
        if older:
            out.mkdir()
            write(out, [1, 2])

    def write_new() -> None:
        from common.files import remove

        with lock_output(out):
            remove(dataset_staging_folder(out))
            dataset_staging_folder(out).mkdir()
            write(dataset_staging_folder(out), [3])
            replace_dataset(dataset_staging_folder(out), out)

    kill_at_every_operation(write_new, write_old, tmp_path, out, record_attacks)
    assert read_meta(out)["splits"]["train"]["tokens"] == 3


@pytest.mark.parametrize("older", [True, False])
def test_an_export_is_the_old_one_or_the_new_one(tmp_path, older, record_attacks):
    out = tmp_path / "exported"

    def write_old() -> None:
        if older:
            for name in (LINEAGE_FILE, "config.json"):
                write_text(out / name, "old")

    def write_new() -> None:
        with staging_folder(out, overwrite=True) as folder:
            for name in ("model.safetensors", "config.json", LINEAGE_FILE):
                (folder / name).write_text("new")

    kill_at_every_operation(write_new, write_old, tmp_path, out, record_attacks)


@pytest.mark.parametrize("older", ["one", "none", "empty"])
def test_a_tokenizer_is_the_old_one_or_the_new_one(tmp_path, tokenizer, older, record_attacks):
    out = tmp_path / "tokenizer"

    def write_old() -> None:
        if older == "one":
            tokenizer.with_chat_format("belle").save(out)
        elif older == "empty":
            out.mkdir()

    def write_new() -> None:
        with lock_output(out):
            tokenizer.save(out)

    kill_at_every_operation(write_new, write_old, tmp_path, out, record_attacks)
    assert load_tokenizer(out).rendering_fingerprint == tokenizer.rendering_fingerprint


def test_a_tokenized_folder_of_a_training_run_is_the_old_one_or_the_new_one(tmp_path, tokenizer, record_attacks):
    import json

    data = tmp_path / "sft"
    out = data / f"tokens-{tokenizer.rendering_fingerprint}"

    def write_old() -> None:
        for name in ("train", "val"):
            rows = "".join(json.dumps(make_chat_row(i), ensure_ascii=False) + "\n" for i in range(6))
            write_text(data / f"{name}.jsonl", rows)
        tokenize_chats(data, tokenizer, 30)

    def write_new() -> None:
        tokenize_chats(data, tokenizer, 64)

    kill_at_every_operation(write_new, write_old, tmp_path, out, record_attacks)
    assert not [path for path in data.iterdir() if is_temporary(path)]


def test_saving_a_tokenizer_over_a_file_or_beside_other_files_keeps_them(tmp_path, tokenizer):
    write_text(tmp_path / "file", "x")
    with pytest.raises(UserError, match="it is a file"):
        tokenizer.save(tmp_path / "file")
    write_text(tmp_path / "model" / "weights", "x")
    tokenizer.save(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"weights", *tokenizer.files}
