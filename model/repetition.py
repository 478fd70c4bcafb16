"""Repetition metrics of generated answers.

    distinct-n = distinct n-grams / all n-grams, over all answers together      (Li et al. 2016, arXiv:1510.03055, 4.2)
    loop       = a sequence of 1 to 32 units repeats four times in a row (a single unit eight times)
    loop rate  = fraction of answers that end in a loop

A unit is a Chinese character, a word or a punctuation mark, so the metrics do not depend on the tokenizer.
Read next: ../evaluation/report.py (reports them), ../trainer/dpo.py (monitors the loop rate in DPO).
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

MAX_PERIOD = 32
_UNIT = re.compile(r"[㐀-鿿豈-﫿]|[^\W㐀-鿿豈-﫿]+|[^\w\s]")


def split_units(text: str) -> list[str]:
    """Split text into Chinese characters, words and punctuation marks, in lower case, without whitespace."""
    return _UNIT.findall(text.lower())


def distinct_n(answers: Iterable[Sequence[Any]], n: int) -> float | None:
    """Distinct n-grams / all n-grams of the answers; None if every answer is shorter than n."""
    grams = [tuple(answer[i : i + n]) for answer in answers for i in range(len(answer) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def has_loop(ids: Sequence[Any], at_end: bool = False) -> bool:
    """Whether 1 to 32 units repeat four times in a row, anywhere or `at_end`; the last repetition may be incomplete.

    A single unit must repeat eight times: "……" is not a loop.
    """
    for period in range(1, MAX_PERIOD + 1):
        is_equal = [a == b for a, b in zip(ids, ids[period:], strict=False)]
        min_matches = 3 * period if period > 1 else 7
        if at_end:
            if len(is_equal) >= min_matches and all(is_equal[-min_matches:]):
                return True
        elif any(equal and sum(1 for _ in run) >= min_matches for equal, run in itertools.groupby(is_equal)):
            return True
    return False


def repetition_stats(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of answers, given as rows with "answer" and "finish_reason" ("length": cut off).

    Returns counts and their rates, distinct_1 to distinct_3 (None if the answers are too short), mean_length in units.
    """
    split_answers = [split_units(row["answer"]) for row in answers]
    counts = {
        "loops": sum(has_loop(answer, at_end=True) for answer in split_answers),
        "empty": sum(not row["answer"].strip() for row in answers),
        "cut_off": sum(row["finish_reason"] == "length" for row in answers),
    }
    total = max(len(answers), 1)
    return {
        "answers": len(answers),
        **{f"distinct_{n}": distinct_n(split_answers, n) for n in (1, 2, 3)},
        **counts,
        **{f"{name}_rate": count / total for name, count in counts.items()},
        "mean_length": sum(map(len, split_answers)) / total,
    }
