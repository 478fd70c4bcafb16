"""Promise: train_on.py sorts own files, chooses base and method, trains with printed commands and continues."""

import json
import shutil
import sys

import pytest

from common.errors import UserError
from evaluation.own_files import comparable_chats, context_of, find_base, long_fraction, sort_files
from model.checkpoint import read_checkpoint, save_model
from tests.helpers import load_script, one_line_error, tiny_model, write_rows

CHATS = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(60)]
PAIRS = [{"prompt": f"Greet guest {i}.", "chosen": f"Hello guest {i}!", "rejected": f"Go {i}."} for i in range(30)]


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    (folder / "more").mkdir(parents=True)
    write_rows(folder / "chats.jsonl", CHATS)
    write_rows(folder / "more" / "pairs.jsonl", PAIRS)
    (folder / "book.txt").write_text("The sun rises over the river.\n\nThe tree is old.\n", encoding="utf-8")
    (folder / "table.csv").write_text("instruction,output\n" + "Say yes.,yes\n" * 3, encoding="utf-8")
    return folder


def write_base(folder, tokenizer, *stages, max_seq_len=256):
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        model = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len)
        save_model(folder / f"{stage}_32.pth", model, stage, tokenizer, [{"stage": stage}])
    return folder


def test_files_are_sorted_by_what_most_of_their_rows_are(mine):
    found = {kind: [path.removeprefix(f"{mine}/") for path in paths] for kind, paths in sort_files(str(mine)).items()}
    assert found == {"text": ["book.txt"], "chat": ["chats.jsonl", "table.csv"], "pair": ["more/pairs.jsonl"]}
    write_rows(mine / "odd.jsonl", [{"frage": "a", "antwort": "b"}] * 3)
    with one_line_error("odd.jsonl: none of its 3 rows is usable", "frage, antwort", "--keys"):
        sort_files(str(mine))
    assert sort_files(str(mine / "odd.jsonl"), "prompt=frage,answer=antwort") == {"chat": [str(mine / "odd.jsonl")]}


