"""Promise: every exercise of the course runs on the files of a demo, prints figures, and writes its picture.

The demo here is tiny: untrained models, a few texts. The course itself runs on `make demo` (commands.py).
"""

import importlib
import json
import sys

import pytest
import torch

from common.errors import UserError
from model.checkpoint import record_parent, save_model
from model.config import ModelConfig
from model.lora import LoRAConfig, attach
from model.transformer import Transformer
from tests.docs.commands import run_command
from tests.helpers import write_rows

SUMS = [("How much is 2 plus 3?", "2 plus 3 is 5."), ("你好吗？", "我很好。"), ("3+4=？", "3+4=7。")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, tokenizer, pretrain_dir):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "pretrain").symlink_to(pretrain_dir)
    tokenizer.save(folder / "tokenizer")
    (folder / "world").mkdir()
    words = "The capital of Japan is Tokyo. 日本的首都是东京。 The capital of France is Paris. 法国的首都是巴黎。"
    write_rows(folder / "world" / "words.jsonl", [{"text": words}] * 200)
    questions = [{"question": "首都是？", "keys": ["东京"], "lang": "zh"}, {"question": "Capital?", "lang": "en"}]
    write_rows(folder / "world" / "questions.jsonl", questions)
    roles = ("user", "assistant")
    chats = [[{"role": r, "content": c} for r, c in zip(roles, chat, strict=True)] for chat in SUMS]
    write_rows(folder / "world" / "chats.jsonl", [{"messages": chat} for chat in chats])
    answers = {"answers": [{"correct": number % 4 != 0} for number in range(400)]}
    (folder / "answers_dpo.json").write_text(json.dumps(answers), encoding="utf-8")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 3, 4, 2, max_seq_len=128))
    for stage in ("pretrain", "full_sft"):
        save_model(folder / f"{stage}_256.pth", model, stage, tokenizer, [{"stage": stage}])
    attach(model, LoRAConfig(rank=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    path = folder / "lora_sft_256.pth"
    record_parent(model, str(folder / "full_sft_256.pth"), path, None)
    save_model(path, model, "lora_sft", tokenizer, [{"stage": "lora_sft"}])
    return folder


@pytest.fixture
def exercise(demo, tmp_path, monkeypatch, capsys):
    """Run an exercise with its output in tmp_path / "out"; returns what it prints."""

    def run(name, *flags):
        arguments = ["--demo", str(demo), "--out_dir", str(tmp_path / "out"), *flags]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(f"docs.course.{name}").main()
        return capsys.readouterr().out

    return run


def has_picture(folder, name):
    return (folder / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "flags", "picture"),
    [
        ("attention", ("--text", "A dog is a mammal."), "02-embedding-and-attention"),
        ("optimizers", ("--steps", "3", "--width", "32"), "05-optimizer"),
        ("generation", (), "10-generation"),
        ("measuring", (), "11-measuring"),
    ],
)
def test_an_exercise_writes_its_picture(exercise, tmp_path, name, flags, picture):
    output = exercise(name, *flags)
    assert len(output.splitlines()) >= 3 and has_picture(tmp_path, picture)


def test_a_larger_vocabulary_makes_fewer_tokens(exercise, tmp_path, monkeypatch):
    monkeypatch.setattr("docs.course.tokens.SIZES", (300, 400))
    counts = [int(line.split()[2]) for line in exercise("tokens").splitlines() if " entries, " in line]
    assert len(counts) == 2 and counts[1] < counts[0] and has_picture(tmp_path, "01-tokens")


def test_the_gradient_equals_the_difference_quotient(exercise, tmp_path):
    line = next(line for line in exercise("training_step").splitlines() if line.startswith("gradient of one weight"))
    gradient, quotient = (float(part.split()[-1]) for part in line.split(","))
    assert gradient == pytest.approx(quotient, rel=0.02) and gradient
    assert has_picture(tmp_path, "03-training-step")


def test_attention_weights_are_those_of_the_model(demo):
    """The drawn weights times the values give the output of the model's attention."""
    from docs.course.attention import attention_weights

    torch.manual_seed(1)
    model = Transformer(ModelConfig(64, 32, 1, 4, 2, max_seq_len=32)).eval()
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 9, 32)
    cos, sin = model.rope_angles(torch.arange(9), 9)
    with torch.no_grad():
        weights = attention_weights(attention, x, cos, sin)
        values = attention.v_proj(x).view(9, 2, 8).transpose(0, 1).repeat_interleave(2, dim=0)
        out = attention.o_proj((weights @ values).transpose(0, 1).flatten(1))
        torch.testing.assert_close(out, attention(x, cos, sin, None, None)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 9))
    assert not weights.triu(1).any()


def test_the_mask_of_the_exercise_covers_the_answer_only(exercise, tmp_path):
    rows = [line.split()[0] for line in exercise("loss_mask").splitlines() if line.split()[0] in ("yes", "no")]
    assert rows.count("yes") == len(b"The capital of Japan is Tokyo.") + 1  # and <|im_end|>
    assert has_picture(tmp_path, "04-loss-and-mask")


def test_the_rank_of_the_change_is_that_of_the_adapter(exercise, tmp_path):
    assert "the rank of its change is 2" in exercise("lora_change")
    assert has_picture(tmp_path, "07-lora")


def test_the_prompts_of_the_rl_exercise_are_sums(exercise, tmp_path):
    assert "2 of 3 chats" in exercise("sums")
    rows = [json.loads(line) for line in (tmp_path / "out" / "sums.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == [SUMS[0][0], SUMS[2][0]]


def test_brevity_prefers_short_answers():
    from docs.course.sums import brevity

    assert brevity("", "", "5") == 1 > brevity("", "5", "5") > brevity("", "2 plus 3 is 5.", "5") > 0


def test_a_missing_demo_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tokens", "--demo", str(tmp_path)])
    with pytest.raises(UserError, match="make demo"):
        importlib.import_module("docs.course.tokens").main()


def test_docs_check_reports_the_exit_code_and_the_time():
    code, seconds, cpu_seconds = run_command(["python", "-c", "import sys; sum(range(10**6)); sys.exit(3)"])
    assert code == 3 and seconds > 0 and cpu_seconds > 0
