"""The training loop of peers without one of their own: autocast, backward, clipping, fused AdamW.

Runs in the environment of a peer: imports torch and train_spec.py, nothing else of this project.
Read next: transformers_llama.py, litgpt_gpt.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.train_spec import StepTimes, TrainSpec, print_result

LossFunction = Callable[
    [nn.Module, Tensor, Tensor], Tensor
]  # model, input_ids, labels (both (batch, seq)) -> mean loss


def token_rows(spec: TrainSpec, step: int) -> tuple[Tensor, Tensor]:
    """Return the input ids and the labels of a step, (batch, seq), int64; labels are the ids shifted by one."""
    stream = np.memmap(spec.tokens, dtype="<u2", mode="r")
    size = spec.batch_size * spec.seq_len
    ids = torch.from_numpy(stream[step * size : (step + 1) * size + 1].astype(np.int64))
    shape = (spec.batch_size, spec.seq_len)
    return ids[:-1].view(shape), ids[1:].view(shape)


def wait_for(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def gpu_memory(device: str) -> float:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def run_plain_loop(spec: TrainSpec, model: nn.Module, loss_function: LossFunction) -> None:
    """Train for the steps of the spec and print the result."""
    model.to(spec.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    times, first_loss = StepTimes(wait_for(spec.device)), 0.0
    for step in range(spec.all_steps):
        ids, labels = (tensor.to(spec.device) for tensor in token_rows(spec, step))
        with torch.autocast(spec.device, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            loss = loss_function(model, ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        first_loss = first_loss or loss.item()
        times.end_step()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print_result(spec, times, first_loss, parameters, gpu_memory(spec.device))