def test_the_base_is_the_users_before_the_demos(tmp_path, tokenizer):
    with one_line_error("no base model", "make demo", "--base"):
        find_base(str(tmp_path))
    write_base(tmp_path / "demo", tokenizer, "pretrain", "full_sft")
    write_base(tmp_path / "other", tokenizer, "full_sft")
    assert find_base(str(tmp_path)) == tmp_path / "demo" / "full_sft_32.pth"
    write_base(tmp_path, tokenizer, "pretrain")
    assert find_base(str(tmp_path)) == tmp_path / "pretrain_32.pth"
    with one_line_error("is a folder"):
        find_base(str(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("base_stage", "count", "context", "stage", "why"),
    [
        ("full_sft", 40, 256, "lora_sft", "below 2,000 chats"),
        ("full_sft", 2000, 256, "full_sft", "from 2,000 chats"),
        ("pretrain", 40, 256, "full_sft", "has seen no chats"),
        ("full_sft", 40, 32, "full_sft", "are longer than its context of 32 tokens"),
    ],
)
def test_the_method_follows_the_amount_the_base_and_the_length(
    base_stage, count, context, stage, why, tmp_path, tokenizer, process, monkeypatch, capsys
):
    """Nothing is trained: the command is compared."""
    script = load_script("train_on.py")
    base = write_base(tmp_path / "base", tokenizer, base_stage, max_seq_len=context) / f"{base_stage}_32.pth"
    data = process(
        "sft",
        write_rows(
            tmp_path / "chats.jsonl", [{"question": f"question {i}?", "answer": f"answer {i}."} for i in range(count)]
        ),
    )
    monkeypatch.setattr(script, "meta_of", lambda folder: {"rows": {"train": count}})
    config = script.TrainOnConfig(folder="mine", yes=True)
    run = script.OwnRun(config, tmp_path / "out" / "mine", {}, base, script.Choices({}, True))
    commands = []
    monkeypatch.setattr(run, "do", lambda name, title, command, result: commands.append((command, result)))
    model = script.train_on_chats(run, base, data)
    assert model == tmp_path / "out" / "mine" / f"{stage}_32.pth"
    ((command, result),) = commands
    words = " ".join(map(str, command))
    assert result == model and f"--init_from {base}" in words and "--run_name mine" in words
    assert ("--max_seq_len 512" in words) == (context == 32)
    assert why in capsys.readouterr().out and (long_fraction(data, context) > 0.5) == (context == 32)


@pytest.fixture
def train_on(monkeypatch, tmp_path):
    """Runs train_on.py with its commands in this process; returns them."""
    script, commands = load_script("train_on.py"), []

    def run_command(command, results=(), quiet=False):
        commands.append(" ".join(command))
        monkeypatch.setattr(sys, "argv", command)
        load_script(command[0]).main()

    def run(*arguments):
        commands.clear()
        argv = ["train_on.py", *map(str, arguments), "--out_dir", str(tmp_path / "out"), "--max_steps", "2", "--yes"]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(script, "run_command", run_command)
        script.main()
        return list(commands)

    return run


def test_own_files_become_a_model_and_a_second_run_does_nothing(train_on, tmp_path, mine, tokenizer, capsys):
    """Text, chats and pairs through all scripts, two steps each."""
    write_base(tmp_path / "out", tokenizer, "pretrain", "full_sft")
    scripts = [command.split()[0] for command in train_on(mine)]
    assert scripts == [
        *["data_process.py"] * 6, "1-pretrain.py", "3-full_sft.py", "5-dpo_train.py", "2-eval.py",
    ]  # fmt: skip
    out = tmp_path / "out" / "mine"
    assert [entry["stage"] for entry in read_checkpoint(out / "dpo_32.pth")["lineage"]] == [
        "pretrain", "pretrain", "full_sft", "dpo",
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert f"chat with it:  python 2-eval.py --checkpoint {out / 'dpo_32.pth'}" in shown.replace(".venv/bin/", "")
    assert shown.count("loss on held-out chats") == 2 and (out / "comparison.md").is_file()
    assert "chats are few" not in shown and "texts" in shown and "note: 30 pairs are few" not in shown

    assert train_on(mine) == [] and capsys.readouterr().out.count("already complete") == 7

    write_rows(mine / "chats.jsonl", CHATS[:50])
    with one_line_error("was trained on other files", "--run_name"):
        train_on(mine)
    assert train_on(mine, "--run_name", "second", "--base", out / "full_sft_32.pth")


def test_an_interrupted_run_keeps_answers_and_continues(tmp_path, tokenizer, mine, monkeypatch, capsys):
    script = load_script("train_on.py")
    base = write_base(tmp_path / "out", tokenizer, "full_sft") / "full_sft_32.pth"
    record = {"answers": {"method": False}, "steps": {"sft_data": ["x"]}}
    run = script.OwnRun(
        script.TrainOnConfig(folder="mine"), tmp_path / "out" / "mine", record, base, script.Choices(record, False)
    )
    ran = []

    def stopped(command, results, quiet):
        ran.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run_command", stopped)
    (tmp_path / "there").touch()
    run.do("sft_data", "Prepare", ["x"], tmp_path / "there")
    with pytest.raises(KeyboardInterrupt):
        run.do("lora_sft", "Train", ["y"], tmp_path / "there")
    saved = json.loads((tmp_path / "out" / "mine" / "steps.json").read_text(encoding="utf-8"))
    assert "--epochs 1" in capsys.readouterr().out
    assert saved == {"answers": {"method": False}, "steps": {"sft_data": ["x"]}} and ran == [["y"]]
    assert run.choices.ask("method", "LoRA?") is False and "no (answered before)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--yes"):
        run.choices.ask("new", "New?")


def test_chats_longer_than_the_context_of_the_base_are_named_beside_its_loss():
    """A base with a short context may fit no chat of a language: its loss is then None."""
    shown_loss = load_script("train_on.py").shown_loss
    assert shown_loss("zh", {"loss": 5.475, "dropped": 0}) == "zh 5.47"
    assert shown_loss("zh", {"loss": 11.19, "dropped": 16}) == "zh 11.19 (without 16 longer than its context)"
    assert shown_loss("en", {"loss": None, "dropped": 2}) == "en not measured (without 2 longer than its context)"


def test_a_model_with_a_longer_context_is_compared_on_the_chats_that_fit_its_base(tmp_path, tokenizer, process, capsys):
    base = write_base(tmp_path / "base", tokenizer, "full_sft") / "full_sft_32.pth"
    chats = [{"messages": [{"role": "user", "content": word * n}, {"role": "assistant", "content": "好\u2028吗"}]}
             for n in (1, 2, 90, 120) for word in "春夏秋冬东西南北上下"]  # fmt: skip
    data = process("sft", write_rows(tmp_path / "rows.jsonl", chats), "--val_fraction", "0.5", "--max_seq_len", 512)
    limit, all_chats = context_of(base), data / "val.jsonl"
    path = comparable_chats(data, base, tmp_path / "compared.jsonl")
    kept = path.read_text(encoding="utf-8").split("\n")[:-1]
    left = [line for line in all_chats.read_text(encoding="utf-8").split("\n")[:-1] if line not in kept]
    assert kept and left and "are longer than the" in capsys.readouterr().out
    sizes = [[len(tokenizer.render(json.loads(line)["messages"])[0]) for line in lines] for lines in (kept, left)]
    assert max(sizes[0]) <= limit < min(sizes[1])
    assert comparable_chats(data, base, path) == path, "the same again"


def test_chats_that_are_too_long_to_train_on_are_not_counted(tmp_path, process):
    rows = [{"question": f"{i} " + "很长" * (400 if i % 4 == 0 else 1), "answer": "好。"} for i in range(80)]
    data = process("sft", write_rows(tmp_path / "rows.jsonl", rows), "--val_fraction", "0", "--max_seq_len", 128)
    assert load_script("train_on.py").size_of(data, "chat") == 60


def test_epochs_are_the_users_choice(tmp_path, tokenizer, process, monkeypatch, capsys):
    script = load_script("train_on.py")
    base = write_base(tmp_path / "base", tokenizer, "full_sft") / "full_sft_32.pth"
    data = process("sft", write_rows(tmp_path / "chats.jsonl", CHATS))
    for epochs, words in ((2, ["--epochs", 2]), (0, ["--epochs", 20])):
        choices = script.Choices({}, True)
        run = script.OwnRun(script.TrainOnConfig(folder="mine", epochs=epochs), tmp_path / "out", {}, base, choices)
        commands = []
        monkeypatch.setattr(run, "do", lambda name, title, command, result, to=commands: to.append(command))
        script.train_on_chats(run, base, data)
        at = commands[0].index("--epochs")
        assert commands[0][at : at + 2] == words and f"Train for {words[1]} epochs" in capsys.readouterr().out
    choices = script.Choices({"answers": {"method": True, "epochs": False}}, False)
    run = script.OwnRun(script.TrainOnConfig(folder="mine"), tmp_path / "out", {}, base, choices)
    with one_line_error("--epochs N"):
        script.train_on_chats(run, base, data)


def test_bad_folders_get_one_line(tmp_path, monkeypatch, tokenizer):
    script = load_script("train_on.py")
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture").mkdir()
    (tmp_path / "picture" / "a.png").write_bytes(b"\x89PNG")
    for name, text in (("missing", "no such file"), ("empty", "no data file"), ("picture", "no data file")):
        monkeypatch.setattr("sys.argv", ["train_on.py", str(tmp_path / name)])
        with one_line_error(text):
            script.main()
    write_rows(tmp_path / "chats.jsonl", CHATS)
    (tmp_path / "out" / "chats").mkdir(parents=True)
    write_base(tmp_path / "out", tokenizer, "full_sft")
    shutil.copy(tmp_path / "out" / "full_sft_32.pth", tmp_path / "out" / "chats")
    monkeypatch.setattr("sys.argv", ["train_on.py", str(tmp_path / "chats.jsonl"), "--out_dir", str(tmp_path / "out")])
    with one_line_error("holds other models", "--run_name"):
        script.main()
