"""All stages on real text within a minute: tokenizer, data, pretraining, SFT, answers. Needs ../shared/data."""

import json
import lzma
import math

import pytest

from tests.helpers import SHARED_DATA, read_jsonl, run_here

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the real data in ../shared/data"),
]
ROWS = {"pretrain_zh": 1500, "pretrain_en": 400, "sft_zh": 800, "sft_en": 300}
SIZE = ["--dim", "128", "--n_layers", "4", "--n_heads", "8", "--n_kv_heads", "4", "--max_seq_len", "256"]


@pytest.fixture
def run_checked(monkeypatch, capsys):
    def run(*command):
        result = run_here(monkeypatch, capsys, *command)
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
        return result.stdout

    return run


def test_real_text_becomes_a_model_that_answers(run_checked, tmp_path):
    files = {}
    for name, count in ROWS.items():
        with lzma.open(SHARED_DATA / f"{name}.jsonl.xz", "rt", encoding="utf-8") as source:
            rows = [line for _, line in zip(range(count), source, strict=False)]
        files[name] = tmp_path / f"{name}.jsonl.xz"
        with lzma.open(files[name], "wt", encoding="utf-8") as target:
            target.writelines(rows)
    texts, chats = [files["pretrain_zh"], files["pretrain_en"]], [files["sft_zh"], files["sft_en"]]
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "out"

    run_checked("train_tokenizer.py", *texts, "--vocab_size", 4096, "--out_dir", tokenizer)
    for kind, sources in (("pretrain", texts), ("sft", chats)):
        limit = ["--max_seq_len", 256] if kind == "sft" else []
        run_checked("data_process.py", kind, *sources, "--tokenizer", tokenizer, "--out_dir", tmp_path / kind, *limit)
    common = ["--out_dir", out, "--device", "cpu", "--eval_tokens", 4096, "--eval_interval", 1000, "--max_steps"]
    data = ["--data_path", tmp_path / "pretrain", "--tokenizer", tokenizer]
    output = run_checked("1-pretrain.py", *data, *SIZE, *common, 60)
    assert "± 0.15: ok" in output, "the first loss is ln(vocabulary)"
    run_checked("3-full_sft.py", "--data_path", tmp_path / "sft", *common, 20, "--log_interval", 1)

    log = read_jsonl(out / "pretrain_128.jsonl")
    last = [row for row in log if "bits_per_byte" in row][-1]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < losses[0] - 1 and losses[0] == pytest.approx(math.log(4096), abs=0.15)
    assert all(1 < bits < 4 for bits in last["bits_per_byte"].values()), last
    steps = [row for row in log if "loss" in row]
    assert min(row["token_fraction"] for row in steps) >= 0.98
    sft = [row for row in read_jsonl(out / "full_sft_128.jsonl") if "loss" in row]
    assert sum(row["token_fraction"] for row in sft) / len(sft) >= 0.9

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("你好，请介绍一下北京。\nWhat is the sun?\n", encoding="utf-8")
    for stage in ("pretrain", "full_sft"):
        flags = ["--stage", stage, "--out_dir", out, "--temperature", 0, "--max_new_tokens", 20]
        run_checked("2-eval.py", *flags, "--prompts", prompts, "--json", tmp_path / "answers.json")
        answers = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))["answers"]
        # After so few steps an answer may be line breaks or empty; its text is not checked.
        assert len(answers) == 2 and all(row["answer"] or row["finish_reason"] == "stop" for row in answers)
