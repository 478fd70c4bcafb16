"""Train transformers' LlamaForCausalLM, compiled or plain; the GPU is waited for only around the timed steps.

    python -m benchmarks.peer_cases.llama_throughput SPEC compile|plain

The second half of the steps is timed. plain_loop.py, which compares single steps, waits after each one: on a fast GPU
that hides the speed that a run reaches.
Read next: transformers_llama.py (the model), ../gpu.py (the table).
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.peer_cases.plain_loop import gpu_memory, token_rows, wait_for
from benchmarks.peer_cases.transformers_llama import llama_loss, make_llama
from benchmarks.train_spec import TrainSpec


def main() -> None:
    spec, kind = TrainSpec.from_json(sys.argv[1]), sys.argv[2]
    torch.set_float32_matmul_precision("high")
    llama: nn.Module = make_llama(spec.model)
    model = llama.to(spec.device).train()
    if kind == "compile":
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    wait, dtype, start, warmup = wait_for(spec.device), getattr(torch, spec.dtype), 0.0, spec.steps // 2
    stored_steps = Path(spec.tokens).stat().st_size // 2 // (spec.batch_size * spec.seq_len + 1)
    for step in range(spec.steps):
        if step == warmup:
            wait()
            start = time.perf_counter()
        ids, labels = (tensor.to(spec.device, non_blocking=True) for tensor in token_rows(spec, step % stored_steps))
        with torch.autocast(spec.device, dtype, enabled=dtype != torch.float32):
            loss = llama_loss(model, ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait()
    tokens = (spec.steps - warmup) * spec.batch_size * spec.seq_len
    memory = gpu_memory(spec.device) / 2**20
    numbers = {"tokens_per_second": tokens / (time.perf_counter() - start), "final_loss": loss.item()}
    print(json.dumps(numbers | ({"peak_memory_mb": memory} if memory else {})))


if __name__ == "__main__":
    main()
