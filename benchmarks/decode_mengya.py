"""This project's generation as a program of decoding.py: ChatModel.generate and .stream, which all front ends use.

    python -m benchmarks.decode_mengya FOLDER --dtype float32|bfloat16|int8 --rows 1,16 --device cpu

int8: int8 weights (--quantize int8); prompts in bf16.

Read next: decoding.py (the numbers), ../evaluation/chat_model.py.
"""

import json
import time

import torch

from benchmarks.decoding import DecodingConfig, Prompt, measure_generator
from common import cli
from common.device import pick_device, pick_dtype
from common.errors import fail_in_one_line
from evaluation.chat_model import open_chat_model
from model.completion import Completion
from model.parameters import count_parameters
from model.sampling import SamplingParams


class MengyaGenerator:
    """A model opened as by 2-eval.py and the server."""

    def __init__(self, config: DecodingConfig) -> None:
        device, is_int8 = pick_device(config.device), config.dtype == "int8"
        dtype, quantize = pick_dtype("bfloat16" if is_int8 else config.dtype, device), "int8" if is_int8 else "none"
        self.chat_model = open_chat_model(config.folder / "model.pth", device, dtype, quantize=quantize)
        matrices = count_parameters(self.chat_model.model.config).matmul
        self.weight_bytes = matrices * (1 if is_int8 else dtype.itemsize)

    def generate(self, prompts: list[Prompt], new_tokens: int) -> None:
        completions = self.chat_model.generate(prompts, SamplingParams(max_new_tokens=new_tokens))
        assert all(len(completion.ids) == new_tokens for completion in completions), "a row has ended early"

    def token_times(self, prompt: Prompt, new_tokens: int) -> list[float]:
        """A piece of text may need several tokens: they share its time equally."""
        completion, times = Completion(), [time.perf_counter()]
        for _ in self.chat_model.stream(prompt, SamplingParams(max_new_tokens=new_tokens), completion):
            last, now, count = times[-1], time.perf_counter(), len(completion.ids) + 1 - len(times)
            times += [last + (now - last) * (i + 1) / count for i in range(count)]
        return times[1:]


if __name__ == "__main__":
    with fail_in_one_line():
        decoding = cli.parse(DecodingConfig, __doc__)
        torch.set_num_threads(decoding.num_threads)
        print(json.dumps(measure_generator(MengyaGenerator(decoding), decoding)))
