"""How surprising a chat's answers are to a model: their cross-entropy, in nats a token.

    score = sum over the tokens of the answers of -log p(token | everything before it) / how many they are

A pretrained model has never seen the markers of a chat, so it gets the bare words, one message after the other on lines
of their own, as pretraining shows it chats; a model of a chat stage gets the chat as it knows it.

Reads   any out/*.pth or a transformers folder.
Read next: perplexity_filter.py (what is done with the scores), ../trainer/loss.py.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from common.device import autocast, pick_device, pick_dtype
from common.locks import locked
from corpus.chats import is_trained
from corpus.examples import Item
from corpus.prepare_chats import Form
from corpus.stats import DataReport
from curation.perplexity_filter import Choice, Examples, Scores, print_histogram, scores_path, summary
from export.hf_import import open_folder, open_model
from model.chat_template import Message
from model.checkpoint import fingerprint
from model.tokenizer import ChatTokenizer
from trainer.loss import IGNORE, output_weight, token_log_probs

POOL = 1024  # chats that are sorted by length together
BATCH_TOKENS = 8192  # of a batch, pads included


class Scorer:
    """A loaded model that scores chats."""

    def __init__(self, path: str | Path, device: str = "auto", dtype: str = "auto") -> None:
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.model, self.tokenizer, checkpoint = open_model(path, self.device)
        self.bare = checkpoint["stage"] == "pretrain" or self.tokenizer.format is None
        self.name = fingerprint(path, open_folder)
        self.limit = self.model.config.max_seq_len

    @torch.no_grad()
    def scores(self, chats: list[list[Message]]) -> list[tuple[float, int]]:
        """(nats a token, scored tokens) of each chat; (0.0, 0) where no token of an answer fits."""
        rows = [self._tokens(messages) for messages in chats]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        result = [(0.0, 0)] * len(rows)
        for batch in batches_of(order, [len(ids) for ids, _ in rows]):
            width = max(len(rows[i][0]) for i in batch) - 1
            if width < 1:
                continue
            ids = torch.full((len(batch), width), self.tokenizer.pad_id)
            labels = torch.full((len(batch), width), IGNORE)
            for at, i in enumerate(batch):
                own, mask = torch.tensor(rows[i][0]), torch.tensor(rows[i][1], dtype=torch.bool)
                ids[at, : len(own) - 1] = own[:-1]
                labels[at, : len(own) - 1] = torch.where(mask[1:], own[1:], IGNORE)
            ids, labels = ids.to(self.device), labels.to(self.device)
            with autocast(self.device, self.dtype):
                hidden, _ = self.model(ids)
                log_probs = token_log_probs(hidden, output_weight(self.model), labels)
            counts = (labels != IGNORE).sum(1).tolist()
            for i, total, count in zip(batch, log_probs.double().sum(1).tolist(), counts, strict=True):
                result[i] = (-total / max(count, 1), count)
        return result

    def _tokens(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Ids and the mask of the answers, cut to what the model reads. Of a chat that its format cannot write nothing
        is scored."""
        if self.bare:
            ids, mask = bare_chat(self.tokenizer, messages)
        else:
            (rendered,) = self.tokenizer.render_each([messages])
            ids, mask = ([self.tokenizer.eos_id], [0]) if rendered.refusal else rendered.samples[-1][:2]
        return ids[: self.limit], mask[: self.limit]


def bare_chat(tokenizer: ChatTokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """The words of a chat, a line for each message, and the mask of the assistant's; line ends are not scored."""
    ids: list[int] = []
    mask: list[int] = []
    for number, message in enumerate(messages):
        new = tokenizer.encode_start(message["content"]) if not number else tokenizer.encode("\n" + message["content"])
        ids += new
        skipped = len(tokenizer.encode("\n")) if number else 0
        answer = int(is_trained(message))
        mask += [0] * skipped + [answer] * (len(new) - skipped)
    return ids, mask


def batches_of(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """The indices in `order`, shortest first, cut so that no batch has more than BATCH_TOKENS places."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score_items(items: Iterable[Item], scorer: Scorer, scores: Scores) -> int:
    """Score every chat that `scores` does not know yet, each once; returns how many. Memory: one pool of chats."""
    new = (item for item in items if scores.get(item.identity) is None)
    done = 0
    while pool := list(itertools.islice(new, POOL)):
        found = scorer.scores([item.messages for item in pool])
        scores.add(
            (item.identity, nats, count, item.language)
            for item, (nats, count) in zip(pool, found, strict=True)
            if count
        )
        done += len(pool)
    return done


class Choosing:
    """What `data_process.py sft --scorer` does besides packing: score, keep a band, show the histogram."""

    def __init__(
        self,
        args: argparse.Namespace,
        form: Form,
        progress: Callable[[list[str], DataReport], AbstractContextManager[Callable[[], None]]],
    ) -> None:
        scorer, report = Scorer(args.scorer), DataReport(args.max_bad_share, args.accept_damaged)
        path = scores_path(args.out_dir, scorer.name)
        with locked(path), progress(args.files, report) as on_batch:
            self.scores = Scores(path)
            items = counted(form.items(args.files, report), report, on_batch)
            try:
                new = score_items(items, scorer, self.scores)
            except KeyboardInterrupt:
                print(f"the scores so far are kept in {self.scores.path}: the same command goes on behind them")
                raise
            finally:
                self.scores.close()
        known = f", {report.kept - new:,} were scored before" if report.kept > new else ""
        print(f"scored {new:,} chats with {args.scorer} on {scorer.device} in {report.seconds:.0f} s{known}; "
              f"scores in {self.scores.path}")  # fmt: skip
        self.choice = Choice(self.scores, args.keep_entropy or [], args.keep_share)
        self.examples = Examples(self.scores, 2)
        chosen = self.choice.chosen(form.items, args.val_share, self.examples.consider)
        self.form = dataclasses.replace(form, items=chosen, choice=form.choice | self.choice.job())

    def show(self) -> None:
        print_histogram(self.choice, self.examples)

    def about(self) -> dict[str, Any]:
        return {"chosen": summary(self.choice)}


def counted(items: Iterable[Item], report: DataReport, on_batch: Callable[[], None]) -> Iterator[Item]:
    """The same items; the report's speed is of them."""
    for item in items:
        report.kept += 1
        report.text_bytes += len(item.text.encode())
        if report.kept % POOL == 0:
            on_batch()
        yield item
