"""transformers' generate as a program of ../rollouts.py: `num_return_sequences` sampled answers to each prompt.

    python -m benchmarks.peer_cases.transformers_rollouts FOLDER --group_size 8 --max_new_tokens 64

Needs torch and transformers only. Read next: ../rollout_settings.py.
"""

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.rollout_settings import RolloutSettings, measure
from common import cli
from common.errors import fail_in_one_line


def rollouts(case: RolloutSettings) -> dict[str, float]:
    model: Any = AutoModelForCausalLM.from_pretrained(case.folder / "hf", dtype=torch.float32).eval()  # nosec B615
    prompts = json.loads((case.folder / "prompts.json").read_text(encoding="utf-8"))
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    stops = model.generation_config.eos_token_id if case.stop else None
    model.generation_config.eos_token_id = stops
    stop_ids = torch.tensor([] if stops is None else stops).flatten()

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=mask, max_new_tokens=case.max_new_tokens, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, repetition_penalty=1.0, num_return_sequences=case.group_size, pad_token_id=0,
            )  # fmt: skip
        ends = torch.isin(output[:, width:], stop_ids)
        first = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.shape[1])
        return [int(length) for length in first]

    return measure(sample)


if __name__ == "__main__":
    with fail_in_one_line():
        print(json.dumps(rollouts(cli.parse(RolloutSettings, __doc__))))
