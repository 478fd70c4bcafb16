"""Exercise of chapter 2: nearest neighbours among the embeddings, and which tokens attention reads.

    python -m docs.course.attention
    python -m docs.course.attention --text "A dog is a mammal. A frog is an"

Computes softmax(q k^T / sqrt(head_dim)) of every head from the weights of the demo's SFT model.
Read next: ../../model/transformer.py (Attention), ../../model/rope.py.
"""

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.cli import flag, parse
from common.errors import fail_in_one_line
from docs.course.exercise import ExerciseConfig, open_demo, save_picture
from model.rope import apply_rope
from model.transformer import Attention, Transformer

WORDS = (" Tokyo", " mammal", " seven", "东京", "红色")


@dataclass(frozen=True)
class AttentionConfig(ExerciseConfig):
    text: str = flag("The capital of Japan is Tokyo. The capital of France is", "text to read")
    layer: int = flag(2, "layer to draw, from 0")


def attention_weights(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the weights (heads, seq, seq) of one layer for its normalised input x (1, seq, dim)."""
    shape = (*x.shape[:2], -1, attention.config.head_dim)
    q = apply_rope(attention.q_norm(attention.q_proj(x).view(shape)).transpose(1, 2), cos, sin)
    k = apply_rope(attention.k_norm(attention.k_proj(x).view(shape)).transpose(1, 2), cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # query heads share a key head
    scores = q @ k.transpose(-1, -2) / math.sqrt(attention.config.head_dim)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)[0]


def all_weights(model: Transformer, ids: list[int]) -> list[Tensor]:
    """Return the attention weights of every layer, each (heads, seq, seq)."""
    found: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda module, inputs: found.append(
            attention_weights(module, *inputs[:3])))  # fmt: skip
    model(torch.tensor([ids]))
    return found


@torch.no_grad()
def main() -> None:
    config = parse(AttentionConfig, __doc__)
    model, tokenizer = open_demo(config, "pretrain")
    table = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
    print(f"embedding matrix: {tuple(table.shape)}")
    for word in WORDS:
        ids = tokenizer.encode(word)
        if len(ids) == 1:
            near = (table @ table[ids[0]]).topk(6)
            shown = [f"{tokenizer.decode([int(i)])!r} {value:.2f}" for value, i in zip(*near, strict=True)][1:]
            print(f"nearest to {word!r}: {', '.join(shown)}")
    ids = tokenizer.encode(config.text)
    pieces = [tokenizer.decode([i]) for i in ids]
    weights = all_weights(model, ids)
    for number, heads in enumerate(weights):
        for head, row in enumerate(heads[:, -1]):
            best = int(row.argmax())
            print(f"layer {number}, head {head}: the last token reads {pieces[best]!r} most, {row[best]:.0%}")
    figure = Figure(figsize=(11, 3.4))
    for head, axes in enumerate(figure.subplots(1, len(weights[config.layer]), sharey=True)):
        axes.imshow(weights[config.layer][head].numpy(), vmin=0, vmax=1, cmap="Blues")
        axes.set_title(f"layer {config.layer}, head {head}", fontsize=9)
        axes.set_xticks(range(len(pieces)), pieces, rotation=90, fontsize=8)
        axes.set_yticks(range(len(pieces)), pieces, fontsize=8)
    save_picture(config, figure, "02-embedding-and-attention")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
