"""Accuracy on a multiple-choice exam, with 95 % confidence intervals and the random baseline.

    python eval_ceval.py --data ceval.tar.xz                       the latest stage in out/ on C-Eval's validation split
    python eval_ceval.py --data ceval --checkpoint out/full_sft_512.pth --method text --shots 5
    python eval_ceval.py --data cmmlu.zip --model ../Qwen3-0.6B --json out/cmmlu.json
    python eval_ceval.py --data mine.csv law.csv                   your own questions: one file per subject
    python eval_ceval.py --data ceval --shots 5 --rope_scaling yarn --rope_factor 4     a longer context for examples
    python eval_ceval.py --data ceval.tar.xz --split test          no answers: writes C-Eval's submission file

    --method letter   the largest next-token probability of A, B, C, D
    --method text     the largest log-probability per character of an option's text; the prompt lists no options

Models of a few million parameters score near chance (25 %): compare intervals and p-values, not single percentages.
Reads C-Eval's and CMMLU's layouts (evaluation/exam_data.py) and your own csv and jsonl files: columns question, A, B,
C, D, answer, or 题目, 选项A, …, 答案, or MMLU's csv without a header; two to ten options (evaluation/exam_table.py).
Reads any out/*.pth (an adapter with its parent) or a transformers folder.
Writes out/ceval/<model>_<exam>_<split>_<method>…/: a csv per subject, summary.csv, .md, .png.
Read next: evaluation/exam_prompts.py (the prompts), evaluation/exam_stats.py (the statistics).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from common import cli
from common.cli import NameList, flag
from common.errors import UserError, fail_in_one_line
from common.flag_groups import InferenceFlags, RunFlags
from common.flag_types import int_between, non_negative_int, path_string
from evaluation import exam_report
from evaluation.chat_model import find_model, open_chat_model
from evaluation.exam_data import ExamSplit, read_exam_split
from evaluation.exam_logprobs import compute_option_log_probs
from evaluation.exam_prompts import PromptConfig, build_prompts
from evaluation.exam_stats import make_exam_result, score_questions
from evaluation.tables import with_progress
from model.rope import rope_summary
from model.rope_flags import RopeFlags

_EXAM: dict[str, Any] = {"group": "the exam"}
_MODEL: dict[str, Any] = {
    "group": "model (default: the latest stage in --out_dir)", "exclusive": "model", "type": path_string
}  # fmt: skip
_PROMPTS: dict[str, Any] = {"group": "prompts"}


@dataclass(frozen=True, kw_only=True)
class ExamConfig(InferenceFlags, RopeFlags, RunFlags):
    """The exam, the model, and the prompts."""

    main_flags = (
        "data", "split", "subjects", "checkpoint", "model", "method", "shots", "shuffle_options", "out_dir", "json",
        "device",
    )  # fmt: skip
    data: tuple[str, ...] = flag(
        MISSING, "csv, tsv or jsonl files, a folder of them, or a folder, tar or zip archive with {dev,val,test}/",
        type=path_string, nargs="+", metavar="PATH", **_EXAM,
    )  # fmt: skip
    split: str = flag("", "dev, val, test, or all: files without a split (default: val, else all, else test)", **_EXAM)
    subjects: tuple[str, ...] = flag((), "names of subjects (default: all)", action=NameList, metavar="NAME", **_EXAM)
    checkpoint: str = flag("", "a .pth file", **_MODEL)
    model: str = flag("", "a transformers folder (Llama, Mistral, Qwen2, Qwen3)", metavar="DIR", **_MODEL)
    method: str = flag("letter", "scoring method, see above", choices=("letter", "text"), **_PROMPTS)
    shots: int = flag(0, "examples from dev before each question", type=non_negative_int, **_PROMPTS)
    shuffle_options: int = flag(
        1, "average over K of the 24 orders of the options; 4: each option once under each letter",
        type=int_between(1, 24), metavar="K", **_PROMPTS,
    )  # fmt: skip
    style: str = flag("auto", "auto: chat for models of a chat stage", choices=("auto", "chat", "plain"), **_PROMPTS)
    prompt: bool = flag(False, "print the first prompt and save all prompts", **_PROMPTS)
    json: str = flag("", "also write all scores to this file", type=path_string, metavar="FILE")
    batch_tokens: int = flag(
        0, "positions per forward pass (default: 1024 on a CPU, 16384 on a GPU; 1: one question)", type=non_negative_int
    )

    def check(self) -> None:
        """Raises UserError for flags without effect."""
        super().check()
        if self.method == "text" and self.shuffle_options > 1:
            raise UserError("--shuffle_options has no effect with --method text: its prompts list no options")


def exam_name(data: Sequence[str]) -> str:
    """ceval of ../data/ceval.tar.xz; law_and_2_more of three files."""
    more = f"_and_{len(data) - 1}_more" if len(data) > 1 else ""
    return (Path(data[0]).resolve().name.split(".")[0] or "exam") + more


def evaluate_exam(config: ExamConfig, exam: ExamSplit) -> None:
    """Load the model, score all questions, print and write the result."""
    path = find_model(config.out_dir, config.checkpoint or config.model)
    chat_model = open_chat_model(path, config.device, config.dtype, config.rope, config.quantize)
    model, tokenizer = chat_model.model, chat_model.tokenizer
    is_chat = config.style == "chat" or (config.style == "auto" and chat_model.is_chat_model)
    prompt_config = PromptConfig(config.method, config.shots, config.shuffle_options, is_chat)
    prompts = list(build_prompts(exam, tokenizer, prompt_config, model.config.max_seq_len))
    metadata = {
        **{"model": str(path), "stage": chat_model.stage, "exam": exam_name(config.data), "split": exam.split},
        **{"method": config.method, "shots": config.shots, "orders": config.shuffle_options},
        **{"style": "chat" if is_chat else "plain", "device": str(chat_model.device)},
        "dtype": chat_model.number_format,
        "mean_examples": sum(prompt.num_shots for prompt in prompts) / len(prompts),
        "cut": sum(prompt.is_truncated for prompt in prompts),
        "options": [pick(len(item.options) for item in exam.items) for pick in (min, max)],
        "rope": rope_summary(model.config),
    }
    print(chat_model.summary())
    subjects = f"{len(exam.items):,} questions of {len(exam.subjects)} subjects"
    print(
        f"{subjects}, {prompt_config.name}, as {metadata['style']}",
        *exam_report.note_lines(metadata),
        sep="\n",
        flush=True,
    )
    folder = Path(
        config.out_dir, "ceval", "_".join((chat_model.name, metadata["exam"], exam.split, prompt_config.name))
    )
    exam_report.prepare_folder(folder)
    if config.prompt:
        file = exam_report.write_prompts(folder, prompts, tokenizer)
        print(f"\n{tokenizer.decode(prompts[0].prompt)}\n\nall prompts: {file}", flush=True)
    started = time.perf_counter()
    scored = compute_option_log_probs(chat_model, prompts, config.method, config.batch_tokens)
    for _ in with_progress(scored, "questions", total=len(prompts)):
        pass
    metadata["seconds"] = round(time.perf_counter() - started, 1)
    question_results = score_questions(prompts)
    if all(item.answer for item in exam.items):
        result = make_exam_result(exam, question_results)
        exam_report.print_exam_result(result, metadata)
        exam_report.write_result_files(folder, result, metadata)
        scores = exam_report.result_to_dict(result, metadata)
        print(f"{metadata['seconds']} s for the questions; written to {folder}/")
    else:
        scores = metadata | {"submission": str(exam_report.write_submission(folder, question_results))}
        print(f"{metadata['seconds']} s for the questions; the split has no answers: submit {scores['submission']}")
    if config.json:
        exam_report.write_file(Path(config.json), json.dumps(scores, ensure_ascii=False, indent=1) + "\n")


def main() -> None:
    config = cli.parse(ExamConfig, __doc__)
    evaluate_exam(config, read_exam_split(config.data, config.split, config.subjects))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
