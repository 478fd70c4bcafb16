"""Chat with a model, measure its accuracy on questions with keys, or compare several models.

    python 2-eval.py                             chat with the latest stage in out/; without a terminal: fixed prompts
    python 2-eval.py --stage pretrain --prompt "The sky is"
    python 2-eval.py --checkpoint ../Qwen3-0.6B  a transformers folder (Llama, Mistral, Qwen2, Qwen3)
    python 2-eval.py --rope_scaling yarn --rope_factor 4 --prompt "…"     a context 4 times as long as in training
    python 2-eval.py --prompts FILE.txt          one prompt per line; --history 9: as one conversation
    python 2-eval.py --num_beams 4 --no_repeat_ngram_size 5         beam search without repeated 5-grams
    python 2-eval.py --questions FILE.jsonl --json out/report.json
    python 2-eval.py --report out/pretrain_512.pth out/full_sft_512.pth --texts zh=held_out_zh.jsonl en=held_out_en.txt
    python 2-eval.py --report out/full_sft_512.pth other=http://localhost:8000/v1     a served model
    python 2-eval.py --report --judge http://localhost:8000/v1 --judge_model NAME

A pretrained model continues the prompt; a model of a chat stage answers it in its chat format.
A line of a questions file: {"question": "...", "keys": ["...", ...], "lang": "zh" or "en", "kind": "..."}; lang and
kind are optional. Answers are greedy, and correct if they contain any of the keys as a word (evaluation/qa_data.py).
--report compares the given models, or every stage in --out_dir. It writes a Markdown page and a json file: all answers,
bits per byte of --texts, loss by position up to 4 times the trained length, loss on --chats, repetition, speed, and
continuations of answers that begin with a harmful agreement (shown, not scored).
NAME=http://HOST/v1 is a model served with OpenAI's API (append #MODEL to choose one of several): the server gets the
prompts; figures that it cannot provide are shown as "–". No data leaves the machine unless --report or --judge names a
server. The judge (API key in OPENAI_API_KEY) gets the prompts and answers, not the names of the models.
Reads out/*.pth; writes the file of --json, a report in out/eval/, and the file of /save.
Read next: evaluation/chat_model.py and evaluation/terminal_chat.py, model/generate.py (the sampling loop),
3-full_sft.py.
"""

import argparse
import sys

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from evaluation.prompts import SCRIPT_PROMPTS
from evaluation.qa_data import read_keyed_questions, read_prompt_lines, require_nonempty_text
from model.rope_flags import add_rope_flags, parse_rope_flags
from model.sampling_presets import PRESET_CHOICES


