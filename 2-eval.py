"""Talk to a model, put questions to it and count the right answers, or lay several models side by side.

    python 2-eval.py                             a conversation with the latest stage in out/; in a script: the prompts
    python 2-eval.py --stage pretrain --prompt "The sky is"
    python 2-eval.py --checkpoint ../Qwen3-0.6B  a foreign model: a transformers folder (Llama, Mistral, Qwen2, Qwen3)
    python 2-eval.py --rope_scaling yarn --rope_factor 4 --prompt "…"     reads 4 times as many tokens as in training
    python 2-eval.py --prompts FILE.txt          one prompt a line; --history 9: they are one conversation
    python 2-eval.py --questions FILE.jsonl --json out/report.json
    python 2-eval.py --report out/pretrain_512.pth out/full_sft_512.pth --texts zh=held_out_zh.jsonl en=held_out_en.txt
    python 2-eval.py --report --judge http://localhost:8000/v1 --judge_model NAME

A pretrained model goes on with the text as it is; a model of a chat stage gets it as a question, in the chat format.
A line of a questions file: {"question": "...", "keys": ["...", ...], "lang": "zh" or "en", "kind": "..."}, the last two
may be missing. Answers are greedy, and right when they contain any of the keys as a word (corpus/questions.py).
--report without files takes every stage in --out_dir. It writes one page (markdown) and the same as json: answers side
by side, bits per byte of --texts, their loss by position up to 4 times the trained length, loss on --chats, how often
answers loop, speed. Nothing leaves the machine unless --judge names a server (OpenAI's protocol; its key in
OPENAI_API_KEY): it gets the prompts and answers, not the names.
Reads out/*.pth; writes --json, a report to out/eval/, and what /save says.
Read next: evaluation/speaker.py and evaluation/talk.py, model/generate.py (how an answer is drawn), 3-full_sft.py.
"""

import argparse
import sys

from corpus.errors import UserError, fail_in_one_line
from corpus.prompts import FIRST
from corpus.questions import read_lines, read_questions, sound
from model.rope_flags import add_rope_flags, rope_of


def make_parser() -> argparse.ArgumentParser:
    text = (__doc__ or "") + "\nThe prompts of a script:\n" + "\n".join(f"    {prompt}" for prompt in FIRST)
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("which model").add_argument
    add("--stage", help="pretrain, full_sft, …: that stage's model in --out_dir (default: the latest stage there)")
    add("--checkpoint", help="a .pth file or the folder of a transformers model, instead of --stage")
    add("--out_dir", default="out", help="where the models are (default: out)")
    add_rope_flags(parser)
    add = parser.add_argument_group("what to ask (default: a conversation)").add_mutually_exclusive_group().add_argument
    add("--prompt", help="one prompt")
    add("--prompts", metavar="FILE", help="text file, one prompt a line")
    add("--questions", metavar="FILE", help="jsonl file of questions with keys: prints the share answered right")
    add = parser.add_argument_group("how to answer (--questions is always greedy)").add_argument
    add("--system", metavar="TEXT", help="system message in front of every conversation")
    add("--history", type=int, metavar="N", help="turns the model is told again (default: all; 0 with --prompts)")
    add("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: 0.7)")
    add("--top_k", type=int, default=0, help="draw among the k likeliest tokens (default: 0, all)")
    add("--top_p", type=float, default=0.9, help="draw among the likeliest that sum to p (default: 0.9)")
    add("--min_p", type=float, default=0.0, help="drop tokens below this share of the likeliest (default: 0)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less, try 1.1 (default: 1)")
    add("--max_new_tokens", type=int, help="longest answer (default: 200; --questions: 48, of a pretrained model 24)")
    add("--seed", type=int, help="the same seed draws the same answers (default of --report: 0)")
    add = parser.add_argument_group("several models side by side").add_argument
    add("--report", nargs="*", metavar="MODEL", help="compare these models (default: every stage in --out_dir)")
    add("--texts", nargs="+", default=[], metavar="NAME=FILE", help="held-out text for bits per byte, as zh=FILE")
    add("--chats", metavar="FILE", help="held-out chats (default: dataset/sft/val.jsonl where it is)")
    add("--max_bytes", type=int, default=100_000, help="read from the start of a text, and of chats (default: 100000)")
    add("--judge", metavar="BASE_URL", help="a model that scores and ranks the answers, as http://localhost:8000/v1")
    add("--judge_model", metavar="NAME", help="its name there")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    add("--json", metavar="OUT", help="write the answers (and scores) to this file")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    only_reports = {
        "--texts": args.texts,
        "--chats": args.chats,
        "--judge": args.judge,
        "--judge_model": args.judge_model,
    }
    for flag, value in only_reports.items():
        if value and args.report is None:
            raise UserError(f"{flag} belongs to --report")
    for flag, value in {"--stage": args.stage, "--checkpoint": args.checkpoint, "--questions": args.questions}.items():
        if value and args.report is not None:
            raise UserError(f"{flag} does not go with --report: name the models behind --report")
    if bool(args.judge) != bool(args.judge_model):
        raise UserError("--judge BASE_URL and --judge_model NAME go together")
    rope_of(args)
    if args.history is not None and args.history < 0:
        raise UserError(f"--history {args.history}: a number of turns is needed, 0 or more")


def main() -> None:
    args = make_parser().parse_args()
    check_arguments(args)
    questions = read_questions(args.questions) if args.questions else []
    prompts = [text for _, text in read_lines(args.prompts)] if args.prompts else []
    if args.prompt is not None:
        prompts = [sound(args.prompt, "--prompt")]
    if args.report is not None:
        from evaluation.report_page import make_report

        return make_report(args, prompts)
    if not questions and not prompts and not sys.stdin.isatty():
        prompts = list(FIRST)

    from evaluation.scoring import put_questions
    from evaluation.speaker import Speaker, find_model
    from evaluation.talk import Conversation, talk

    speaker = Speaker(find_model(args), args)
    scores = put_questions(speaker, questions) if questions else {}
    conversation = Conversation(speaker, args.history or 0)
    for prompt in prompts:
        print(f"\n> {prompt}")
        conversation.ask(prompt, at_terminal=False)
    if not questions and not prompts:
        talk(speaker, args.out_dir, args.history)
    speaker.report(args.json, **scores)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
