"""How much of an exam does a model know? Multiple choice, with error bars and the chance line.

    python eval_ceval.py --data ceval.tar.xz                       the latest stage in out/, C-Eval's validation split
    python eval_ceval.py --data ceval --checkpoint out/full_sft_512.pth --method text --shots 5
    python eval_ceval.py --data cmmlu.zip --model ../Qwen3-0.6B --json out/cmmlu.json
    python eval_ceval.py --data mine.csv law.csv                   your own questions: each file is one subject
    python eval_ceval.py --data ceval --shots 5 --rope_scaling yarn --rope_factor 4     more examples than fit otherwise
    python eval_ceval.py --data ceval.tar.xz --split test          answers are secret: writes C-Eval's submission file

    --method letter   the largest of the next-token probabilities of A, B, C, D
    --method text     the largest log-probability per character of an option's full text, the options not shown

Models of a few million parameters stand near chance (25 %): read the interval and the sentence, not the first digit.
Reads C-Eval's and CMMLU's layouts (evaluation/exam_data.py) and your own csv and jsonl files: question, A, B, C, D,
answer, or 题目, 选项A, …, 答案, or MMLU's csv without a header; two to ten options (evaluation/exam_table.py).
Reads any out/*.pth (an adapter with its parent) or a transformers folder.
Writes <out_dir>/ceval/<model>_<exam>_<split>_<method>…/: a csv for each subject, summary.csv, .md, .png.
Read next: evaluation/exam_prompts.py (how it asks), evaluation/exam_stats.py (how sure the score is).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import cli
from common.errors import UserError, fail_in_one_line
from model.rope_flags import add_rope_flags, rope_of


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the exam").add_argument
    add(
        "--data",
        required=True,
        nargs="+",
        type=cli.path,
        metavar="PATH",
        help="csv, tsv or jsonl files, a folder of them, or a folder, .tar(.gz .xz .bz2) or .zip with {dev,val,test}/",
    )
    add("--split", default="", help="dev, val, test, or all: files of no split (default: val, else all, else test)")
    add("--subjects", action=cli.NameList, default=[], metavar="NAME",
        help="only these, separated by commas or spaces (default: all)")  # fmt: skip
    group = parser.add_argument_group("which model (default: the latest stage in --out_dir)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=cli.path, help="a .pth file")
    add(
        "--model",
        type=cli.path,
        metavar="DIR",
        help="the folder of a transformers model (Llama, Mistral, Qwen2, Qwen3)",
    )
    add_rope_flags(group)
    add = parser.add_argument_group("how to ask").add_argument
    add("--method", default="letter", choices=("letter", "text"), help="what is compared, see above (default: letter)")
    add("--shots", type=cli.non_negative_int, default=0,
        help="examples from dev in front of each question (default: 0)")  # fmt: skip
    add("--shuffle_options", type=cli.between(1, 24), default=1, metavar="K",
        help="average over K of the 24 orders of the options; 4: each letter once each")  # fmt: skip
    add("--style", default="auto", choices=("auto", "chat", "plain"), help="auto: chat for the chat stages")
    add("--prompt", action="store_true", help="show one prompt of each subject and save all")
    add = parser.add_argument_group("machine").add_argument
    add("--out_dir", type=cli.path, default="out", help="where the models are, and the results go (default: out)")
    add("--json", type=cli.path, metavar="FILE", help="write all scores to this file too")
    add("--device", type=cli.device, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", choices=cli.DTYPES, default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    add("--batch_tokens", type=cli.non_negative_int, default=0,
        help="positions computed at once (default: 1024 on a CPU; 1: one question)")  # fmt: skip
    return parser


def check(args: argparse.Namespace) -> None:
    rope_of(args)
    if args.method == "text" and args.shuffle_options > 1:
        raise UserError("--shuffle_options changes nothing with --method text: the options are not shown")


def model_path(args: argparse.Namespace) -> Path:
    from evaluation.chat_model import stages_in
    from model.checkpoint import find_checkpoint

    if args.checkpoint or args.model:
        return Path(args.checkpoint or args.model)
    return find_checkpoint(args.out_dir, (stages_in(args.out_dir) or ["pretrain"])[-1])


def exam_name(data: list[str]) -> str:
    """ceval of ../data/ceval.tar.xz; law_and_2_more of three files."""
    more = f"_and_{len(data) - 1}_more" if len(data) > 1 else ""
    return (Path(data[0]).resolve().name.split(".")[0] or "exam") + more


def run(args: argparse.Namespace, exam: Any) -> None:
    """Load the model, put the questions, show and write the result."""
    from common.device import autocast, pick_device, pick_dtype
    from evaluation import exam_report
    from evaluation.exam_logprobs import answer
    from evaluation.exam_prompts import Asking, ask
    from evaluation.exam_stats import mark, result_of
    from export.hf_import import open_model
    from model.rope import describe

    path, device = model_path(args), pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer, checkpoint = open_model(path, device)
    if longer := rope_of(args):
        model.scale_rope(*longer)
    is_chat_stage = checkpoint["stage"] != "pretrain" and tokenizer.format is not None
    chat = args.style == "chat" or (args.style == "auto" and is_chat_stage)
    asking = Asking(args.method, args.shots, args.shuffle_options, chat)
    asked = list(ask(exam, tokenizer, asking, model.config.max_seq_len))
    name = f"{path.resolve().name.removesuffix('.pth')}_{exam_name(args.data)}_{exam.split}_{asking.name}"
    folder = Path(args.out_dir) / "ceval" / name
    about = {
        **{"model": str(path), "stage": checkpoint["stage"], "exam": exam_name(args.data), "split": exam.split},
        **{"method": args.method, "shots": args.shots, "orders": args.shuffle_options},
        **{"style": "chat" if chat else "plain", "device": str(device), "dtype": str(dtype).removeprefix("torch.")},
        "mean_examples": sum(one.examples for one in asked) / len(asked),
        "cut": sum(one.cut for one in asked),
        "options": [pick(len(item.options) for item in exam.items) for pick in (min, max)],
    }
    size = f"{model.count_parameters()[0] / 1e6:.1f} M parameters"
    about["rope"] = describe(model.config)
    rope = f", RoPE {about['rope']}" if about["rope"] else ""
    print(f"{path}: {checkpoint['stage']}, {size}, {device}, {about['dtype']}{rope}")
    print(
        f"{len(exam.items):,} questions of {len(exam.subjects)} subjects, {asking.name}, as {about['style']}",
        flush=True,
    )
    exam_report.make_room(folder)
    if args.prompt:
        file = exam_report.write_prompts(folder, asked, tokenizer)
        print(f"\n{tokenizer.decode(asked[0].prompt)}\n\nall prompts: {file}", flush=True)
    started = time.perf_counter()
    batches = answer(model, tokenizer, asked, args.method, lambda: autocast(device, dtype), args.batch_tokens)
    exam_report.follow(batches, len(asked))
    about["seconds"] = round(time.perf_counter() - started, 1)
    marked = mark(asked)
    if all(item.answer for item in exam.items):
        result = result_of(exam, marked)
        exam_report.show(result, about)
        exam_report.write_pages(folder, result, about)
        scores = exam_report.as_json(result, about)
        print(f"{about['seconds']} s for the questions; written to {folder}/")
    else:
        scores = about | {"submission": str(exam_report.write_submission(folder, marked))}
        print(f"{about['seconds']} s for the questions; their answers are secret: hand in {scores['submission']}")
    if args.json:
        exam_report.write(Path(args.json), json.dumps(scores, ensure_ascii=False, indent=1) + "\n")


def main() -> None:
    args = make_parser().parse_args()
    check(args)
    from evaluation.exam_data import read_exam

    run(args, read_exam(args.data, args.split, args.subjects))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
