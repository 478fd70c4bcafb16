"""eval_ceval.py: scores of an oracle and of a constant model, all kinds of models, result files, one-line errors."""

import csv
import dataclasses
import json
import sys

import pytest
import torch

from evaluation.exam_data import CEVAL_LETTERS
from model.checkpoint import save_model
from model.config import ModelConfig
from model.transformer import Transformer
from tests.helpers import ROOT, load_script, run_here, run_script
from tests.model.test_hf_parity import hf_settings

RIGHT = {"law": "CCAC", "logic": "BCDD"}


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """Two subjects of four questions. The correct options contain 对."""
    folder = tmp_path_factory.mktemp("exam")
    for split in ("dev", "val", "test"):
        (folder / split).mkdir()
        for subject, answers in RIGHT.items():
            head = ["id", "question", *CEVAL_LETTERS, *(["answer"] if split != "test" else [])]
            rows = [head]
            for number, answer in enumerate(answers):
                options = [f"{'对' if letter == answer else '错'}{number}" for letter in CEVAL_LETTERS]
                row = [str(number), f"{subject} {split} {number}?", *options, answer]
                rows.append(row[: len(head)])
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
    return folder


def constant_model(tokenizer, letter):
    """A model that always predicts `letter`: the residual stream is the same constant vector for every token."""
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 1, 4, 2, max_seq_len=128, tie_embeddings=False))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[tokenizer.encode(letter)[0]] = 1.0
    return model


class OracleModel(Transformer):
    """Predicts the letter of the line with 对 in the prompt."""

    tokenizer = None

    def forward(self, input_ids, cache=None, padding=None, token_mask=None):
        hidden = torch.zeros(*input_ids.shape, self.config.dim)
        for row, ids in enumerate(input_ids.tolist()):
            text = self.tokenizer.decode(ids)
            line = next(line for line in text.split("\n")[::-1] if "对" in line)  # examples come before it
            hidden[row, :] = 50 * self.lm_head.weight[self.tokenizer.encode(line[0])[0]]
        if cache is not None:
            cache.length += input_ids.shape[1]
        return hidden, torch.zeros(())


@pytest.fixture
def oracle_model(monkeypatch, tokenizer):
    """load_model returns an OracleModel for every path."""
    import export.hf_import

    torch.manual_seed(0)
    OracleModel.tokenizer = tokenizer
    oracle = OracleModel(ModelConfig(tokenizer.vocab_size, 32, 1, 4, 2, max_seq_len=1024)).eval()
    checkpoint = {"stage": "full_sft"}
    monkeypatch.setattr(export.hf_import, "load_model", lambda *_: (oracle, tokenizer, checkpoint))


@pytest.fixture(scope="module")
def out(tokenizer, tmp_path_factory):
    """A models folder with a pretrained model that always predicts C."""
    folder = tmp_path_factory.mktemp("out")
    save_model(folder / "pretrain_32.pth", constant_model(tokenizer, "C"), "pretrain", tokenizer, [{}])
    return folder


def run_exam(monkeypatch, exam, out, *flags):
    """Run the script and return the content of --json. `flags` may begin with more files of the exam."""
    run_script(monkeypatch, "eval_ceval.py", "--data", exam, *flags, "--out_dir", out, "--json", out / "s.json")
    return json.loads((out / "s.json").read_text(encoding="utf-8"))


