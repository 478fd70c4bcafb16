"""Scores chats by the cross-entropy of their answers under a model, in nats per token.

    score = mean over the tokens of the answers of -log p(token | preceding tokens)

A pretrained model has not seen chat markers. It scores the plain text of the chat, one message per line, which is how
chats appear in the pretraining data. A model of a chat stage scores the chat in its own chat template.

Reads   any out/*.pth or a transformers folder.
Read next: perplexity_filter.py (selection by the scores), ../trainer/loss.py.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from common.device import autocast, pick_device, pick_dtype
from common.locks import lock_output
from corpus.chats import is_trained, message_text
from corpus.examples import ChatExample
from corpus.progress import reading_progress_bar
from corpus.stats import DataStats
from curation.perplexity_filter import PerplexityFlags, ScoreStore, scores_path
from export.hf_import import open_folder, open_model
from model.chat_template import Message
from model.checkpoint import model_fingerprint
from model.tokenizer import ChatTokenizer
from trainer.loss import IGNORE_INDEX, token_log_probs

ExampleReader = Callable[[DataStats], Iterator[ChatExample]]
SCORER_POOL_CHATS = 1024  # chats sorted by length together
SCORER_BATCH_TOKENS = 8192  # tokens per batch, padding included


class Scorer:
    """Loads a model and scores chats with it. Raises UserError if the model cannot be loaded."""

    def __init__(self, path: str | Path, device: str = "auto", dtype: str = "auto") -> None:
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.model, self.tokenizer, checkpoint = open_model(path, self.device)
        self.without_markers = checkpoint["stage"] == "pretrain" or self.tokenizer.format is None
        self.name = model_fingerprint(path, open_folder)
        self.max_tokens = self.model.config.max_seq_len

    @torch.no_grad()
    def score(self, chats: list[list[Message]]) -> list[tuple[float, int]]:
        """(nats per token, scored tokens) of each chat; (0.0, 0) if no answer token fits into the context."""
        rows = [self._encode_chat(messages) for messages in chats]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        result = [(0.0, 0)] * len(rows)
        for batch in batch_by_tokens(order, [len(ids) for ids, _ in rows]):
            width = max(len(rows[i][0]) for i in batch) - 1
            if width < 1:
                continue
            ids = torch.full((len(batch), width), self.tokenizer.pad_id)
            labels = torch.full((len(batch), width), IGNORE_INDEX)
            for row, i in enumerate(batch):
                row_ids, mask = torch.tensor(rows[i][0]), torch.tensor(rows[i][1], dtype=torch.bool)
                ids[row, : len(row_ids) - 1] = row_ids[:-1]
                labels[row, : len(row_ids) - 1] = torch.where(mask[1:], row_ids[1:], IGNORE_INDEX)
            ids, labels = ids.to(self.device), labels.to(self.device)
            with autocast(self.device, self.dtype):
                hidden, _ = self.model(ids)
                log_probs = token_log_probs(hidden, self.model.lm_head.weight, labels)
            counts = (labels != IGNORE_INDEX).sum(1).tolist()
            for i, total, count in zip(batch, log_probs.double().sum(1).tolist(), counts, strict=True):
                result[i] = (-total / max(count, 1), count)
        return result

    def _encode_chat(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Token ids and answer mask, cut to max_seq_len. A chat that the template rejects gets an empty mask."""
        if self.without_markers:
            ids, mask = encode_plain_chat(self.tokenizer, messages)
        else:
            (rendered,) = self.tokenizer.render_each([messages])
            ids, mask = ([self.tokenizer.eos_id], [0]) if rendered.refusal else rendered.samples[-1][:2]
        return ids[: self.max_tokens], mask[: self.max_tokens]


def encode_plain_chat(tokenizer: ChatTokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Token ids of the messages, one per line, and the mask of the assistant's tokens; line ends are not scored."""
    ids: list[int] = []
    mask: list[int] = []
    for number, message in enumerate(messages):
        text = message_text(message)
        new = tokenizer.encode("\n" + text) if number else tokenizer.encode_document(text)
        skipped = len(tokenizer.encode("\n")) if number else 0
        ids += new
        answer = int(is_trained(message))
        mask += [0] * skipped + [answer] * (len(new) - skipped)
    return ids, mask


def batch_by_tokens(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Split `order` (indices, shortest first) into batches of at most SCORER_BATCH_TOKENS padded tokens or one chat."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > SCORER_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def score_chats(config: PerplexityFlags, read_examples: ExampleReader) -> ScoreStore:
    """Score every chat of the files that has no score yet, and return the scores of all. Prints a summary.

    Memory: SCORER_POOL_CHATS chats. Raises UserError if the model cannot be loaded or the files cannot be used.
    """
    scorer, files, report = Scorer(config.scorer or ""), list(config.files), config.new_stats()
    path = scores_path(config.out_dir, scorer.name)
    num_new = 0
    with lock_output(path), reading_progress_bar(files, report) as on_batch:
        scores = ScoreStore(path)

        def unscored_examples() -> Iterator[ChatExample]:
            for example in read_examples(report):
                report.kept += 1
                report.text_bytes += len(example.text.encode())  # for the speed of the progress bar
                if report.kept % SCORER_POOL_CHATS == 0:
                    on_batch()
                if scores.get(example.content_hash) is None:
                    yield example

        examples = unscored_examples()
        try:
            while pool := list(itertools.islice(examples, SCORER_POOL_CHATS)):
                results = zip(pool, scorer.score([example.messages for example in pool]), strict=True)
                scores.add((chat.content_hash, nats, count, chat.language) for chat, (nats, count) in results if count)
                num_new += len(pool)
        except KeyboardInterrupt:
            print(f"the scores so far are kept in {path}: the same command continues from them")
            raise
        finally:
            scores.close()
    reused = f", {report.kept - num_new:,} had a score already" if report.kept > num_new else ""
    print(
        f"scored {num_new:,} chats with {config.scorer} on {scorer.device} in {report.seconds:.0f} s{reused}; "
        f"scores in {path}"
    )
    return scores
