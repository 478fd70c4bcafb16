"""Beam search for one prompt; generates the same tokens as transformers' generate(num_beams=k, do_sample=False, ...).

    score(beam)   = sum of the log-probabilities of its tokens, after penalties (sampling.py)
    step          : rank all continuations of all beams by score; those that end with a stop token become finished
                    answers, the k best others become the next beams
    final score   = score / length ** length_penalty; length includes the stop token
    end           : at max_length, or when k answers are finished and the worst of them scores at least as high as the
                    best beam at its current length (early_stopping=False of transformers)

Graves 2012 (arXiv:1211.3711), algorithm 1; length penalty and end condition as in GenerationMixin._beam_search of
transformers. As there, penalties apply to log_softmax(logits) over the whole vocabulary, which is never positive.
Called by generate.py (DecodeBatch), which stores the keys and values of each beam. Read next: generate.py.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

INACTIVE_SCORE = -1e9  # initial score of all beams but the first, which are copies of it


class BeamSearch:
    """The running beams and the finished answers of one prompt."""

    def __init__(self, num_beams: int, max_length: int, length_penalty: float, stop_ids: Collection[int]) -> None:
        """`max_length`: maximum number of tokens of an answer, including the stop token; at least 1."""
        self.num_beams, self.max_length = num_beams, max_length
        self.length_penalty, self.stop_ids = length_penalty, stop_ids
        self.scores = [0.0] + [INACTIVE_SCORE] * (num_beams - 1)
        self.ids: list[list[int]] = [[] for _ in range(num_beams)]
        self.length = 0  # tokens of each beam
        self.finished: list[tuple[float, list[int]]] = []  # (final score, ids with the stop token), best first
        self.done = False

    def advance(self, log_probs: Tensor) -> tuple[list[int], list[int]]:
        """log_probs (beams, vocab) of the next token -> (parents, tokens): new beam i is beam parents[i] + tokens[i].

        A token with -inf is never selected. Sets `done` when the search has ended: the lists are then empty, and `best`
        holds the answer.
        """
        num_beams, vocab = log_probs.shape
        totals = log_probs + torch.tensor(self.scores, device=log_probs.device)[:, None]
        # Each beam can end with each stop token, so this many candidates include k that do not end.
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
        running += [(-math.inf, *running[0][1:])] * (num_beams - len(running))  # fewer than k allowed tokens
        self.scores = [score for score, _, _ in running]
        self.ids = [[*self.ids[parent], token] for _, parent, token in running]
        return [parent for _, parent, _ in running], [token for _, _, token in running]

    def _cannot_improve(self, score: float) -> bool:
        """Whether k answers are finished and a beam with this score cannot beat the worst of them."""
        best_possible = score / self.length**self.length_penalty
        return len(self.finished) == self.num_beams and best_possible <= self.finished[-1][0]

    @property
    def best(self) -> list[int]:
        """Ids of the best finished answer, including its stop token if it has one."""
        return self.finished[0][1]
