"""Talk to a model, put questions to it and count the right answers, or lay several models side by side.

    python 2-eval.py                             a conversation with the latest stage in out/; in a script: the prompts
    python 2-eval.py --stage pretrain --prompt "The sky is"
    python 2-eval.py --checkpoint ../Qwen3-0.6B  a foreign model: a transformers folder (Llama, Mistral, Qwen2, Qwen3)
    python 2-eval.py --rope_scaling yarn --rope_factor 4 --prompt "…"     reads 4 times as many tokens as in training
    python 2-eval.py --prompts FILE.txt          one prompt a line; --history 9: they are one conversation
    python 2-eval.py --num_beams 4 --no_repeat_ngram_size 5         beam search; no five tokens in a row come twice
    python 2-eval.py --questions FILE.jsonl --json out/report.json
    python 2-eval.py --report out/pretrain_512.pth out/full_sft_512.pth --texts zh=held_out_zh.jsonl en=held_out_en.txt
    python 2-eval.py --report out/full_sft_512.pth other=http://localhost:8000/v1     the other one is served elsewhere
    python 2-eval.py --report --judge http://localhost:8000/v1 --judge_model NAME

A pretrained model goes on with the text as it is; a model of a chat stage gets it as a question, in the chat format.
A line of a questions file: {"question": "...", "keys": ["...", ...], "lang": "zh" or "en", "kind": "..."}, the last two
may be missing. Answers are greedy, and right when they contain any of the keys as a word (evaluation/qa_data.py).
--report without files takes every stage in --out_dir. It writes one page (markdown) and the same as json: answers side
by side, bits per byte of --texts, their loss by position up to 4 times the trained length, loss on --chats, how often
answers loop, speed, and continuations of answers that begin with a harmful agreement (shown, not scored).
NAME=http://HOST/v1 is a model of a server (OpenAI's protocol; #MODEL behind it names one of several): it gets the
prompts; what a server cannot tell is shown as "–". Nothing leaves the machine unless --report or --judge names a
server; the judge (its key in OPENAI_API_KEY) gets the prompts and answers, not the names.
Reads out/*.pth; writes --json, a report to out/eval/, and what /save says.
Read next: evaluation/chat_model.py and evaluation/terminal_chat.py, model/generate.py (how an answer is drawn),
3-full_sft.py.
"""

import argparse
import sys

from common import cli
from common.errors import UserError, fail_in_one_line
from evaluation.prompts import SCRIPT_PROMPTS
from evaluation.qa_data import read_keyed_questions, read_prompt_lines, require_nonempty_text
from model.rope_flags import add_rope_flags, parse_rope_flags
from model.sampling_presets import PRESET_CHOICES


