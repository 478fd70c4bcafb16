"""A wrong file, size or data folder: one line that says what was given, what is expected, and what to do."""

import shutil

import pytest

from common.errors import UserError
from model.config import ModelConfig
from tests.helpers import ROOT, one_line_error, run_script

OWN_DATA = {
    "1-pretrain.py": "pretrain", "3-full_sft.py": "sft", "4-lora_sft.py": "sft", "5-dpo_train.py": "dpo",
    "6-grpo_train.py": "rl",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_dir):
    """dataset/pretrain, sft, dpo and rl, as data_process.py writes them."""
    import data_process

    folder = tmp_path_factory.mktemp("dataset")
    rows = {
        "pretrain": '{"text": "one two three 一二三"}\n', "sft": '{"instruction": "Hi?", "output": "Hello."}\n',
        "dpo": '{"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}\n',
        "rl": '{"question": "1+1?", "answer": "2"}\n',
    }  # fmt: skip
    for name, row in rows.items():
        lines = [row.replace("1", str(number)).replace("Hi", f"Hi {number}") for number in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        tokenizer_flags = ["--tokenizer", str(tokenizer_dir)] if name != "rl" else []
        out = ["--out_dir", str(folder / name), "--max_bad_fraction", "1"]
        data_process.main([name, str(folder / f"{name}.jsonl"), *out, *tokenizer_flags])
    return folder


@pytest.fixture
def refuse(monkeypatch, tmp_path, tiny_parent, tokenizer_dir):
    """Run a training script on a data folder; returns its error."""

    def run(script, data_path, *flags):
        start = ["--tokenizer", tokenizer_dir] if script == "1-pretrain.py" else ["--init_from", tiny_parent]
        with pytest.raises(UserError) as error:
            run_script(monkeypatch, script, *start, "--data_path", data_path, "--out_dir", tmp_path / "out", *flags)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return str(error.value)

    return run


@pytest.mark.parametrize("script", OWN_DATA)
def test_every_script_names_the_data_of_another_stage(refuse, folders, script):
    for other in {*OWN_DATA.values()} - {OWN_DATA[script]}:
        before = sorted(path.name for path in (folders / other).rglob("*"))
        message = refuse(script, folders / other)
        assert f"{folders / other} holds " in message and f"data_process.py {OWN_DATA[script]} FILES…" in message
        reader = next(name for name, kind in OWN_DATA.items() if kind == other)
        assert reader in message or script == "6-grpo_train.py", message
        assert sorted(path.name for path in (folders / other).rglob("*")) == before, "no tokens of the wrong kind"


@pytest.mark.parametrize("script", [name for name in OWN_DATA if name != "6-grpo_train.py"])
def test_a_file_or_a_folder_of_raw_files_is_named(refuse, folders, tmp_path, script):
    assert "is a file: --data_path is the folder that" in refuse(script, folders / "sft.jsonl")
    assert f"data_process.py {OWN_DATA[script]} FILES…" in refuse(script, folders)
    assert f"data_process.py {OWN_DATA[script]} FILES…" in refuse(script, tmp_path / "missing")


def test_the_token_folder_of_chats_names_the_folder_above_it(refuse, folders):
    tokens = next((folders / "sft").glob("tokens-*"))
    assert f"the folder above it, {folders / 'sft'}" in refuse("3-full_sft.py", tokens)
    assert "the folder above it" in refuse("1-pretrain.py", tokens)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 500}, "model config: dim 500 is not a multiple of n_heads 16: give dim 480 or 512, or head_dim"),
        (
            {"dim": 500, "n_heads": 4, "n_kv_heads": 4},
            "head_dim 125 is odd, but .*: give dim 496 or 504",
        ),
        ({"dim": 3, "n_heads": 2, "n_kv_heads": 2}, "give dim 4, or head_dim"),
        ({"n_kv_heads": 3}, "n_heads 16 must be a multiple of n_kv_heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_one_short_line(sizes, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig(6400, **{"n_heads": 16, "n_kv_heads": 8, **sizes})
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("dim", [480, 496, 504, 512])
def test_the_suggested_sizes_are_accepted(dim):
    assert ModelConfig(6400, dim=dim, n_heads=16 if dim in (480, 512) else 4, n_kv_heads=4).head_dim % 2 == 0


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("2-eval.py", ["--checkpoint", "README.md", "--prompt", "x"]),
        ("3-full_sft.py", ["--init_from", "README.md"]),
        ("export_model.py", ["README.md", "out_export"]),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_as_such(monkeypatch, tmp_path, script, flags):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    with one_line_error("README.md is not a checkpoint: name a .pth"):
        run_script(monkeypatch, script, *flags)
