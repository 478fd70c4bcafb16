"""Putting multiple-choice questions to a model: what it reads, and how probable it finds each option.

    letter   log p(letter | question, the four options)                 one token behind the prompt, four numbers
    text     log p(text of the option | question) / its characters      the options are not shown

`letter` is how C-Eval, MMLU and minimind v1 ask; a small model often has no idea what a letter stands for. `text` asks
for what it might really have learnt, an answer in words. The largest of the four is the model's answer; nothing is
drawn. A chat model gets question and examples as turns of a conversation, any other as plain text.

Questions of similar length are batched. Four options share one pass over their prompt, and logits are computed only
where an option is read. Several orders of the options: the four rotations put each option once under each letter.

Called by ../eval_ceval.py. Read next: exam_score.py (what the answers are worth), ../corpus/exams.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corpus.errors import UserError
from corpus.exams import LETTERS, Exam, Item
from corpus.language import language_of
from model.chat import ChatTokenizer
from model.transformer import KVCache, Transformer

METHODS = ("letter", "text")
ANSWER = {"zh": "答案：", "en": "Answer:"}
INSTRUCTION = {"zh": "请直接回答选项的字母。", "en": "Answer with the letter of the right option."}
BATCH_TOKENS = {"cpu": 1024}  # positions computed at once; more overflow a CPU's caches (measured: 4096 a third slower)
MORE_BATCH_TOKENS = 16384  # elsewhere
WIDTH_STEP = 16  # widths are multiples of it: a CPU's kernels are prepared for each shape anew
LARGEST_LOGITS = 1 << 24  # numbers in one block of logits

Order = tuple[int, int, int, int]  # the option that stands under A, under B, …


@dataclass(frozen=True)
class Asking:
    """How questions are put. `chat`: as a conversation in the tokenizer's chat format."""

    method: str = "letter"
    shots: int = 0
    orders: int = 1
    chat: bool = False

    @property
    def name(self) -> str:
        """letter_0shot, text_5shot, letter_0shot_4orders: part of the results' folder name."""
        return f"{self.method}_{self.shots}shot" + (f"_{self.orders}orders" if self.orders > 1 else "")


@dataclass
class Asked:
    """One question in one order, as the model gets it, and what came of it."""

    item: Item
    order: Order
    prompt: list[int]
    options: list[list[int]]  # the tokens behind the prompt, of each option as it is shown
    examples: int  # those of the shots that fitted
    cut: bool  # the prompt lost its beginning
    log_probs: tuple[float, ...] = ()  # one for each option, as the file letters them

    @property
    def rest(self) -> int:
        """Tokens of the longest option behind its first, which the prompt alone predicts."""
        return max(map(len, self.options)) - 1


def option_orders(count: int) -> list[Order]:
    """The first `count` of the 24 orders. Each four in a row hold every option once under every letter."""
    found = []
    for rest in itertools.permutations((1, 2, 3)):
        base = (0, *rest)
        found += [(*base[turn:], *base[:turn]) for turn in range(4)]
    return found[:count]  # type: ignore[return-value]


def ask(exam: Exam, tokenizer: ChatTokenizer, asking: Asking, max_seq_len: int) -> Iterator[Asked]:
    """Every question of the exam in every order, ready for `answer`. Raises UserError where one cannot fit."""
    for subject in exam.subjects:
        if len(exam.examples.get(subject, ())) < asking.shots:
            there = len(exam.examples.get(subject, ()))
            raise UserError(f"--shots {asking.shots}: {subject} has {there} examples in dev; ask with fewer")
    orders = option_orders(asking.orders)
    for subject in exam.subjects:
        prompt = _Prompt(tokenizer, asking, exam.examples.get(subject, [])[: asking.shots])
        for item in exam.items:
            if item.subject == subject:
                yield from (prompt.of(item, order, max_seq_len) for order in orders)