def make_parser() -> argparse.ArgumentParser:
    text = (__doc__ or "") + "\nThe prompts of a script:\n" + "\n".join(f"    {prompt}" for prompt in SCRIPT_PROMPTS)
    parser = cli.FlagParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("which model").add_argument
    add(
        "--stage",
        type=cli.non_empty_text,
        help="pretrain, full_sft, …: that stage's model in --out_dir (default: the latest stage there)",
    )
    add(
        "--checkpoint",
        type=cli.path_string,
        help="a .pth file or the folder of a transformers model, instead of --stage",
    )
    add("--out_dir", type=cli.path_string, default="out", help="where the models are (default: out)")
    add_rope_flags(parser)
    add = parser.add_argument_group("what to ask (default: a conversation)").add_mutually_exclusive_group().add_argument
    add("--prompt", help="one prompt")
    add("--prompts", type=cli.path_string, metavar="FILE", help="text file, one prompt a line")
    add(
        "--questions",
        type=cli.path_string,
        metavar="FILE",
        help="jsonl file of questions with keys: prints the share answered right",
    )
    add = parser.add_argument_group("how to answer (--questions is always greedy)").add_argument
    add("--system", metavar="TEXT", help="system message in front of every conversation")
    add("--history", type=cli.non_negative_int, metavar="N",
        help="earlier turns in each prompt (default: all; 0 with --prompts)")  # fmt: skip
    preset = "where these flags are not given: settings of the model's chat format (auto), none, or of another format"
    add(
        "--sampling_preset",
        choices=PRESET_CHOICES,
        default="auto",
        help=f"{preset}; none in a --report (default: auto)",
    )
    add("--temperature", type=cli.non_negative_float, help="0: always the likeliest token (default: 0.7)")
    add("--top_k", type=cli.non_negative_int, help="draw among the k likeliest tokens (default: 0, all)")
    add("--top_p", type=cli.positive_fraction, help="draw among the likeliest that sum to p (default: 0.9)")
    add("--min_p", type=cli.fraction, help="drop tokens below this share of the likeliest (default: 0)")
    add("--repetition_penalty", type=cli.positive_float, help="above 1: repeat less, try 1.1 (default: 1)")
    ngrams = "no N tokens in a row come twice, the prompt included (default: 0, off)"
    add("--no_repeat_ngram_size", type=cli.non_negative_int, metavar="N", help=ngrams)
    beams = "beam search with K beams, at most 8, at temperature 0; shows complete answers (default: 1, off)"
    add("--num_beams", type=cli.int_between(1, 8), metavar="K", help=beams)
    add(
        "--length_penalty",
        type=cli.non_negative_float,
        help="a beam's score: log-probability / length ** this (default: 1; 0: the sum)",
    )
    add("--max_new_tokens", type=cli.positive_int,
        help="longest answer (default: 200; --questions: 48, of a pretrained model 24)")  # fmt: skip
    add("--seed", type=cli.seed, help="the same seed draws the same answers (default of --report: 0)")
    add = parser.add_argument_group("several models side by side").add_argument
    add(
        "--report",
        nargs="*",
        type=cli.path_string,
        metavar="MODEL",
        help="compare these models, files or NAME=http://HOST/v1 (default: every stage in --out_dir)",
    )
    add(
        "--report_api_key",
        type=cli.non_empty_text,
        metavar="KEY",
        help="of the servers behind --report (default: the variable REPORT_API_KEY)",
    )
    add(
        "--texts",
        nargs="+",
        type=cli.path_string,
        default=[],
        metavar="NAME=FILE",
        help="held-out text for bits per byte, as zh=FILE",
    )
    add(
        "--chats",
        type=cli.path_string,
        metavar="FILE",
        help="held-out chats (default: dataset/sft/val.jsonl where it is)",
    )
    add("--max_bytes", type=cli.positive_int, default=100_000,
        help="read from the start of a text, and of chats (default: 100000)")  # fmt: skip
    add(
        "--judge",
        type=cli.non_empty_text,
        metavar="BASE_URL",
        help="a model that scores and ranks the answers, as http://localhost:8000/v1",
    )
    add("--judge_model", type=cli.non_empty_text, metavar="NAME", help="its name there")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=cli.device_name, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", choices=cli.DTYPE_NAMES, default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    add("--json", type=cli.path_string, metavar="OUT", help="write the answers (and scores) to this file")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    only_reports = {
        "--texts": args.texts,
        "--chats": args.chats,
        "--judge": args.judge,
        "--judge_model": args.judge_model,
        "--report_api_key": args.report_api_key,
    }
    for flag, value in only_reports.items():
        if value and args.report is None:
            raise UserError(f"{flag} belongs to --report")
    for flag, value in {"--stage": args.stage, "--checkpoint": args.checkpoint, "--questions": args.questions}.items():
        if value and args.report is not None:
            raise UserError(f"{flag} does not go with --report: name the models behind --report")
    if bool(args.judge) != bool(args.judge_model):
        raise UserError("--judge BASE_URL and --judge_model NAME go together")
    parse_rope_flags(args)


def main() -> None:
    args = make_parser().parse_args()
    check_arguments(args)
    questions = read_keyed_questions(args.questions) if args.questions else []
    prompts = [text for _, text in read_prompt_lines(args.prompts)] if args.prompts else []
    if args.prompt is not None:
        prompts = [require_nonempty_text(args.prompt, "--prompt")]
    if args.report is not None:
        from evaluation.report import compare_models

        return compare_models(args, prompts)
    if not questions and not prompts and not sys.stdin.isatty():
        prompts = list(SCRIPT_PROMPTS)

    from evaluation.chat_model import ChatModel, find_model
    from evaluation.qa import evaluate_questions
    from evaluation.terminal_chat import TerminalChat, run_terminal_chat

    chat_model = ChatModel(find_model(args), args)
    scores = evaluate_questions(chat_model, questions) if questions else {}
    chat = TerminalChat(chat_model, args.history or 0)
    for prompt in prompts:
        print(f"\n> {prompt}")
        chat.send_message(prompt, is_interactive=False)
    if not questions and not prompts:
        run_terminal_chat(chat_model, args.out_dir, args.history)
    chat_model.write_results(args.json, **scores)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
