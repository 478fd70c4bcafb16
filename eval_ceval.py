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
Writes <out_dir>/ceval/<model>_<exam>_<split>_<method>…/: a csv per subject, summary.csv, .md, .png.
Read next: evaluation/exam_prompts.py (the prompts), evaluation/exam_stats.py (the statistics).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from model.rope_flags import add_rope_flags, parse_rope_flags


def make_parser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the exam").add_argument
    add(
        "--data",
        required=True,
        nargs="+",
        type=flag_types.path_string,
        metavar="PATH",
        help="csv, tsv or jsonl files, a folder of them, or a folder, .tar(.gz .xz .bz2) or .zip with {dev,val,test}/",
    )
    add("--split", default="", help="dev, val, test, or all: files without a split (default: val, else all, else test)")
    add("--subjects", action=cli.NameList, default=[], metavar="NAME",
        help="subjects, separated by commas or spaces (default: all)")  # fmt: skip
    group = parser.add_argument_group("model (default: the latest stage in --out_dir)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=flag_types.path_string, help="a .pth file")
    add(
        "--model",
        type=flag_types.path_string,
        metavar="DIR",
        help="a transformers folder (Llama, Mistral, Qwen2, Qwen3)",
    )
    add_rope_flags(group)
    add = parser.add_argument_group("prompts").add_argument
    add("--method", default="letter", choices=("letter", "text"), help="scoring method, see above (default: letter)")
    add("--shots", type=flag_types.non_negative_int, default=0,
        help="examples from dev before each question (default: 0)")  # fmt: skip
    add("--shuffle_options", type=flag_types.int_between(1, 24), default=1, metavar="K",
        help="average over K of the 24 orders of the options; 4: each option once under each letter")  # fmt: skip
    add("--style", default="auto", choices=("auto", "chat", "plain"), help="auto: chat for models of a chat stage")
    add("--prompt", action="store_true", help="print the first prompt and save all prompts")
    add = parser.add_argument_group("machine").add_argument
    add(
        "--out_dir",
        type=flag_types.path_string,
        default="out",
        help="folder of the models and the results (default: out)",
    )
    add("--json", type=flag_types.path_string, metavar="FILE", help="also write all scores to this file")
    add("--device", type=flag_types.device_name, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add(
        "--dtype",
        choices=flag_types.DTYPE_NAMES,
        default="auto",
        help="auto, float32, bfloat16, float16 (default: auto)",
    )
    add("--batch_tokens", type=flag_types.non_negative_int, default=0,
        help="positions per forward pass (default: 1024 on a CPU, 16384 on a GPU; 1: one question)")  # fmt: skip
    return parser


def check_exam_flags(args: argparse.Namespace) -> None:
    parse_rope_flags(args)
    if args.method == "text" and args.shuffle_options > 1:
        raise UserError("--shuffle_options has no effect with --method text: its prompts list no options")


def resolve_model_path(args: argparse.Namespace) -> Path:
    from evaluation.chat_model import list_stages
    from model.checkpoint import find_checkpoint

    if args.checkpoint or args.model:
        return Path(args.checkpoint or args.model)
    return find_checkpoint(args.out_dir, (list_stages(args.out_dir) or ["pretrain"])[-1])


def exam_name(data: list[str]) -> str:
    """ceval of ../data/ceval.tar.xz; law_and_2_more of three files."""
    more = f"_and_{len(data) - 1}_more" if len(data) > 1 else ""
    return (Path(data[0]).resolve().name.split(".")[0] or "exam") + more


def evaluate_exam(args: argparse.Namespace, exam: Any) -> None:
    """Load the model, score all questions, print and write the result."""
    from common.device import autocast, pick_device, pick_dtype
    from evaluation import exam_report
    from evaluation.exam_logprobs import compute_option_log_probs
    from evaluation.exam_prompts import PromptConfig, build_prompts
    from evaluation.exam_stats import make_exam_result, score_questions
    from export.hf_import import open_model
    from model.rope import rope_summary

    path, device = resolve_model_path(args), pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, checkpoint = open_model(path, device)
    if rope_scaling := parse_rope_flags(args):
        model.scale_rope(*rope_scaling)
    is_chat_stage = checkpoint["stage"] != "pretrain" and tokenizer.format is not None
    chat = args.style == "chat" or (args.style == "auto" and is_chat_stage)
    prompt_config = PromptConfig(args.method, args.shots, args.shuffle_options, chat)
    prompts = list(build_prompts(exam, tokenizer, prompt_config, model.config.max_seq_len))
    result_name = f"{path.resolve().name.removesuffix('.pth')}_{exam_name(args.data)}_{exam.split}_{prompt_config.name}"
    folder = Path(args.out_dir) / "ceval" / result_name
    metadata = {
        **{"model": str(path), "stage": checkpoint["stage"], "exam": exam_name(args.data), "split": exam.split},
        **{"method": args.method, "shots": args.shots, "orders": args.shuffle_options},
        **{"style": "chat" if chat else "plain", "device": str(device), "dtype": str(dtype).removeprefix("torch.")},
        "mean_examples": sum(prompt.num_shots for prompt in prompts) / len(prompts),
        "cut": sum(prompt.is_truncated for prompt in prompts),
        "options": [pick(len(item.options) for item in exam.items) for pick in (min, max)],
    }
    size = f"{model.count_parameters()[0] / 1e6:.1f} M parameters"
    metadata["rope"] = rope_summary(model.config)
    rope = f", RoPE {metadata['rope']}" if metadata["rope"] else ""
    print(f"{path}: {checkpoint['stage']}, {size}, {device}, {metadata['dtype']}{rope}")
    print(
        f"{len(exam.items):,} questions of {len(exam.subjects)} subjects, {prompt_config.name}, as {metadata['style']}",
        flush=True,
    )
    exam_report.prepare_folder(folder)
    if args.prompt:
        file = exam_report.write_prompts(folder, prompts, tokenizer)
        print(f"\n{tokenizer.decode(prompts[0].prompt)}\n\nall prompts: {file}", flush=True)
    started = time.perf_counter()
    batches = compute_option_log_probs(
        model, tokenizer, prompts, args.method, lambda: autocast(device, dtype), args.batch_tokens
    )
    exam_report.with_progress(batches, len(prompts))
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
    if args.json:
        exam_report.write_file(Path(args.json), json.dumps(scores, ensure_ascii=False, indent=1) + "\n")


def main() -> None:
    args = make_parser().parse_args()
    check_exam_flags(args)
    from evaluation.exam_data import read_exam_split

    evaluate_exam(args, read_exam_split(args.data, args.split, args.subjects))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
