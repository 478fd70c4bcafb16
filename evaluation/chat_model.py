"""A loaded model and how it is spoken to: whatever asks it something asks through here.

    Speaker(path, args).say(messages)             one answer, printed while it grows
    Speaker(path, args).answer_all(prompts)       many answers in one batch

A model of a chat stage gets the chat in its format, a pretrained one goes on with the bare text.
Called by 2-eval.py. Read next: terminal_chat.py (a conversation), qa.py (questions with keys), report.py (several
models side by side), ../model/generate.py (how an answer is drawn).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common.device import autocast, pick_device, pick_dtype
from common.errors import UserError, printable
from common.files import write_text
from evaluation.qa_data import MAX_NEW_TOKENS, sound
from export.hf_import import open_model
from model.chat_template import Message
from model.checkpoint import PARENTS, find_checkpoint
from model.completion import Answer
from model.generate import chat_prompt, generate, stream
from model.rope import describe
from model.rope_flags import rope_of
from model.sampling import Sampling
from model.sampling_presets import DEFAULTS, find_preset, merge_settings, spell

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams",
    "length_penalty", "max_new_tokens", "seed",
)  # fmt: skip


def find_model(args: argparse.Namespace) -> Path:
    """--checkpoint, else the one model of --stage, else that of the last stage of the chain that has any."""
    if args.checkpoint:
        return Path(args.checkpoint)
    if args.stage and args.stage not in PARENTS:
        raise UserError(f"--stage {args.stage}: there is no such stage; choose from {', '.join(PARENTS)}")
    there = stages_in(args.out_dir)
    return find_checkpoint(args.out_dir, args.stage or (there or list(PARENTS)[:1])[-1])


def stages_in(out_dir: str) -> list[str]:
    """The stages of the chain that have a model in `out_dir`, in the order of the chain."""
    return [stage for stage in PARENTS if list(Path(out_dir).glob(f"{stage}_[0-9]*.pth"))]


class Speaker:
    """A model, its tokenizer, and how it answers. Remembers its answers, and what they cost.

    `settings` may be replaced at any time; so may `system`, a list with at most one message.
    Raises UserError for a model that is not there or not of the wanted stage, and for numbers that make no sense.
    """

    def __init__(self, path: str | Path, args: argparse.Namespace) -> None:
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        rope = rope_of(args)
        self.model, self.tokenizer, checkpoint = open_model(path, device)
        if rope:
            self.model.scale_rope(*rope)
        self.path, self.stage, self.device, self.dtype = Path(path), checkpoint["stage"], device, dtype
        self.lineage: list[dict[str, Any]] = checkpoint.get("lineage", [])
        if args.stage and args.stage != self.stage:
            raise UserError(
                f"{path} is of stage {self.stage}, not {args.stage}: leave out --stage or name another file"
            )
        self.chats = self.stage != "pretrain" and self.tokenizer.format is not None
        self.system: list[Message] = []
        if args.system:
            self.system = [{"role": "system", "content": sound(args.system, "--system")}]
        self.preset = ""  # the introduction's line about the chat format's settings
        self.settings = self._settings(args)
        self.answers: list[dict[str, Any]] = []
        self.tokens, self.seconds = 0, 1e-9
        self.last = (0, 1e-9)  # tokens and seconds of the last answer
        print(self.introduction(), *filter(None, [self.preset]), sep="\n", flush=True)

    def _settings(self, args: argparse.Namespace) -> Sampling:
        """Greedy for questions with keys; else what the flags say, over the preset of the model's chat format.

        A report takes no preset: its models are compared with the same settings.
        """
        longest = args.max_new_tokens
        if longest is None:
            longest = 200 if not args.questions else MAX_NEW_TOKENS if self.chats else 24
        stop = self.tokenizer.stop_strings if self.chats else ()
        try:
            if args.questions:  # a pretrained model knows no marker that ends an answer, so its line ends it
                return Sampling(max_new_tokens=longest, stop=stop if self.chats else ("\n",))
            named = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
            choice = args.sampling_preset if self.chats and args.report is None else "none"
            name, preset = find_preset(choice, self.tokenizer.format)
            chosen = merge_settings(named, preset, DEFAULTS)
            if taken := {key: value for key, value in preset.items() if key not in named and chosen[key] == value}:
                self.preset = f"sampling: {name} preset: {spell(taken)} (--sampling_preset none: without it)"
            return Sampling(**{**chosen, "max_new_tokens": longest}, stop=stop)
        except ValueError as error:
            raise UserError(f"--{error}") from None

    def introduction(self) -> str:
        """The file, its stage, the number of parameters, device, number format and RoPE scaling, in one line."""
        total, active = self.model.count_parameters()
        size = f"{total / 1e6:.1f} M parameters" + (f" ({active / 1e6:.1f} M active)" if active != total else "")
        rope = f", RoPE {about}" if (about := describe(self.model.config)) else ""
        return f"{self.path}: {self.stage}, {size}, {self.device}, {str(self.dtype).removeprefix('torch.')}{rope}"

    def number_format(self) -> Any:
        """The context in which answers are drawn: matrix products in --dtype."""
        return autocast(self.device, self.dtype)

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """What the model reads: the bare text, or the chat with as many of its last turns as leave room to answer."""
        if not self.chats:
            return self.tokenizer.encode_start(messages[-1]["content"])
        return chat_prompt(self.model, self.tokenizer, self.system + messages, self.settings.max_new_tokens)

    def say(self, messages: list[Message], may_be_stopped: bool = False) -> str:
        """Print the answer while it grows, and return it; where Ctrl-C may stop it, what there is until then."""
        answer, started = Answer(), time.perf_counter()
        try:
            with self.number_format():
                for piece in stream(self.model, self.prompt_ids(messages), self.settings, self.tokenizer, answer):
                    print(printable(piece, keep="\n\t"), end="", flush=True)
        except KeyboardInterrupt:
            if not may_be_stopped:
                raise
            answer.finish_reason = "stopped"
            print(" [stopped]", end="")
        except ValueError as error:  # the prompt is too long
            raise UserError(str(error)) from None
        print(flush=True)
        self.last = (len(answer.ids), max(time.perf_counter() - started, 1e-9))
        self.tokens, self.seconds = self.tokens + self.last[0], self.seconds + self.last[1]
        prompt = messages[-1]["content"]
        self.answers.append({"prompt": prompt, "answer": answer.text, "finish_reason": answer.finish_reason})
        return answer.text

    def answer_all(self, prompts: list[str]) -> list[dict[str, Any]]:
        """{"answer", "finish_reason", "tokens"} for each prompt, each a conversation of its own, in one batch.

        Raises UserError naming the prompt that is too long.
        """
        ids = [self.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
        limit, started = self.model.config.max_seq_len, time.perf_counter()
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            if len(prompt_ids) >= limit:
                raise UserError(
                    f"{self.path}: the prompt “{prompt[:40]}” has {len(prompt_ids)} tokens, the model reads at most "
                    f"{limit} (max_seq_len): shorten it"
                )
        with self.number_format():
            answers = generate(self.model, ids, self.settings, self.tokenizer)
        self.seconds += time.perf_counter() - started
        self.tokens += sum(len(answer.ids) for answer in answers)
        return [{"answer": a.text.strip(), "finish_reason": a.finish_reason, "tokens": len(a.ids)} for a in answers]

    def continue_all(self, begun: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """{"answer", "finish_reason", "tokens"} for each (prompt, start of the answer): what follows that start.

        A pretrained model gets both as two lines of text. finish_reason "too_long": they do not fit into the context.
        The time that this takes counts in no speed.
        """
        limit, ids = self.model.config.max_seq_len, []
        for prompt, start in begun:
            if self.chats:
                ids.append(self.prompt_ids([{"role": "user", "content": prompt}]) + self.tokenizer.encode(start))
            else:
                ids.append(self.tokenizer.encode_start(f"{prompt}\n{start}"))
        fitting = [prompt_ids for prompt_ids in ids if len(prompt_ids) < limit]
        with self.number_format():
            drawn = iter(generate(self.model, fitting, self.settings, self.tokenizer) if fitting else [])
        answers = [next(drawn) if len(prompt_ids) < limit else Answer(finish_reason="too_long") for prompt_ids in ids]
        return [{"answer": a.text.rstrip(), "finish_reason": a.finish_reason, "tokens": len(a.ids)} for a in answers]

    def report(self, path: str | None, **scores: Any) -> None:
        """The closing line, and the json file if one is wanted."""
        speed = self.tokens / self.seconds
        print(f"{self.tokens} tokens, {speed:.0f} tokens/s")
        if path:
            about = {"checkpoint": str(self.path), "stage": self.stage, "tokens_per_second": round(speed, 1)}
            write_text(path, json.dumps(about | {**scores, "answers": self.answers}, ensure_ascii=False, indent=1))