class _Prompt:
    """Builds prompts behind the examples of one subject."""

    def __init__(self, tokenizer: ChatTokenizer, asking: Asking, examples: list[Item]) -> None:
        self.tokenizer, self.asking, self.examples = tokenizer, asking, examples

    def of(self, item: Item, order: Order, max_seq_len: int) -> Asked:
        """The prompt in at most as many tokens as leave room for the longest option: examples go first, oldest
        first, then the beginning of the question."""
        lang = language_of(item.question)
        shown = [item.options[i] for i in order]
        texts = list(LETTERS) if self.asking.method == "letter" else shown
        question = self._question(item, shown, lang)
        for first in range(len(self.examples) + 1):
            examples = self.examples[first:]
            prompt, options = self._encode(examples, question, texts, lang)
            room = max_seq_len + 1 - max(map(len, options))
            if len(prompt) <= room:
                return Asked(item, order, prompt, options, len(examples), False)
        if not self.asking.chat and room > 1:
            start = len(self.tokenizer.encode_start("")) if prompt else 0  # a bos stays
            return Asked(item, order, prompt[:start] + prompt[len(prompt) - room + start :], options, 0, True)
        while room > 0 and question and len(prompt) > room:
            question = self._without_start(question, len(prompt) - room)
            prompt, options = self._encode([], question, texts, lang)
        if not question or room <= 0:
            raise UserError(f"{item.where}: the options do not fit into the model's {max_seq_len} tokens")
        return Asked(item, order, prompt, options, 0, True)

    def _question(self, item: Item, shown: list[str], lang: str) -> str:
        if self.asking.method == "text":
            return item.question
        lines = [item.question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, shown, strict=True))]
        return "\n".join(lines + ([INSTRUCTION[lang]] if self.asking.chat else []))

    def _encode(
        self, examples: list[Item], question: str, texts: list[str], lang: str
    ) -> tuple[list[int], list[list[int]]]:
        """Tokens of the prompt, and of each option behind it."""
        asked = [(self._question(item, list(item.options), lang), self._answer(item)) for item in examples]
        if self.asking.chat:
            messages = []
            for text, reply in asked:
                messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
            messages.append({"role": "user", "content": question})
            prompt, _ = self.tokenizer.render(messages, add_generation_prompt=True)
            return prompt, [self.tokenizer.encode(text) for text in texts]
        gap = "" if lang == "zh" else " "  # Answer: A
        blocks = [f"{text}\n{ANSWER[lang]}{gap}{answer}\n\n" for text, answer in asked]
        start = "".join(blocks) + f"{question}\n{ANSWER[lang]}"
        prompt = self.tokenizer.encode_start(start)
        # An option's tokens are what it adds: behind a colon a letter may be another token than at the start of a text.
        return prompt, [
            self.tokenizer.encode_start(start + gap + text)[len(prompt) :] or self.tokenizer.encode(gap + text)
            for text in texts
        ]

    def _answer(self, example: Item) -> str:
        letter = example.answer
        return letter if self.asking.method == "letter" else example.options[LETTERS.index(letter)]

    def _without_start(self, text: str, tokens: int) -> str:
        """The text without its first tokens; half a character that this leaves goes too."""
        return self.tokenizer.decode(self.tokenizer.encode(text)[tokens:]).lstrip("\ufffd")