def make_parser() -> argparse.ArgumentParser:
    text = (__doc__ or "") + "\nThe fixed prompts:\n" + "\n".join(f"    {prompt}" for prompt in SCRIPT_PROMPTS)
    parser = cli.FlagParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("which model").add_argument
    add(
        "--stage",
        type=flag_types.non_empty_text,
        help="pretrain, full_sft, …: the model of that stage in --out_dir (default: the latest stage)",
    )
    add(
        "--checkpoint",
        type=flag_types.path_string,
        help="a .pth file or a transformers folder, instead of --stage",
    )
    add("--out_dir", type=flag_types.path_string, default="out", help="folder of the models (default: out)")
    add_rope_flags(parser)
    add = parser.add_argument_group("prompts (default: a conversation)").add_mutually_exclusive_group().add_argument
    add("--prompt", help="one prompt")
    add("--prompts", type=flag_types.path_string, metavar="FILE", help="text file, one prompt per line")
    add(
        "--questions",
        type=flag_types.path_string,
        metavar="FILE",
        help="jsonl file of questions with keys: prints the accuracy",
    )
    add = parser.add_argument_group("sampling (--questions is always greedy)").add_argument
    add("--system", metavar="TEXT", help="system message of every conversation")
    add("--history", type=flag_types.non_negative_int, metavar="N",
        help="previous turns in each prompt (default: all; 0 with --prompts)")  # fmt: skip
    preset = "defaults of the flags below: those of the model's chat format (auto), of another format, or none"
    add(
        "--sampling_preset",
        choices=PRESET_CHOICES,
        default="auto",
        help=f"{preset}; --report uses none (default: auto)",
    )
    add("--temperature", type=flag_types.non_negative_float, help="0: greedy decoding (default: 0.7)")
    add("--top_k", type=flag_types.non_negative_int, help="sample from the k most probable tokens (default: 0, all)")
    add(
        "--top_p",
        type=flag_types.positive_fraction,
        help="sample from the most probable tokens that sum to p (default: 0.9)",
    )
    add(
        "--min_p",
        type=flag_types.fraction,
        help="drop tokens below this fraction of the largest probability (default: 0)",
    )
    add(
        "--repetition_penalty",
        type=flag_types.positive_float,
        help="above 1: less repetition, for example 1.1 (default: 1)",
    )
    ngrams = "no repeated n-gram of N tokens, prompt included (default: 0, off)"
    add("--no_repeat_ngram_size", type=flag_types.non_negative_int, metavar="N", help=ngrams)
    beams = "beam search with K beams, at most 8, at temperature 0; prints complete answers (default: 1, off)"
    add("--num_beams", type=flag_types.int_between(1, 8), metavar="K", help=beams)
    add(
        "--length_penalty",
        type=flag_types.non_negative_float,
        help="a beam's score: log-probability / length ** this (default: 1; 0: the sum)",
    )
    add("--max_new_tokens", type=flag_types.positive_int,
        help="length limit of an answer (default: 200; --questions: 48, for a pretrained model 24)")  # fmt: skip
    add("--seed", type=flag_types.seed, help="the same seed gives the same answers (default with --report: 0)")
    add = parser.add_argument_group("comparison of several models").add_argument
    add(
        "--report",
        nargs="*",
        type=flag_types.path_string,
        metavar="MODEL",
        help="compare these models, files or NAME=http://HOST/v1 (default: every stage in --out_dir)",
    )
    add(
        "--report_api_key",
        type=flag_types.non_empty_text,
        metavar="KEY",
        help="API key of the servers in --report (default: the variable REPORT_API_KEY)",
    )
    add(
        "--texts",
        nargs="+",
        type=flag_types.path_string,
        default=[],
        metavar="NAME=FILE",
        help="held-out texts for bits per byte, for example zh=FILE",
    )
    add(
        "--chats",
        type=flag_types.path_string,
        metavar="FILE",
        help="held-out chats (default: dataset/sft/val.jsonl if it exists)",
    )
    add("--max_bytes", type=flag_types.positive_int, default=100_000,
        help="bytes read of each text and of the chats (default: 100000)")  # fmt: skip
    add(
        "--judge",
        type=flag_types.non_empty_text,
        metavar="BASE_URL",
        help="server of a model that scores and ranks the answers, as http://localhost:8000/v1",
    )
    add("--judge_model", type=flag_types.non_empty_text, metavar="NAME", help="the model's name on that server")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=flag_types.device_name, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add(
        "--dtype",
        choices=flag_types.DTYPE_NAMES,
        default="auto",
        help="auto, float32, bfloat16, float16 (default: auto)",
    )
    add("--json", type=flag_types.path_string, metavar="OUT", help="write the answers (and scores) to this file")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot be combined."""
    only_reports = {
        "--texts": args.texts,
        "--chats": args.chats,
        "--judge": args.judge,
        "--judge_model": args.judge_model,
        "--report_api_key": args.report_api_key,
    }
    for flag, value in only_reports.items():
        if value and args.report is None:
            raise UserError(f"{flag} needs --report")
    for flag, value in {"--stage": args.stage, "--checkpoint": args.checkpoint, "--questions": args.questions}.items():
        if value and args.report is not None:
            raise UserError(f"{flag} cannot be combined with --report: list the models after --report")
    if bool(args.judge) != bool(args.judge_model):
        raise UserError("--judge BASE_URL and --judge_model NAME: give both or neither")
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
