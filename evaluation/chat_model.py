"""A loaded model with its tokenizer and sampling settings: the text generation of 2-eval.py.

    ChatModel(path, args).stream_answer(messages)      one answer, printed token by token
    ChatModel(path, args).generate_answers(prompts)    many answers in one batch

A model of a chat stage gets the messages in its chat format; a pretrained model continues the bare text.
Read next: terminal_chat.py (a conversation), qa.py (questions with keys), report.py (comparison of several models),
../model/generate.py (the sampling loop).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common.device import autocast, pick_device, pick_dtype
from common.errors import UserError, escape_controls
from common.files import write_text
from evaluation.qa_data import MAX_ANSWER_TOKENS, require_nonempty_text
from export.hf_import import open_model
from model.chat_template import Message
from model.checkpoint import PARENT_STAGES, find_checkpoint
from model.completion import Completion
from model.generate import chat_prompt, generate, stream
from model.rope import rope_summary
from model.rope_flags import parse_rope_flags
from model.sampling import SamplingParams
from model.sampling_presets import DEFAULT_SAMPLING, find_preset, format_settings, merge_settings

SAMPLING_SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams",
    "length_penalty", "max_new_tokens", "seed",
)  # fmt: skip


def find_model(args: argparse.Namespace) -> Path:
    """The path of --checkpoint, else the model of --stage, else of the latest stage in --out_dir. Raises UserError."""
    if args.checkpoint:
        return Path(args.checkpoint)
    if args.stage and args.stage not in PARENT_STAGES:
        raise UserError(f"--stage {args.stage}: unknown stage; choose from {', '.join(PARENT_STAGES)}")
    stages = list_stages(args.out_dir)
    return find_checkpoint(args.out_dir, args.stage or (stages or list(PARENT_STAGES)[:1])[-1])


def list_stages(out_dir: str) -> list[str]:
    """The training stages with a model in `out_dir`, in training order."""
    return [stage for stage in PARENT_STAGES if list(Path(out_dir).glob(f"{stage}_[0-9]*.pth"))]


class ChatModel:
    """A model, its tokenizer and sampling settings. Records its answers, token counts and seconds.

    `settings` and `system` (a list of at most one message) may be replaced between answers.
    Raises UserError for a missing model, a model of another stage than --stage, and settings out of range.
    """

    def __init__(self, path: str | Path, args: argparse.Namespace) -> None:
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        rope = parse_rope_flags(args)
        self.model, self.tokenizer, checkpoint = open_model(path, device)
        if rope:
            self.model.scale_rope(*rope)
        self.path, self.stage, self.device, self.dtype = Path(path), checkpoint["stage"], device, dtype
        self.lineage: list[dict[str, Any]] = checkpoint.get("lineage", [])
        if args.stage and args.stage != self.stage:
            raise UserError(
                f"{path} is of stage {self.stage}, not {args.stage}: leave out --stage or name another file"
            )
        self.is_chat_model = self.stage != "pretrain" and self.tokenizer.format is not None
        self.system: list[Message] = []
        if args.system:
            self.system = [{"role": "system", "content": require_nonempty_text(args.system, "--system")}]
        self.preset_summary = ""  # the summary's line about the chat format's settings
        self.settings = self._make_settings(args)
        self.answers: list[dict[str, Any]] = []
        self.tokens, self.seconds = 0, 1e-9
        self.last_timing = (0, 1e-9)  # tokens and seconds of the last answer
        print(self.summary(), *filter(None, [self.preset_summary]), sep="\n", flush=True)

    def _make_settings(self, args: argparse.Namespace) -> SamplingParams:
        """Greedy for questions with keys; else the flags, which override the preset of the model's chat format.

        A report uses no preset: all its models get the same settings.
        """
        max_new_tokens = args.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = 200 if not args.questions else MAX_ANSWER_TOKENS if self.is_chat_model else 24
        stop = self.tokenizer.stop_strings if self.is_chat_model else ()
        try:
            if args.questions:  # a pretrained model has no end-of-answer token: a newline ends its answer
                return SamplingParams(max_new_tokens=max_new_tokens, stop=stop if self.is_chat_model else ("\n",))
            explicit = {name: getattr(args, name) for name in SAMPLING_SETTINGS if getattr(args, name) is not None}
            choice = args.sampling_preset if self.is_chat_model and args.report is None else "none"
            name, preset = find_preset(choice, self.tokenizer.format)
            merged = merge_settings(explicit, preset, DEFAULT_SAMPLING)
            if applied := {key: value for key, value in preset.items() if key not in explicit and merged[key] == value}:
                self.preset_summary = (
                    f"sampling: {name} preset: {format_settings(applied)} (--sampling_preset none turns it off)"
                )
            return SamplingParams(**{**merged, "max_new_tokens": max_new_tokens}, stop=stop)
        except ValueError as error:
            raise UserError(f"--{error}") from None

    def summary(self) -> str:
        """One line: path, stage, number of parameters, device, dtype and RoPE scaling."""
        total, active = self.model.count_parameters()
        size = f"{total / 1e6:.1f} M parameters" + (f" ({active / 1e6:.1f} M active)" if active != total else "")
        rope = f", RoPE {scaling}" if (scaling := rope_summary(self.model.config)) else ""
        return f"{self.path}: {self.stage}, {size}, {self.device}, {str(self.dtype).removeprefix('torch.')}{rope}"

    def autocast_context(self) -> Any:
        """The autocast context of generation, in --dtype."""
        return autocast(self.device, self.dtype)

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """The prompt tokens: the bare text, or the chat with its latest turns that fit beside max_new_tokens."""
        if not self.is_chat_model:
            return self.tokenizer.encode_document(messages[-1]["content"])
        return chat_prompt(self.model, self.tokenizer, self.system + messages, self.settings.max_new_tokens)

    def stream_answer(self, messages: list[Message], interruptible: bool = False) -> str:
        """Print the answer as it is generated and return it. If `interruptible`, Ctrl-C ends it and keeps the text."""
        answer, started = Completion(), time.perf_counter()
        try:
            with self.autocast_context():
                for piece in stream(self.model, self.prompt_ids(messages), self.settings, self.tokenizer, answer):
                    print(escape_controls(piece, keep="\n\t"), end="", flush=True)
        except KeyboardInterrupt:
            if not interruptible:
                raise
            answer.finish_reason = "stopped"
            print(" [stopped]", end="")
        except ValueError as error:  # the prompt is too long
            raise UserError(str(error)) from None
        print(flush=True)
        self.last_timing = (len(answer.ids), max(time.perf_counter() - started, 1e-9))
        self.tokens, self.seconds = self.tokens + self.last_timing[0], self.seconds + self.last_timing[1]
        prompt = messages[-1]["content"]
        self.answers.append({"prompt": prompt, "answer": answer.text, "finish_reason": answer.finish_reason})
        return answer.text

    def generate_answers(self, prompts: list[str]) -> list[dict[str, Any]]:
        """{"answer", "finish_reason", "tokens"} for each prompt: separate conversations, generated in one batch.

        Raises UserError that names the first prompt longer than the context.
        """
        ids = [self.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts]
        limit, started = self.model.config.max_seq_len, time.perf_counter()
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            if len(prompt_ids) >= limit:
                raise UserError(
                    f"{self.path}: the prompt “{prompt[:40]}” has {len(prompt_ids)} tokens, the model reads at most "
                    f"{limit} (max_seq_len): shorten it"
                )
        with self.autocast_context():
            answers = generate(self.model, ids, self.settings, self.tokenizer)
        self.seconds += time.perf_counter() - started
        self.tokens += sum(len(answer.ids) for answer in answers)
        return [{"answer": a.text.strip(), "finish_reason": a.finish_reason, "tokens": len(a.ids)} for a in answers]

    def continue_answers(self, answer_prefixes: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """{"answer", "finish_reason", "tokens"} for each (prompt, answer prefix): the continuation of the prefix.

        A pretrained model gets prompt and prefix as two lines of text. finish_reason "too_long": prompt and prefix
        exceed the context. Time and tokens are not added to the speed figures.
        """
        limit, ids = self.model.config.max_seq_len, []
        for prompt, start in answer_prefixes:
            if self.is_chat_model:
                ids.append(self.prompt_ids([{"role": "user", "content": prompt}]) + self.tokenizer.encode(start))
            else:
                ids.append(self.tokenizer.encode_document(f"{prompt}\n{start}"))
        fitting = [prompt_ids for prompt_ids in ids if len(prompt_ids) < limit]
        with self.autocast_context():
            generated = iter(generate(self.model, fitting, self.settings, self.tokenizer) if fitting else [])
        answers = [
            next(generated) if len(prompt_ids) < limit else Completion(finish_reason="too_long") for prompt_ids in ids
        ]
        return [{"answer": a.text.rstrip(), "finish_reason": a.finish_reason, "tokens": len(a.ids)} for a in answers]

    def write_results(self, path: str | None, **scores: Any) -> None:
        """Print the speed; write scores and answers as json to `path` if it is given."""
        speed = self.tokens / self.seconds
        print(f"{self.tokens} tokens, {speed:.0f} tokens/s")
        if path:
            metadata = {"checkpoint": str(self.path), "stage": self.stage, "tokens_per_second": round(speed, 1)}
            write_text(path, json.dumps(metadata | {**scores, "answers": self.answers}, ensure_ascii=False, indent=1))
