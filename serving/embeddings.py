"""/v1/embeddings: one vector per input, the mean of the model's last hidden states over its tokens.

    vector = mean over tokens of norm(x)        (dim,), fp32, not scaled to length 1

norm(x) is the hidden state after the final norm, which lm_head reads. A model that was trained to continue text gives
usable but modest embeddings; compare them by cosine. Inputs are computed in padded batches of bounded size, one between
two tokens of the running answers, in the engine's thread: nothing else touches the model meanwhile.
Called by app.py. Read next: engine.py (when a step is due), served.py (text to ids).
"""

import base64
import struct
from collections.abc import Iterator
from typing import Any

import torch

from model.transformer import Transformer
from serving.engine import PREFILL_TOKENS
from serving.errors import ApiError
from serving.schemas import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from serving.served import Served, TooLong


class EmbeddingJob:
    """Inputs (token ids) and their vectors, as far as they are computed. A `Job` of engine.py."""

    def __init__(self, inputs: list[list[int]]) -> None:
        self.inputs = inputs
        self.vectors: list[list[float]] = [[] for _ in inputs]
        self.batches = list(batches_of(inputs))
        self.inbox: Any = None
        self.gone = False

    @torch.inference_mode()
    def step(self, model: Transformer) -> bool:
        """Compute the next batch; returns whether it was the last."""
        batch = self.batches.pop()
        rows = [torch.tensor(self.inputs[i]) for i in batch]
        # Padding on the right needs no mask: no token sees what comes after it. Which id it is does not matter.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.lm_head.weight.device)
        hidden, _ = model(ids)
        for i, states, row in zip(batch, hidden, rows, strict=True):
            self.vectors[i] = states[: len(row)].float().mean(0).tolist()
        return not self.batches


def batches_of(inputs: list[list[int]]) -> Iterator[list[int]]:
    """Indices of inputs of similar length, at most PREFILL_TOKENS tokens together, padding included; a longer input
    is a batch of its own."""
    batch: list[int] = []
    for i in sorted(range(len(inputs)), key=lambda i: len(inputs[i])):
        if batch and len(inputs[i]) * (len(batch) + 1) > PREFILL_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def embedding_job(body: EmbeddingRequest, served: Served) -> EmbeddingJob:
    """Checked and tokenised. Raises ApiError 400 for an input that is too long or has unknown ids."""
    given: Any = body.input
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    found = []
    for i, each in enumerate(inputs):
        try:
            found.append(served.text_ids(each, answered=False))
        except TooLong as error:
            raise ApiError(400, f"input {i}: {error}", "input", "context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, f"input {i}: {error}", "input") from None
    return EmbeddingJob(found)


def embedding_list(body: EmbeddingRequest, served: Served, job: EmbeddingJob) -> str:
    """The JSON of a finished job."""
    tokens = sum(map(len, job.inputs))
    packed = body.encoding_format == "base64"
    data = [Embedding(index=i, embedding=pack(v) if packed else v) for i, v in enumerate(job.vectors)]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return EmbeddingList(data=data, model=served.name, usage=usage).model_dump_json()


def pack(vector: list[float]) -> str:
    """Little-endian fp32 in base64, as OpenAI's clients unpack it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
