"""Talk to a model, or put questions to it and count the right answers.

    python 2-eval.py                             a conversation with the latest stage in out/; in a script: ten prompts
    python 2-eval.py --stage pretrain --prompt "The sky is"
    python 2-eval.py --checkpoint ../Qwen        somebody else's model: a transformers folder (Llama, Qwen3)
    python 2-eval.py --prompts FILE.txt          one prompt a line
    python 2-eval.py --questions FILE.jsonl --json out/report.json

A pretrained model goes on with the text as it is; a model of a chat stage gets it as a question, in the chat format.
A line of a questions file: {"question": "...", "keys": ["...", ...], "lang": "zh" or "en", "kind": "..."}, the last two
may be missing. Answers are greedy, and right when they contain any of the keys as a word (corpus/questions.py).
Reads out/*.pth, writes only --json.
Read next: model/generate.py (how an answer is drawn), 3-full_sft.py (how a model learns to answer).
"""

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from corpus.errors import UserError, fail_in_one_line
from corpus.questions import read_lines, read_questions, sound

PROMPTS = (
    "你好，请介绍一下你自己。",
    "中国的首都是哪座城市？",
    "水在多少摄氏度会结冰？",
    "请写两句关于春天的话。",
    "三加五等于几？",
    "Hello! Who are you?",
    "What is the capital of France?",
    "Why does the sun look bigger than the stars?",
    "Write a short story about a lost umbrella.",
    "What is the opposite of hot?",
)
TALK_HELP = "/reset forgets the conversation, /exit ends it, Ctrl-C stops an answer, /help shows this line"


def make_parser() -> argparse.ArgumentParser:
    text = (__doc__ or "") + "\nThe fixed prompts:\n" + "\n".join(f"    {prompt}" for prompt in PROMPTS)
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("which model").add_argument
    add("--stage", help="pretrain, full_sft, …: that stage's model in --out_dir (default: the latest stage there)")
    add("--checkpoint", help="a .pth file or the folder of a transformers model, instead of --stage")
    add("--out_dir", default="out", help="where the models are (default: out)")
    add = parser.add_argument_group("what to ask (default: a conversation)").add_mutually_exclusive_group().add_argument
    add("--prompt", help="one prompt")
    add("--prompts", metavar="FILE", help="text file, one prompt a line")
    add("--questions", metavar="FILE", help="jsonl file of questions with keys: prints the share answered right")
    add = parser.add_argument_group("how to answer (--questions is always greedy)").add_argument
    add("--system", metavar="TEXT", help="system message in front of every conversation")
    add("--temperature", type=float, default=0.7, help="0: always the likeliest token (default: 0.7)")
    add("--top_k", type=int, default=0, help="draw among the k likeliest tokens (default: 0, all)")
    add("--top_p", type=float, default=0.9, help="draw among the likeliest that sum to p (default: 0.9)")
    add("--min_p", type=float, default=0.0, help="drop tokens below this share of the likeliest (default: 0)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less, try 1.1 (default: 1)")
    add("--max_new_tokens", type=int, help="longest answer (default: 200; --questions: 48, of a pretrained model 24)")
    add("--seed", type=int, help="the same seed draws the same answers")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    add("--json", metavar="OUT", help="write the answers (and scores) to this file")
    return parser


def find_model(args: argparse.Namespace) -> Path:
    """--checkpoint, else the one model of --stage, else that of the last stage of the chain that has any."""
    from model.checkpoint import PARENTS, find_checkpoint

    if args.checkpoint:
        return Path(args.checkpoint)
    if args.stage and args.stage not in PARENTS:
        raise UserError(f"--stage {args.stage}: there is no such stage; choose from {', '.join(PARENTS)}")
    there = [stage for stage in PARENTS if list(Path(args.out_dir).glob(f"{stage}_[0-9]*.pth"))]
    return find_checkpoint(args.out_dir, args.stage or (there or list(PARENTS)[:1])[-1])