def read_table(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("orders", [1, 4])
def test_oracle_model_scores_100_percent(monkeypatch, oracle_model, exam, tmp_path, shots, orders):
    flags = ["--checkpoint", "k.pth", "--shots", shots, "--shuffle_options", orders]
    scores = run_exam(monkeypatch, exam, tmp_path, *flags)
    assert (scores["accuracy"], scores["correct"], scores["questions"]) == (1, 8, 8)
    assert scores["p_value"] < 0.05 and scores["sentence"].startswith("Above chance: 100.0% of 8 questions")
    assert scores["mean_examples"] == shots and scores["style"] == "chat"


def test_constant_model_scores_fraction_of_its_letter(monkeypatch, exam, out, capsys):
    scores = run_exam(monkeypatch, exam, out)
    assert (scores["accuracy"], scores["always"], scores["always_letter"]) == (0.5, 0.5, "C"), "4 of 8 answers are C"
    assert scores["said"] == {"A": 0, "B": 0, "C": 1, "D": 0} and scores["style"] == "plain"
    assert {s["name"]: s["accuracy"] for s in scores["subjects"]} == {"law": 0.75, "logic": 0.25}
    assert run_exam(monkeypatch, exam, out, "--shuffle_options", 4)["accuracy"] == 0.25, "chance over four orders"
    screen = capsys.readouterr().out
    assert "always C 50.0%" in screen and "Not above chance" in screen and "95 % CI" in screen


def test_cut_prompts_are_said_before_the_table(monkeypatch, exam, tokenizer, tmp_path, capsys):
    model = constant_model(tokenizer, "C")
    model.config = dataclasses.replace(model.config, max_seq_len=24)
    save_model(tmp_path / "pretrain_32.pth", model, "pretrain", tokenizer, [{}])
    assert run_exam(monkeypatch, exam, tmp_path)["cut"] == 8
    shown = capsys.readouterr().out
    assert -1 < shown.index("8 prompts exceed the context") < shown.index("accuracy")
    (summary,) = tmp_path.glob("ceval/*/summary.md")
    text = summary.read_text(encoding="utf-8")
    assert text.index("8 prompts exceed the context") < text.index("| questions |")


def test_result_files_are_complete(monkeypatch, exam, out, capsys):
    scores = run_exam(monkeypatch, exam, out, "--prompt", "--subjects", "law", "--shots", 1)
    folder = out / "ceval" / f"pretrain_32_{exam.name}_val_letter_1shot"
    names = {"law.csv", "summary.csv", "summary.md", "summary.png", "prompts.txt"}
    assert {file.name for file in folder.iterdir()} == names
    rows = read_table(folder / "law.csv")
    assert [row["prediction"] for row in rows] == ["C"] * 4 and [row["correct"] for row in rows] == ["1", "1", "0", "1"]
    assert rows[2]["question"] == "law val 2?" and rows[2]["answer"] == "A" and float(rows[2]["log_prob_C"]) < 0
    summary = {(row["kind"], row["name"]): row for row in read_table(folder / "summary.csv")}
    assert set(summary) == {("subject", "law"), ("category", "Humanities"), ("all", "all")}
    assert float(summary["all", "all"]["low"]) < 0.75 < float(summary["all", "all"]["high"])
    page = (folder / "summary.md").read_text(encoding="utf-8")
    assert scores["sentence"] in page and "| **all** | 4 | 3 | 75.0% |" in page
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8")
    assert prompts.count("====") == 4 and "law dev 0?" in prompts and "law val 3?" in prompts
    assert "law dev 0?" in capsys.readouterr().out, "--prompt prints the first prompt"


def test_own_files_are_scored(monkeypatch, oracle_model, tmp_path, capsys):
    law = "题目;选项A;选项B;答案\n一?;错;对;2\n二?;对;错;1\n".encode("gb18030")
    (tmp_path / "law.csv").write_bytes(law)
    (tmp_path / "logic.csv").write_text("q?,错1,错2,错3,错4,对,E\nr?,错1,对,错3,错4,错5,b\n", encoding="utf-8")
    flags = ["--checkpoint", "k.pth", "--shuffle_options", 2]
    scores = run_exam(monkeypatch, tmp_path / "law.csv", tmp_path, tmp_path / "logic.csv", *flags)
    assert (scores["exam"], scores["split"], scores["questions"], scores["correct"]) == ("law_and_1_more", "all", 4, 4)
    assert scores["chance"] == 0.35 and scores["p_value"] == 0.01, "1 of 2 * 2 * 5 * 5 guesses"
    assert list(scores["said"]) == list("ABCDE") and scores["options"] == [2, 5]
    assert "questions have 2 to 5 options" in capsys.readouterr().out
    rows = read_table(tmp_path / "ceval" / "k_law_and_1_more_all_letter_0shot_2orders" / "law.csv")
    assert (rows[0]["A"], rows[0]["B"], rows[0]["C"], rows[0]["log_prob_E"]) == ("错", "对", "", "")


def test_single_known_subject_is_strong(monkeypatch, oracle_model, tmp_path, capsys):
    rows = [(f"q{i}", *("对" if x == i % 4 else f"错{x}" for x in range(4)), "ABCD"[i % 4]) for i in range(20)]
    other = [(*row[:5], "BCDA"[i % 4] if i % 4 else "A") for i, row in enumerate(rows)]  # the option with 对 is wrong
    for name, content in (("law", rows), *((name, other) for name in ("logic", "arts", "history"))):
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(content)
    scores = run_exam(monkeypatch, tmp_path, tmp_path, "--checkpoint", "k.pth")
    accuracy = {s["name"]: s["accuracy"] for s in scores["subjects"]}
    assert accuracy == {"law": 1, "logic": 0.25, "arts": 0.25, "history": 0.25}
    assert scores["strengths"]["strong"] == scores["strengths"]["above_guessing"] == ["law"]
    strong = "Strong subjects: law 100.0% (83.9% to 100.0%). Weak subjects: none."
    assert scores["strengths_sentence"].startswith(strong)
    page = next((tmp_path / "ceval").glob("*/summary.md")).read_text(encoding="utf-8")
    assert scores["strengths_sentence"] in page and "Strong subjects: law" in capsys.readouterr().out


def test_constant_model_has_no_strong_subject(monkeypatch, exam, out, capsys):
    scores = run_exam(monkeypatch, exam, out)
    assert scores["strengths"]["strong"] == scores["strengths"]["weak"] == []
    assert "No subject differs significantly from the others; 0 of 2 subjects are above" in capsys.readouterr().out


def test_split_without_answers_writes_submission(monkeypatch, exam, out, capsys):
    scores = run_exam(monkeypatch, exam, out, "--split", "test", "--method", "text")
    content = json.loads((out / "ceval" / f"pretrain_32_{exam.name}_test_text_0shot" / "submission.json").read_text())
    assert content.keys() == RIGHT.keys() and content["law"].keys() == {"0", "1", "2", "3"}
    assert {letter for answers in content.values() for letter in answers.values()} <= set(CEVAL_LETTERS)
    assert "accuracy" not in scores and "the split has no answers: submit" in capsys.readouterr().out


def test_adapters_and_transformers_folders_are_scored(monkeypatch, exam, tokenizer, tmp_path):
    from model.checkpoint import record_parent
    from model.lora import LoRAConfig, attach

    full = constant_model(tokenizer, "C")
    save_model(tmp_path / "full_sft_32.pth", full, "full_sft", tokenizer, [{}])
    attach(full, LoRAConfig(2, 4.0))
    record_parent(full, tmp_path / "full_sft_32.pth", tmp_path / "lora_sft_32.pth")
    save_model(tmp_path / "lora_sft_32.pth", full, "lora_sft", tokenizer, [{}, {}])
    scores = run_exam(monkeypatch, exam, tmp_path)
    assert scores["stage"] == "lora_sft" and scores["said"]["C"] == 1, "the latest stage, adapter merged"

    from transformers import LlamaConfig, LlamaForCausalLM

    config = ModelConfig(tokenizer.vocab_size, 32, 1, 4, 2, max_seq_len=256, tie_embeddings=False)
    LlamaForCausalLM(LlamaConfig(**hf_settings(config))).save_pretrained(tmp_path / "folder")
    tokenizer.save(tmp_path / "folder")
    scores = run_exam(monkeypatch, exam, tmp_path, "--model", tmp_path / "folder", "--method", "text")
    assert scores["stage"] == "transformers" and scores["questions"] == 8 and scores["style"] == "chat"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shots", "-1"], "--shots: -1 is not a whole number of at least 0"),
        (["--shuffle_options", "25"], "from 1 to 24"),
        (["--method", "text", "--shuffle_options", "4"], "has no effect"),
        (["--shots", "9"], "law has 4 examples in dev"),
        (["--split", "train"], "no split 'train'"),
        (["--subjects", "lore"], "no subject 'lore'"),
        (["--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--model", "nowhere"], "nowhere"),
        (["--device", "quantum"], "--device: quantum"),
        (["--checkpoint", "{c}", "--out_dir", "{c}"], "cannot make the folder"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "{c}"], "pretrain_32.pth holds no exam: expected a .csv"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, exam, out, flags, message):
    from common.errors import fail_in_one_line

    flags = [flag.format(c=out / "pretrain_32.pth") for flag in flags]
    arguments = ["--data", exam, "--out_dir", out, *flags]
    monkeypatch.setattr(sys, "argv", ["eval_ceval.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended, fail_in_one_line():
        load_script("eval_ceval.py").main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_help_and_missing_model_error(exam, tmp_path, monkeypatch, capsys):
    shown = run_here(monkeypatch, capsys, ROOT / "eval_ceval.py", "--help")
    assert shown.returncode == 0 and "--shuffle_options" in shown.stdout
    ended = run_here(monkeypatch, capsys, ROOT / "eval_ceval.py", "--data", exam, "--out_dir", tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    advice = "run `python 1-pretrain.py` first, or name the file"
    assert ended.stderr == f"error: no pretrain_*.pth in {tmp_path}: {advice}\n"
