"""/v1/embeddings: one vector per input, the mean of the model's last hidden states over its tokens.

    vector = mean over tokens of norm(x)        (dim,), fp32, not normalised to length 1

norm(x) is the hidden state after the final norm, the input of lm_head. A model that was trained to continue text gives
usable but modest embeddings; compare them by cosine similarity. The engine thread computes padded batches of bounded
size, one batch between two decode steps, so only one thread uses the model.
Called by service.py. Read next: scheduler.py (when a step runs), models.py (text to ids).
"""

import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from model.transformer import Transformer
from serving.errors import ApiError
from serving.models import PromptTooLong, ServedModel
from serving.scheduler import PREFILL_TOKENS
from serving.schemas import LenientModel, TokenIds

MAX_INPUTS = 2048  # per request, as in OpenAI's API


def _reject_empty(value: Any) -> Any:
    """Raise one error for an empty input; otherwise each branch of the union would report its own."""
    if value in ("", []):
        raise PydanticCustomError("empty", "must not be empty: a text, token ids, or a list of either")
    if isinstance(value, list):
        empty = [str(i) for i, item in enumerate(value) if item in ("", [])]
        if empty:
            raise PydanticCustomError("empty", "number {numbers} is empty (counted from 0)", {"numbers": empty[0]})
        if len(value) > MAX_INPUTS and not isinstance(value[0], (int, float)):
            numbers = {"given": len(value), "most": MAX_INPUTS}
            raise PydanticCustomError("too_many", "{given} inputs in one request, at most {most}", numbers)
    return value


def _reject_dimensions(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError("dimensions", "the vectors have the model's full size only: leave this field out")
    return value


class EmbeddingRequest(LenientModel):
    model: str | None = Field(None, description="a name from /v1/models (default: the first)")
    input: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
        ]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)],
        BeforeValidator(_reject_empty),
    ]
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of little-endian fp32")
    dimensions: Annotated[None, BeforeValidator(_reject_dimensions)] = None
    user: str | None = Field(None, description="accepted and not stored")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class EmbeddingJob:
    """Inputs (token ids) and the vectors computed so far, each of shape `(dim,)`. A `Job` of scheduler.py."""

    def __init__(self, inputs: list[list[int]]) -> None:
        self.inputs = inputs
        self.vectors: dict[int, torch.Tensor] = {}
        self.batches = list(embedding_batches(inputs))
        self.inbox: Any = None
        self.aborted = False

    @torch.inference_mode()
    def step(self, model: Transformer) -> bool:
        """Compute the next batch; return whether it was the last."""
        batch = self.batches.pop()
        rows = [torch.tensor(self.inputs[i]) for i in batch]
        # Right padding needs no mask: attention is causal, so no token attends to the padding after it.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.lm_head.weight.device)
        hidden, _ = model(ids)
        for i, states, row in zip(batch, hidden, rows, strict=True):
            self.vectors[i] = states[: len(row)].float().mean(0).cpu()
        return not self.batches


def embedding_batches(inputs: list[list[int]]) -> Iterator[list[int]]:
    """Batches of indices of inputs of similar length, at most PREFILL_TOKENS tokens each, padding included.

    A longer input is a batch of its own.
    """
    batch: list[int] = []
    for i in sorted(range(len(inputs)), key=lambda i: len(inputs[i])):
        if batch and len(inputs[i]) * (len(batch) + 1) > PREFILL_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    yield batch


class EmbeddingResponse:
    """The response of one HTTP request, once its job has run. Raises ApiError 400 for an input that is too long."""

    def __init__(self, served: ServedModel, headers: dict[str, str], body: EmbeddingRequest) -> None:
        given: Any = body.input
        inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        token_ids = []
        for i, text_or_ids in enumerate(inputs):
            try:
                token_ids.append(served.text_ids(text_or_ids, with_answer=False))
            except PromptTooLong as error:
                raise ApiError(400, f"input {i}: {error}", "input", "context_length_exceeded") from None
            except ValueError as error:  # unknown ids
                raise ApiError(400, f"input {i}: {error}", "input") from None
        self.served, self.headers, self.as_base64 = served, headers, body.encoding_format == "base64"
        self.job = EmbeddingJob(token_ids)
        self.work = [self.job]

    def body(self) -> str:
        tokens = sum(map(len, self.job.inputs))
        data = []
        for i in range(len(self.job.inputs)):
            vector = self.job.vectors[i]
            data.append(Embedding(index=i, embedding=encode_base64(vector) if self.as_base64 else vector.tolist()))
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        return EmbeddingList(data=data, model=self.served.name, usage=usage).model_dump_json()


def encode_base64(vector: torch.Tensor) -> str:
    """Little-endian fp32 in base64, as OpenAI's clients expect."""
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
