"""Exercise of chapter 10: the distribution of the next token under several temperatures, and the KV cache.

    python -m docs.course.generation
    python -m docs.course.generation --prompt "The opposite of hot is" --temperature 0.7

Read next: ../../model/sampling.py, ../../model/generate.py.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.cli import flag, parse
from common.errors import fail_in_one_line
from common.flag_types import positive_float
from docs.course.exercise import ExerciseConfig, open_demo, save_picture
from model.generate import generate
from model.sampling import SamplingParams, filter_logits
from model.tokenizer import ChatTokenizer
from model.transformer import KVCache, Transformer

TEMPERATURES, SHOWN, LENGTH = (0.5, 1.0, 2.0), 8, 120


@dataclass(frozen=True)
class GenerationConfig(ExerciseConfig):
    prompt: str = flag("The capital of", "text to continue")
    temperature: float = flag(1.0, "of the three sampled continuations", type=positive_float)


def time_steps(model: Transformer, ids: list[int], cached: bool) -> list[float]:
    """Return the milliseconds of CPU time of each new token, with a KV cache or with the whole text read again."""
    cache = KVCache(model.config, 1, LENGTH, torch.device("cpu"), torch.float32) if cached else None
    new, times = list(ids), []
    tokens = torch.tensor([new])
    while len(new) < LENGTH:
        started = time.process_time()
        new.append(int(model.logits(tokens, cache)[0, -1].argmax()))
        times.append(1000 * (time.process_time() - started))
        tokens = torch.tensor([new[-1:]]) if cached else torch.tensor([new])
    return times


def print_continuations(model: Transformer, tokenizer: ChatTokenizer, config: GenerationConfig) -> None:
    ids = tokenizer.encode(config.prompt)
    for temperature in (0.0, config.temperature):
        settings = SamplingParams(temperature, max_new_tokens=10, seed=0)
        for completion in generate(model, [ids] * (3 if temperature else 1), settings, tokenizer):
            print(f"sampled at temperature {temperature:g}: {config.prompt + completion.text!r}")


def next_logits(model: Transformer, ids: list[int]) -> Tensor:
    return model.logits(torch.tensor([ids]))[0, -1]


@torch.no_grad()
def main() -> None:
    config = parse(GenerationConfig, __doc__)
    torch.set_num_threads(1)  # CPU time is then the time on a quiet core
    model, tokenizer = open_demo(config, "pretrain")
    ids = tokenizer.encode(config.prompt)
    logits = next_logits(model, ids)
    best = logits.topk(SHOWN).indices
    pieces = [tokenizer.decode([int(i)]) for i in best]
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    for shift, temperature in enumerate(TEMPERATURES):
        probabilities = (logits / temperature).softmax(-1)
        kept = filter_logits(logits[None] / temperature, SamplingParams(top_p=0.9))[0].isfinite().sum()
        shown = ", ".join(f"{piece!r} {probabilities[i]:.1%}" for piece, i in zip(pieces[:4], best, strict=False))
        print(f"temperature {temperature}: {shown}; top-p 0.9 keeps {kept} of {len(logits)} tokens")
        places = np.arange(SHOWN) + 0.27 * (shift - 1)
        left.bar(places, probabilities[best].numpy(), 0.27, label=f"temperature {temperature:g}")
    left.set_xticks(range(SHOWN), pieces, rotation=45)
    left.set_ylabel("probability of the next token")
    print_continuations(model, tokenizer, config)
    time_steps(model, ids, True)  # the first run allocates memory
    for cached in (False, True):
        times = time_steps(model, ids, cached)
        label = "with a KV cache" if cached else "the whole text read again"
        print(f"{label}: {sum(times):.0f} ms for {len(times)} tokens")
        right.plot(range(len(ids), LENGTH), times, label=label, linewidth=1)
    right.set_xlabel("tokens before the new one")
    right.set_ylabel("ms per new token")
    right.set_ylim(0)
    for axes in (left, right):
        axes.legend()
    save_picture(config, figure, "10-generation")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
