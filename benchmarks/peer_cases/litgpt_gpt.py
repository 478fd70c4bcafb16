"""Train litgpt's GPT of the same size, with the layers of Llama, in a plain loop.

    python -m benchmarks.peer_cases.litgpt_gpt SPEC

Runs in the environment of the peer.
Read next: plain_loop.py, ../train_spec.py.
"""

import sys
from typing import Any

import litgpt
import torch
from litgpt.utils import chunked_cross_entropy
from torch import Tensor, nn

from benchmarks.peer_cases.plain_loop import run_plain_loop
from benchmarks.train_spec import TrainSpec


def make_gpt(model: dict[str, Any]) -> nn.Module:
    """Return the model with these fields of ModelConfig, randomly initialised, in fp32."""
    config = litgpt.Config(
        block_size=model["max_seq_len"], vocab_size=model["vocab_size"], padded_vocab_size=model["vocab_size"],
        n_layer=model["n_layers"], n_head=model["n_heads"], n_query_groups=model["n_kv_heads"], n_embd=model["dim"],
        head_size=model["head_dim"], intermediate_size=model["hidden_dim"], norm_eps=model["norm_eps"],
        rope_base=int(model["rope_theta"]), rotary_percentage=1.0, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", parallel_residual=False, bias=False,
    )  # fmt: skip
    torch.manual_seed(0)
    gpt = litgpt.GPT(config)
    for module in gpt.modules():  # the initialisation of litgpt's pretraining: torch's default is for other models
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    if model["tie_embeddings"]:
        gpt.lm_head.weight = gpt.transformer.wte.weight
    return gpt


def gpt_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = chunked_cross_entropy(model(ids), labels, chunk_size=0)
    return loss


if __name__ == "__main__":
    spec = TrainSpec.from_json(sys.argv[1])
    run_plain_loop(spec, make_gpt(spec.model), gpt_loss)
