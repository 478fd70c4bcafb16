"""Log-probabilities and predictions equal EleutherAI's lm-evaluation-harness on the same csv files and weights.

Takes minutes. The harness (341 MB) is not a dependency of the project: pip install "lm-eval>=0.4.9,<0.5"
"""

import sys

import pytest
import torch

from demo_world import exam
from evaluation.exam_data import CEVAL_LETTERS, read_exam_split
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.transformer import Transformer
from tests.helpers import run_script
from tests.model.test_hf_parity import hf_settings
from tests.scripts.test_eval_ceval import read_table

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="lm-eval is not installed, see above")
PAGE = "{{question.strip()}}\n"
LISTED = "".join(f"{letter}. {{{{{letter}.strip()}}}}\n" for letter in CEVAL_LETTERS)
TOLERANCE = 2e-3  # of fp32 log-probabilities summed over an option's tokens


def save_as_llama(path, folder):
    """Save the checkpoint as a LlamaForCausalLM folder; parameter names are the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours, tokenizer, _ = load_model(path)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id}
    theirs = LlamaForCausalLM(LlamaConfig(**{**hf_settings(ours.config), **special}))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def run_harness(folder, files, method, shots, answer):
    """{subject: [log-probabilities of the four options]} in the order of the file."""
    from lm_eval import simple_evaluate

    gap = "" if answer == "答案：" else " "
    tasks = []
    for subject, (dev, val) in files.items():
        tasks.append(
            {
                "task": subject,
                "dataset_path": "csv",
                "dataset_kwargs": {"data_files": {"dev": str(dev), "val": str(val)}},
                "test_split": "val",
                "fewshot_split": "dev",
                "fewshot_config": {"sampler": "first_n"},
                "output_type": "multiple_choice",
                "doc_to_text": PAGE + (LISTED if method == "letter" else "") + answer,
                "doc_to_choice": list(CEVAL_LETTERS)
                if method == "letter"
                else "{{[A.strip(), B.strip(), C.strip(), D.strip()]}}",
                "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer.strip())}}",
                "target_delimiter": gap,
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        )
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=tasks,
        num_fewshot=shots,
        device="cpu",
        batch_size=8,
        log_samples=True,
        bootstrap_iters=0,
    )
    rows = {}
    for subject, samples in found["samples"].items():
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        rows[subject] = [[float(answers[0]) for answers in sample["filtered_resps"]] for sample in ordered]
    return rows


@pytest.mark.parametrize(("method", "shots"), [("letter", 0), ("letter", 2), ("text", 0)])
def test_log_probs_equal_lm_eval_harness(monkeypatch, tokenizer, tmp_path, method, shots):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    exam.build_exam(exam.DemoExamConfig(str(tmp_path / "exam")))
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 64, 2, 4, 2, max_seq_len=1024))
    save_model(tmp_path / "pretrain_64.pth", model, "pretrain", tokenizer, [{}])
    assert_harness_agrees(monkeypatch, tmp_path / "exam", tmp_path / "pretrain_64.pth", tmp_path, method, shots, None)


def assert_harness_agrees(monkeypatch, exam, checkpoint, tmp_path, method, shots, subjects):
    """Run both on the validation split and compare all log-probabilities and predictions."""
    names = subjects or read_exam_split(exam).subjects
    flags = ["--method", method, "--shots", shots, "--style", "plain", "--dtype", "float32", "--device", "cpu"]
    run_script(
        monkeypatch, "eval_ceval.py", "--data", exam, "--checkpoint", checkpoint, "--out_dir", tmp_path,
        "--subjects", ",".join(names), *flags,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    folder = save_as_llama(checkpoint, tmp_path / "folder")
    ours = tmp_path / "ceval" / f"{checkpoint.stem}_{exam.name}_val_{method}_{shots}shot"
    languages = {name: "Answer:" if name.endswith("_en") else "答案：" for name in names}
    compared = 0
    for answer in set(languages.values()):
        files = {
            name: tuple(exam / split / f"{name}_{split}.csv" for split in ("dev", "val"))
            for name in names
            if languages[name] == answer
        }
        for subject, theirs in run_harness(folder, files, method, shots, answer).items():
            rows = read_table(ours / f"{subject}.csv")
            assert len(rows) == len(theirs)
            for row, log_probs in zip(rows, theirs, strict=True):
                if method == "text":
                    log_probs = [value / len(row[x].strip()) for x, value in zip(CEVAL_LETTERS, log_probs, strict=True)]
                mine = [float(row[f"log_prob_{x}"]) for x in CEVAL_LETTERS]
                assert mine == pytest.approx(log_probs, abs=TOLERANCE), (subject, row["id"])
                best = sorted(log_probs)[-2:]
                if best[1] - best[0] > TOLERANCE:
                    assert row["prediction"] == CEVAL_LETTERS[log_probs.index(best[1])], (subject, row["id"])
                compared += 1
    assert compared == sum(len(read_table(ours / f"{name}.csv")) for name in names)
    print(f"{compared} questions agree")
