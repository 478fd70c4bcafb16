"""Rollouts: answers of the model in training to prompts, sampled in one batch, with tool calls and rewards.

    prompt -> answer                                        one round without tools
    prompt -> call -> result -> … -> answer                 with tools: a result is context, its tokens are not trained

An answer's seed depends only on (--seed, step, row of the prompt, index in the group), so that a resumed run, and any
number of processes, sample the same answers. Sampling has a temperature and filters, but no penalties: the loss needs
the probabilities of the model itself.
Read next: grpo.py (advantages, batches), rewards.py, ../model/generate.py (the generator).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from corpus.prompt_data import PREPARE_COMMAND, PromptRow, prompts_fingerprint, read_prompts
from model.answer_parts import ToolCall, answer_message, parse_answer
from model.chat_template import Message
from model.completion import Completion
from model.completion import Sequence as Generation
from model.generate import complete
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer
from trainer.datasets import TokenDataset
from trainer.grpo_config import GRPOConfig
from trainer.rewards import Score
from trainer.sampler import BatchSampler

MAX_ROWS = 256  # sequences that are generated together: a bound of the KV cache


@dataclass(frozen=True)
class Tools:
    """The tools of rollouts: their schemas, the function that runs a call, the most rounds of calls per answer."""

    schemas: list[dict[str, Any]] = field(default_factory=list)
    run: Callable[[ToolCall], str] = lambda call: ""
    max_rounds: int = 0


# ---- prompts ---------------------------------------------------------------------------------------------------------
class PromptDataset(TokenDataset):
    """The rendered prompts of a split. A row of a step is an answer: a step has rows / group_size prompts.

    Prompts that leave no space for --max_new_tokens within max_seq_len are left out; `num_dropped` counts them.
    """

    def __init__(
        self, config: GRPOConfig, rows: Sequence[PromptRow], tokenizer: ChatTokenizer, max_seq_len: int
    ) -> None:  # fmt: skip
        self.folder, self.group_size = Path(config.data_path), config.group_size
        self.max_new_tokens = config.max_new_tokens
        prompts = [(row, tokenizer.render(row.messages, add_generation_prompt=True)[0]) for row in rows]
        fitting = [(row, ids) for row, ids in prompts if len(ids) + self.max_new_tokens <= max_seq_len]
        self.rows, self.prompts = [row for row, _ in fitting], [ids for _, ids in fitting]
        self.num_dropped = len(rows) - len(fitting)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> np.ndarray:
        """Return the most tokens of each prompt and its answer, (len,)."""
        return np.array([len(ids) + self.max_new_tokens for ids in self.prompts], dtype=np.int64)

    def fingerprint(self) -> str:
        return prompts_fingerprint(self.folder)

    def batch_sampler(self, global_batch_size: int, seed: int) -> BatchSampler:
        if global_batch_size % self.group_size:
            raise UserError(
                f"the interrupted run has {global_batch_size} answers per step, which are no whole groups of "
                f"{self.group_size}: keep its --group_size, or start anew with --resume never"
            )
        return PromptSampler(len(self), None, global_batch_size // self.group_size, seed)


class PromptSampler(BatchSampler):
    """Selects the prompts of each step, always equally many: after the last one of an epoch the next epoch begins."""

    def row_ids(self, step: int) -> np.ndarray:
        return self._order.row_ids(step * self.global_batch_size, self.global_batch_size)


def open_prompts(
    config: GRPOConfig, tokenizer: ChatTokenizer, tools: Tools, max_seq_len: int
) -> dict[str, PromptDataset]:
    """Return {"train": …, and the held-out prompts by language} of --data_path. Raises UserError."""
    rows = {"train": read_prompts(config.data_path, "train")}
    for row in read_prompts(config.data_path, "val"):
        rows.setdefault(row.language, []).append(row)
    rows = {split: [offer_tools(row, tools.schemas) for row in rows[split]] for split in rows}
    prompts = {name: PromptDataset(config, rows[name], tokenizer, max_seq_len) for name in rows}
    if not len(prompts["train"]):
        raise UserError(
            f"{config.data_path} has no prompt that leaves {config.max_new_tokens} of {max_seq_len} tokens for an "
            f"answer: lower --max_new_tokens, or run `{PREPARE_COMMAND}` with other files"
        )
    return {name: data for name, data in prompts.items() if len(data)}


def offer_tools(row: PromptRow, schemas: list[dict[str, Any]]) -> PromptRow:
    """Return the row with these tools in its system message; one that has tools already stays as it is."""
    if not schemas or row.messages[0].get("tools"):
        return row
    first = row.messages[0]
    system: Message = first if first["role"] == "system" else {"role": "system", "content": ""}
    others = row.messages[1:] if system is first else row.messages
    return dataclasses.replace(row, messages=[{**system, "tools": schemas}, *others])


# ---- answers ---------------------------------------------------------------------------------------------------------
@dataclass
class Answer:
    """A sampled answer. `ids`: the tokens after the prompt, with the stop token; `mask`: 1 where they were generated.

    `texts`: what was generated in each round, with its markers. `is_truncated`: a length limit ended the answer.
    """

    messages: list[Message]
    prompt: list[int]
    seed: int
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    is_truncated: bool = False
    num_calls: int = 0

    @property
    def text(self) -> str:
        """All that was generated, without tool results: rewards read it."""
        return "\n".join(self.texts)

    @property
    def length(self) -> int:
        """The number of generated tokens."""
        return sum(self.mask)


@dataclass
class Group:
    """The answers to one prompt, and the score of each."""

    row: PromptRow
    answers: list[Answer]
    scores: list[Score]


def answer_seed(seed: int, step: int, prompt: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, step, prompt, index)).generate_state(1, np.uint64)[0])


def sample_answers(
    model: Transformer, tokenizer: ChatTokenizer, answers: list[Answer], settings: SamplingParams, tools: Tools
) -> None:
    """Fill new answers: generate all of them, run their tool calls and continue, at most `tools.max_rounds` times.

    An autocast context around the call sets the dtype.
    """
    settings = dataclasses.replace(settings, stop=tokenizer.stop_strings)
    for start in range(0, len(answers), MAX_ROWS):
        running = answers[start : start + MAX_ROWS]
        for rounds in range(tools.max_rounds, -1, -1):
            generate_more(model, tokenizer, running, settings)
            if rounds:
                running = [answer for answer in running if append_results(tokenizer, answer, tools)]
                for answer in running:
                    full = len(answer.prompt) + len(answer.ids) >= model.config.max_seq_len
                    answer.is_truncated = full or answer.length >= settings.max_new_tokens
                running = [answer for answer in running if not answer.is_truncated]
            if not rounds or not running:
                break


def generate_more(
    model: Transformer, tokenizer: ChatTokenizer, answers: list[Answer], settings: SamplingParams
) -> None:
    """Generate from the end of every answer up to its stop token or a limit."""
    seqs = []
    for answer in answers:
        left, seed = settings.max_new_tokens - answer.length, answer.seed + len(answer.ids)
        own = dataclasses.replace(settings, max_new_tokens=left, seed=seed)
        seqs.append(Generation(model, tokenizer, answer.prompt + answer.ids, own, Completion()))
    complete(model, tokenizer, seqs)
    for answer, seq in zip(answers, seqs, strict=True):
        done = seq.completion
        is_stopped = done.finish_reason == "stop" and seq.last_tokens[0] in tokenizer.stop_ids
        new = done.ids + seq.last_tokens * is_stopped  # the completion leaves out the stop token
        answer.ids += new
        answer.mask += [1] * len(new)
        answer.texts.append(done.text)
        answer.is_truncated = done.finish_reason == "length"


def append_results(tokenizer: ChatTokenizer, answer: Answer, tools: Tools) -> bool:
    """Run the calls in the last text of an answer and append their results; returns whether there was a call."""
    calls = parse_answer(answer.texts[-1]).tool_calls
    if answer.is_truncated or not calls:
        return False
    answer.num_calls += len(calls)
    results: list[Message] = [{"role": "tool", "content": tools.run(call)} for call in calls]
    answer.messages = [*answer.messages, answer_message(answer.texts[-1]), *results]
    ids, mask = tokenizer.render(answer.messages, add_generation_prompt=True)
    context = ids[len(mask) - mask[::-1].index(1) :]  # after the last trained token, the end of the answer's turn
    answer.ids += context
    answer.mask += [0] * len(context)
    return True
