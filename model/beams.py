"""Beam search over one prompt: the same tokens as transformers' generate(num_beams=k, do_sample=False, ...).

    score(beam)   = sum of its tokens' log-probabilities, after penalties (sampling.py)
    a step        : of all tokens of all beams, those with the best scores; one that ends an answer goes to the finished
                    ones, the k best others are the next beams
    final score   = score / length ** length_penalty, where the length counts the stop token
    ends          : at the longest answer, or with k finished answers of which the worst is no worse than the best beam
                    at its present length (transformers' early_stopping=False)

Graves 2012 (arXiv:1211.3711), algorithm 1; the length penalty and the end as in GenerationMixin._beam_search of
transformers. There the scores of a step are log_softmax(logits) over the whole vocabulary, then the logits processors:
a repetition penalty acts on log-probabilities, which are never positive.
Called by generate.py (DecodeBatch), which holds the keys and values of each beam. Read next: generate.py.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

INACTIVE_SCORE = -1e9  # first score of all beams but one: they hold the same prompt, and only one of them counts


class BeamSearch:
    """The beams of one prompt, and the answers that they have finished."""

    def __init__(self, num_beams: int, max_length: int, length_penalty: float, stop_ids: Collection[int]) -> None:
        """`max_length`: tokens that an answer may have, at least 1, the stop token included."""
        self.num_beams, self.max_length, self.length_penalty, self.stop_ids = (
            num_beams,
            max_length,
            length_penalty,
            stop_ids,
        )
        self.scores = [0.0] + [INACTIVE_SCORE] * (num_beams - 1)
        self.ids: list[list[int]] = [[] for _ in range(num_beams)]
        self.length = 0  # tokens of each beam
        self.finished: list[tuple[float, list[int]]] = []  # (final score, ids with the stop token), best first
        self.done = False

    def advance(self, log_probs: Tensor) -> tuple[list[int], list[int]]:
        """log_probs (beams, vocab) of the next token -> for each new beam: which beam it continues, with which token.

        -inf rules a token out. Once `done` is set the new beams have no meaning, and `best` is the answer.
        """
        num_beams, vocab = log_probs.shape
        totals = log_probs + torch.tensor(self.scores, device=log_probs.device)[:, None]
        # Each beam can end with each stop token: so many candidates hold k that do not end.
        count = min(num_beams * (1 + len(self.stop_ids)), totals.numel())
        values, indices = (tensor.tolist() for tensor in totals.flatten().topk(count))
        self.length += 1
        running: list[tuple[float, int, int]] = []
        for rank, (score, index) in enumerate(zip(values, indices, strict=True)):
            if score == -math.inf:
                break
            parent, token = divmod(index, vocab)
            is_finished = token in self.stop_ids or self.length == self.max_length
            if is_finished and rank < num_beams:
                self.finished.append((score / self.length**self.length_penalty, [*self.ids[parent], token]))
            elif not is_finished and len(running) < num_beams:
                running.append((score, parent, token))
        self.finished = sorted(self.finished, key=lambda entry: -entry[0])[:num_beams]
        if not running or self._cannot_improve(running[0][0]):
            self.done = True
            return [], []
        running += [(-math.inf, *running[0][1:])] * (num_beams - len(running))  # too few tokens are allowed
        self.scores = [score for score, _, _ in running]
        self.ids = [[*self.ids[parent], token] for _, parent, token in running]
        return [parent for _, parent, _ in running], [token for _, _, token in running]

    def _cannot_improve(self, score: float) -> bool:
        """Whether k answers are finished, and a beam of this score would not beat the worst of them now."""
        best_possible = score / self.length**self.length_penalty
        return len(self.finished) == self.num_beams and best_possible <= self.finished[-1][0]

    @property
    def best(self) -> list[int]:
        """The ids of the best finished answer, with its stop token where it has one."""
        return self.finished[0][1]