@torch.inference_mode()
def answer(
    model: Transformer,
    tokenizer: ChatTokenizer,
    asked: list[Asked],
    method: str,
    number_format: Callable[[], AbstractContextManager[Any]],
    batch_tokens: int = 0,
) -> Iterator[int]:
    """Fill `log_probs` of all questions, batch after batch; yields how many each batch held.

    batch_tokens: positions computed at once, 0: what suits the device, 1: one question at a time.
    Raises UserError when the model computes no number.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS.get(model.lm_head.weight.device.type, MORE_BATCH_TOKENS)
    for batch in _batches(asked, batch_tokens, model.config.max_seq_len):
        with number_format():
            sums = _log_probs(model, batch, tokenizer.pad_id)
        for one, found in zip(batch, sums.tolist(), strict=True):
            own = [0.0] * 4
            for place, option in enumerate(one.order):
                own[option] = found[place] / (len(one.item.options[option]) if method == "text" else 1)
            if not all(map(math.isfinite, own)):
                raise UserError(f"the model computes no number for {one.item.where}: its weights are damaged")
            one.log_probs = tuple(own)
        yield len(batch)


def _batches(asked: list[Asked], batch_tokens: int, max_seq_len: int) -> Iterator[list[Asked]]:
    """Questions of similar length, longest first, `batch_tokens` positions at once or one question."""
    batch: list[Asked] = []
    prompt = rest = 0  # the longest of the batch
    for one in sorted(asked, key=lambda one: (len(one.prompt), one.rest), reverse=True):
        longest = max(prompt, len(one.prompt)), max(rest, one.rest)
        positions = (len(batch) + 1) * (_padded(longest[0]) + 4 * longest[1])
        if batch and (positions > batch_tokens or sum(longest) > max_seq_len):
            yield batch
            batch, longest = [], (len(one.prompt), one.rest)
        batch.append(one)
        prompt, rest = longest
    yield batch


def _padded(length: int) -> int:
    return -(-length // WIDTH_STEP) * WIDTH_STEP


def _log_probs(model: Transformer, batch: list[Asked], pad: int) -> Tensor:
    """Log-probabilities of the options as shown: (questions, 4)."""
    device, limit = model.lm_head.weight.device, model.config.max_seq_len
    width = min(_padded(max(len(one.prompt) for one in batch)), limit)
    rest = max(one.rest for one in batch)
    firsts = torch.tensor([[option[0] for option in one.options] for one in batch], device=device)
    if not rest:  # one token an option: pads on the right, where no real token looks, and no cache
        rows = [one.prompt + [pad] * (width - len(one.prompt)) for one in batch]
        hidden, _ = model(torch.tensor(rows, device=device))
        last = torch.tensor([len(one.prompt) - 1 for one in batch], device=device)
        hidden = hidden[torch.arange(len(batch), device=device), last]
        return _log_softmax(model, hidden).gather(1, firsts)

    width = max(len(one.prompt) for one in batch) if width + rest > limit else width
    lead = torch.tensor([width - len(one.prompt) for one in batch], device=device)
    rows = [[pad] * (width - len(one.prompt)) + one.prompt for one in batch]
    dtype = (
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.lm_head.weight.dtype
    )
    cache = KVCache(model.config, len(batch), width, device, dtype)
    hidden, _ = model(torch.tensor(rows, device=device), cache, lead)
    sums = _log_softmax(model, hidden[:, -1]).gather(1, firsts)

    many = KVCache(model.config, 4 * len(batch), width + rest, device, dtype)  # every prompt once for each option
    many.length = width
    many.keys[:, :, :, :width] = cache.keys.repeat_interleave(4, 1)
    many.values[:, :, :, :width] = cache.values.repeat_interleave(4, 1)
    options = [option for one in batch for option in one.options]
    padded = torch.tensor([option + [pad] * (rest + 1 - len(option)) for option in options], device=device)
    hidden, _ = model(padded[:, :-1], many, lead.repeat_interleave(4))
    real = torch.tensor([[i < len(option) for i in range(1, rest + 1)] for option in options], device=device)
    found = torch.zeros(real.shape, device=device)
    if real.any():
        found[real] = _picked(model, hidden[real], padded[:, 1:][real])
    return sums + found.sum(1).view(len(batch), 4)


def _picked(model: Transformer, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token behind its hidden state, in blocks: (n, dim), (n,) -> (n,)."""
    rows = max(LARGEST_LOGITS // model.config.vocab_size, 1)
    pairs = zip(hidden.split(rows), tokens.split(rows), strict=True)
    return torch.cat([_log_softmax(model, h).gather(1, t[:, None])[:, 0] for h, t in pairs])


def _log_softmax(model: Transformer, hidden: Tensor) -> Tensor:
    """fp32 whatever the number format: in bf16, letters tie that are not equal. (n, dim) -> (n, vocab)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), model.lm_head.weight.float()).log_softmax(-1)
