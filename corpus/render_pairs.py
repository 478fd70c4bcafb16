"""Pairs of answers -> documents of the token folder: both answers with the same prompt.

    pair -> two consecutive documents: prompt + chosen, prompt + rejected

The loss mask covers only the two answers; earlier answers inside the prompt are context.
Called by tokenize_chats.py. Read next: render_chats.py (the same for chats), ../model/tokenizer.py (`render_each`).
"""

import bisect
import itertools

from corpus.answers import common_prefix_length
from corpus.chats import Message, chat_text
from corpus.examples import PairExample
from corpus.render_chats import (
    MAX_TOKEN_CHARACTERS,
    MaskedTokens,
    count_answer_bytes,
    count_markers,
    message_length,
)
from corpus.stats import DataStats
from model.tokenizer import ChatTokenizer


def render_pair_examples(
    examples: list[PairExample], tokenizer: ChatTokenizer, max_seq_len: int, stats: DataStats
) -> list[list[MaskedTokens]]:
    """For each pair, the documents [prompt + chosen, prompt + rejected] of at most `max_seq_len` tokens.

    The list is empty if the longer document does not fit, or if the chat format cannot render one of them. A prompt
    that is too long loses its oldest whole turns, the same ones for both answers; an answer is never truncated.
    """
    prompts = [_drop_oldest_turns(example, max_seq_len) for example in examples]
    rendered = iter(
        _render_answers([(p, example.answers) for p, example in zip(prompts, examples, strict=True) if p], tokenizer)
    )
    result = []
    for example, prompt in zip(examples, prompts, strict=True):
        if not prompt:
            stats.row_dropped(f"question and longer answer exceed {max_seq_len} tokens", example.file, example.line)
        result.append(_fit_pair(example, next(rendered), tokenizer, max_seq_len, stats) if prompt else [])
    return result


def _fit_pair(
    example: PairExample,
    documents: list[MaskedTokens] | str,
    tokenizer: ChatTokenizer,
    max_seq_len: int,
    stats: DataStats,
) -> list[MaskedTokens]:
    """`documents` of the pair with its full prompt, or the reason why it cannot be rendered."""
    prompt = _drop_oldest_turns(example, max_seq_len)
    if not isinstance(documents, str) and _max_length(documents) > max_seq_len:
        first = int(prompt[0]["role"] == "system")
        starts = [i for i in range(first + 1, len(prompt)) if prompt[i]["role"] == "user"]

        def fits(start: int) -> bool:
            (rendered,) = _render_answers([(prompt[:first] + prompt[start:], example.answers)], tokenizer)
            return isinstance(rendered, str) or _max_length(rendered) <= max_seq_len

        # The length grows with the number of turns, so bisection finds the longest fit in log2(turns) renderings.
        first_kept = bisect.bisect_left(starts, True, key=fits)
        if first_kept == len(starts):
            stats.row_dropped(f"question and longer answer exceed {max_seq_len} tokens", example.file, example.line)
            return []
        prompt = prompt[:first] + prompt[starts[first_kept] :]
        (documents,) = _render_answers([(prompt, example.answers)], tokenizer)
    if isinstance(documents, str):
        stats.row_dropped(documents, example.file, example.line)
        return []
    if len(prompt) < len(example.prompt):
        stats.row_truncated(
            f"without the oldest turns of its prompt, to fit {max_seq_len} tokens", example.file, example.line
        )
    tokens, trained = (sum(count) for count in zip(*((len(ids), sum(mask)) for ids, mask, _ in documents), strict=True))
    # The text of both documents, with the prompt twice.
    text = "".join(chat_text([*prompt, *answer]) for answer in example.answers)
    markers, longest = sum(count_markers(tokenizer, ids) for ids, *_ in documents), _max_length(documents)
    stats.row_kept(example.language, len(text), tokens, len(text.encode()), trained, longest, markers)
    return documents


def _drop_oldest_turns(example: PairExample, max_seq_len: int) -> list[Message]:
    """Drop the oldest turns that cannot fit with any tokenizer; returns [] if not even the last question can fit.

    A message takes at least one token, and a token has at most MAX_TOKEN_CHARACTERS characters.
    """
    prompt, first = example.prompt, int(example.prompt[0]["role"] == "system")
    lengths = [*map(message_length, prompt)]
    longer_answer = max(sum(map(message_length, answer)) for answer in example.answers)
    max_characters = MAX_TOKEN_CHARACTERS * max_seq_len - longer_answer
    if len(prompt) - first <= max_seq_len and sum(lengths) <= max_characters:
        return prompt
    ends = itertools.accumulate(reversed(lengths[first:]), initial=sum(lengths[:first]))
    fitting = sum(1 for _ in itertools.takewhile(lambda end: end <= max_characters, ends)) - 1
    earliest = len(prompt) - min(fitting, max_seq_len)
    start = next((i for i in range(max(first, earliest), len(prompt)) if prompt[i]["role"] == "user"), None)
    return [] if start is None else prompt[:first] + prompt[start:]


def _max_length(documents: list[MaskedTokens]) -> int:
    """Number of tokens of the longer document."""
    return max(len(ids) for ids, _, _ in documents)


def _render_answers(
    pairs: list[tuple[list[Message], tuple[list[Message], ...]]], tokenizer: ChatTokenizer
) -> list[list[MaskedTokens] | str]:
    """For each (prompt, answers), the documents prompt + answer with masks that are 1 only in that answer.

    Where the chat format cannot render a pair, its reason takes the place of the documents.
    """
    rendered_prompts = tokenizer.render_each([prompt for prompt, _ in pairs], add_generation_prompt=True)
    rendered = iter(tokenizer.render_each([[*prompt, *answer] for prompt, answers in pairs for answer in answers]))
    result: list[list[MaskedTokens] | str] = []
    for (_, answers), prompt in zip(pairs, rendered_prompts, strict=True):
        conversations = [next(rendered) for _ in answers]
        if refusal := next((chat.refusal for chat in (prompt, *conversations) if chat.refusal), ""):
            result.append(refusal)
            continue
        documents = []
        for answer, conversation in zip(answers, conversations, strict=True):
            ids, mask, _ = conversation.samples[-1]
            # The answer starts where the ids differ: one token may span the end of the prompt and the answer's start.
            start = common_prefix_length(ids, prompt.samples[-1].ids)
            documents.append((ids, [0] * start + mask[start:], count_answer_bytes(answer)))
        result.append(documents)
    return result