class Speaker:
    """A loaded model and how it is addressed; remembers what it answered and how fast."""

    def __init__(self, args: argparse.Namespace) -> None:
        from model.checkpoint import load_model
        from model.generate import Sampling
        from trainer.runtime import autocast, pick_device, pick_dtype
        from trainer.scoring import MAX_NEW_TOKENS

        path, device = find_model(args), pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        self.model, self.tokenizer, checkpoint = load_model(path, device)
        self.path, self.stage = path, checkpoint["stage"]
        if args.stage and args.stage != self.stage:
            raise UserError(
                f"{path} is of stage {self.stage}, not {args.stage}: leave out --stage or name another file"
            )
        self.chats = self.stage != "pretrain" and self.tokenizer.format is not None
        self.system = [{"role": "system", "content": sound(args.system, "--system")}] if args.system else []
        self.number_format = lambda: autocast(device, dtype)
        if args.max_new_tokens is None:
            args.max_new_tokens = 200 if not args.questions else MAX_NEW_TOKENS if self.chats else 24
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "seed")
        stop = self.tokenizer.stop_strings if self.chats else ()
        try:
            if args.questions:  # greedy; a pretrained model knows no marker that ends an answer, so its line ends it
                self.settings = Sampling(max_new_tokens=args.max_new_tokens, stop=stop if self.chats else ("\n",))
            else:
                self.settings = Sampling(**{name: getattr(args, name) for name in names}, stop=stop)
        except ValueError as error:
            raise UserError(f"--{error}") from None
        self.answers: list[dict[str, Any]] = []
        self.tokens, self.seconds = 0, 1e-9
        total, active = self.model.count_parameters()
        size = f"{total / 1e6:.1f} M parameters" + (f" ({active / 1e6:.1f} M active)" if active != total else "")
        print(f"{path}: {self.stage}, {size}, {device}, {str(dtype).removeprefix('torch.')}", flush=True)

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """What the model reads: the bare text, or the chat with as many of its last turns as leave room to answer."""
        from trainer.scoring import chat_prompt

        if not self.chats:
            return self.tokenizer.encode_start(messages[-1]["content"])
        return chat_prompt(self.model, self.tokenizer, self.system + messages, self.settings.max_new_tokens)

    def say(self, messages: list[dict[str, str]], may_be_stopped: bool = False) -> str:
        """Print the answer while it grows, and return it; where Ctrl-C may stop it, what there is until then."""
        from model.generate import Answer, stream

        answer, started = Answer(), time.perf_counter()
        try:
            with self.number_format():
                for piece in stream(self.model, self.prompt_ids(messages), self.settings, self.tokenizer, answer):
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not may_be_stopped:
                raise
            print(" [stopped]", end="")
        except ValueError as error:  # the prompt is too long
            raise UserError(str(error)) from None
        print(flush=True)
        self.tokens, self.seconds = self.tokens + len(answer.ids), self.seconds + time.perf_counter() - started
        prompt = messages[-1]["content"]
        self.answers.append({"prompt": prompt, "answer": answer.text, "finish_reason": answer.finish_reason})
        return answer.text

    def report(self, path: str | None, **scores: Any) -> None:
        """The closing line, and the json file if one is wanted."""
        speed = self.tokens / self.seconds
        print(f"{self.tokens} tokens, {speed:.0f} tokens/s")
        if path:
            about = {"checkpoint": str(self.path), "stage": self.stage, "tokens_per_second": round(speed, 1)}
            about |= {**scores, "answers": self.answers}
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path + ".tmp").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
                Path(path + ".tmp").replace(path)
            except OSError as error:
                raise UserError(f"cannot write --json {path}: {error.strerror}") from None


def put_questions(speaker: Speaker, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Answer all questions in batches of similar length; prints the table and returns its numbers."""
    from rich.console import Console
    from rich.table import Table

    from trainer.scoring import answer_questions, count_right

    started = time.perf_counter()
    for row in questions:
        text = row["question"] + ("" if speaker.chats else "\n")
        row["ids"] = speaker.prompt_ids([{"role": "user", "content": text}])
    speaker.tokens = answer_questions(
        speaker.model, speaker.tokenizer, questions, speaker.settings, speaker.number_format
    )
    speaker.seconds = time.perf_counter() - started
    fields = ("question", "answer", "keys", "correct", "lang", "kind")
    speaker.answers = [{name: row[name] for name in fields} for row in questions]
    kinds = {kind: count_right(questions, kind) for kind in sorted({row["kind"] for row in questions} - {""})}
    total = count_right(questions)
    table = Table("answered right", *total)
    for name, counts in {**kinds, "all": total}.items():
        cells = (counts.get(lang) for lang in total)
        table.add_row(name, *(f"{c['accuracy']:.1%} ({c['correct']} of {c['questions']})" if c else "" for c in cells))
    Console().print(table)
    return {"accuracy": {lang: counts["accuracy"] for lang, counts in total.items()}, "counts": total, "kinds": kinds}


def talk(speaker: Speaker) -> None:
    """A conversation on the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input(); Windows has its own
    print(TALK_HELP)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n" + TALK_HELP)
            continue
        if text == "/exit":
            return None
        if text == "/reset":
            messages = []
        elif text.startswith("/"):
            print(TALK_HELP)
        elif text:
            question = {"role": "user", "content": sound(text, "the question")}
            try:
                answer = speaker.say([*messages, question], may_be_stopped=True)
                messages += [question, {"role": "assistant", "content": answer}]
            except UserError as error:
                print(f"[{error}]")


def main() -> None:
    args = make_parser().parse_args()
    for out in (sys.stdout, sys.stderr):
        if isinstance(out, io.TextIOWrapper):  # a console in another encoding shows "?" instead of failing
            out.reconfigure(errors="replace")
    questions = read_questions(args.questions) if args.questions else []
    prompts = [text for _, text in read_lines(args.prompts)] if args.prompts else []
    if args.prompt is not None:
        prompts = [sound(args.prompt, "--prompt")]
    elif not questions and not prompts and not sys.stdin.isatty():
        prompts = list(PROMPTS)
    speaker, scores = Speaker(args), {}
    if questions:
        scores = put_questions(speaker, questions)
    for prompt in prompts:
        print(f"\n> {prompt}")
        speaker.say([{"role": "user", "content": prompt}])
    if not questions and not prompts:
        talk(speaker)
    speaker.report(args.json, **scores)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
