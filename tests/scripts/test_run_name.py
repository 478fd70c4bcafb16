"""--run_name: runs beside one another, parents found there or in --out_dir, finished runs that are not replaced."""

import shutil

import pytest

from common.errors import UserError
from evaluation.chat_model import find_model, models_folder, open_chat_model
from model.checkpoint import read_checkpoint, save_model
from tests.helpers import (
    EXACT_FLAGS,
    IGNORE_TOKEN_FOLDERS,
    load_weights,
    one_line_error,
    run_script,
    tiny_model,
)

FLAGS = [*EXACT_FLAGS, "--batch_size", "4", "--max_steps", "2", "--eval_tokens", "256"]


@pytest.fixture
def out(tmp_path, tiny_parent):
    (tmp_path / "out").mkdir()
    shutil.copy(tiny_parent, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def chats(sft_dir, tmp_path):
    return shutil.copytree(sft_dir, tmp_path / "sft", ignore=IGNORE_TOKEN_FOLDERS)


@pytest.fixture
def run(monkeypatch, chats, out):
    def train(script, *flags):
        run_script(monkeypatch, script, *FLAGS, "--data_path", chats, "--out_dir", out, *flags)

    return train


def test_runs_with_names_lie_beside_one_another_and_find_their_parents(run, out, capsys):
    run("3-full_sft.py")
    run("4-lora_sft.py", "--run_name", "first")
    assert f"starts from {out / 'full_sft_32.pth'}" in capsys.readouterr().out
    run("4-lora_sft.py", "--run_name", "第二", "--rank", "2")
    assert read_checkpoint(out / "first" / "lora_sft_32.pth")["adapter"]["rank"] == 8
    assert read_checkpoint(out / "第二" / "lora_sft_32.pth")["adapter"]["rank"] == 2
    assert not (out / "lora_sft_32.pth").exists()

    run("3-full_sft.py", "--run_name", "second", "--seed", "5")
    run("4-lora_sft.py", "--run_name", "second")
    assert f"starts from {out / 'second' / 'full_sft_32.pth'}" in capsys.readouterr().out


def test_an_adapter_of_a_run_finds_its_parent_after_a_move(run, out, tmp_path):
    run("3-full_sft.py")
    run("4-lora_sft.py", "--run_name", "mine")
    moved = out.rename(tmp_path / "elsewhere")
    assert open_chat_model(moved / "mine" / "lora_sft_32.pth").stage == "lora_sft"


def test_a_finished_run_is_not_replaced_unless_asked(run, out, chats, tmp_path, capsys):
    run("3-full_sft.py")
    before = (out / "full_sft_32.pth").read_bytes()
    with one_line_error("full_sft_32.pth is a finished run", f"2 steps on {chats}", "--run_name", "--resume never"):
        run("3-full_sft.py", "--seed", "7")
    assert (out / "full_sft_32.pth").read_bytes() == before
    assert not list(out.glob("*.resume"))
    run("3-full_sft.py", "--seed", "7", "--resume", "never")
    assert (out / "full_sft_32.pth").read_bytes() != before


def test_the_same_command_may_train_again(run, out):
    """Its result is the same, so nothing is lost: a script that was killed after its last save can be repeated."""
    run("3-full_sft.py")
    before = load_weights(out / "full_sft_32.pth")
    run("3-full_sft.py", "--log_interval", "2")
    after = load_weights(out / "full_sft_32.pth")
    assert all((before[name] == after[name]).all() for name in before)
    for changed in (["--learning_rate", "3e-4"], ["--max_steps", "3"], ["--weight_decay", "0"]):
        with one_line_error("is a finished run"):
            run("3-full_sft.py", *changed)


def test_a_run_stopped_by_its_time_limit_is_continued(run, out, capsys):
    limited = ["--max_steps", "400", "--max_minutes", "0.001"]
    run("3-full_sft.py", *limited)
    first = load_weights(out / "full_sft_32.pth")
    run("3-full_sft.py", "--max_steps", "400", "--max_minutes", "0.02")
    assert "resuming after step" in capsys.readouterr().out
    second = load_weights(out / "full_sft_32.pth")
    assert any((first[name] != second[name]).any() for name in first)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", ""])
def test_a_run_name_is_one_folder(run, name):
    with pytest.raises(UserError, match="run_name"):
        run("3-full_sft.py", "--run_name", name)


def test_lora_on_a_pretrained_model_warns(run, out, tiny_parent, capsys):
    run("4-lora_sft.py", "--init_from", tiny_parent)
    assert "WARNING: that is a pretrained model" in capsys.readouterr().out
    run("3-full_sft.py")
    run("4-lora_sft.py", "--run_name", "mine")
    assert "WARNING: that is" not in capsys.readouterr().out


def test_models_are_found_in_the_only_folder_that_has_some(tmp_path, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no pretrain"):
        find_model(str(out))
    for stage in ("pretrain", "full_sft", "dpo"):
        save_model(out / "demo" / f"{stage}_32.pth", tiny_model(), stage, tokenizer, [{"stage": stage}])
    assert find_model(str(out)) == out / "demo" / "dpo_32.pth"
    assert find_model(str(out), stage="full_sft") == out / "demo" / "full_sft_32.pth"
    save_model(out / "mine" / "full_sft_32.pth", tiny_model(), "full_sft", tokenizer, [{"stage": "full_sft"}])
    with one_line_error("no model in", "demo, mine", "--run_name demo"):
        find_model(str(out))
    save_model(out / "pretrain_32.pth", tiny_model(), "pretrain", tokenizer, [{"stage": "pretrain"}])
    assert find_model(str(out)) == out / "pretrain_32.pth" and models_folder(out) == out
