"""transformers' generate with its KV cache as a program of ../decoding.py, on this project's exported folder.

    python -m benchmarks.peer_cases.transformers_generate FOLDER --dtype float32|bfloat16 --rows 1,16 --device cpu

Needs torch and transformers only. Read next: ../decoding.py, which lists the numbers.
"""

import json
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.decoding import DecodingConfig, Prompt, measure_generator
from common import cli
from common.errors import fail_in_one_line


class TransformersGenerator:
    """AutoModelForCausalLM with greedy decoding and no stop token."""

    def __init__(self, config: DecodingConfig) -> None:
        dtype = getattr(torch, config.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(config.folder / "hf", dtype=dtype)  # nosec B615
        self.model: Any = model.to(config.device).eval()
        self.model.generation_config.eos_token_id = None
        weights = [p for name, p in self.model.named_parameters() if p.dim() > 1]
        tied = self.model.config.tie_word_embeddings
        embedding = 0 if tied else self.model.get_input_embeddings().weight.numel()
        self.weight_bytes = (sum(p.numel() for p in weights) - embedding) * dtype.itemsize

    def generate(self, prompts: list[Prompt], new_tokens: int, streamer: Any = None) -> None:
        ids = torch.tensor(prompts, device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=streamer,
                pad_token_id=0,
            )  # fmt: skip
        assert output.tolist() and output.shape[1] == ids.shape[1] + new_tokens

    def token_times(self, prompt: Prompt, new_tokens: int) -> list[float]:
        clock = TokenClock()
        self.generate([prompt], new_tokens, clock)
        return clock.times[1:]  # the first entry is the prompt


class TokenClock:
    """A streamer of transformers that records when tokens arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


if __name__ == "__main__":
    with fail_in_one_line():
        decoding = cli.parse(DecodingConfig, __doc__)
        torch.set_num_threads(decoding.num_threads)
        print(json.dumps(measure_generator(TransformersGenerator(decoding), decoding)))
