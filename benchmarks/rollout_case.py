"""This project's rollouts as a program of rollouts.py, and its inputs.

    python -m benchmarks.rollout_case FOLDER --checkpoint FILE --data_path DIR --prepare       writes hf/, prompts.json
    python -m benchmarks.rollout_case FOLDER --checkpoint FILE --group_size 8 --max_new_tokens 64

Read next: rollout_settings.py (what is measured), ../trainer/rollout.py.
"""

import json
from dataclasses import dataclass

import torch

from benchmarks.rollout_settings import RolloutSettings, measure
from common import cli
from common.cli import flag
from common.device import keep_freed_memory
from common.errors import UserError, fail_in_one_line
from common.files import write_json
from common.flag_types import path_string, positive_int
from corpus.prompt_data import read_prompts
from evaluation.tools import find_tools
from export.hf_export import write_hf_folder
from model.checkpoint import load_model
from model.sampling import SamplingParams
from trainer.rollout import Answer, Tools, answer_seed, offer_tools, sample_answers


@dataclass(frozen=True)
class RolloutCase(RolloutSettings):
    """The command line."""

    checkpoint: str = flag("", "model", type=path_string)
    prepare: bool = flag(False, "write the exported model and the prompts")
    data_path: str = flag("", "prompts", type=path_string)
    prompts: int = flag(8, "number of prompts", type=positive_int)
    tools: str = flag("", "tools whose schemas stand in the prompts, as calculator,clock")


def prepare(case: RolloutCase) -> dict[str, float]:
    """Write hf/ and prompts.json, prompts at equal distances in the file. Raises UserError if there are too few."""
    model, tokenizer, _ = load_model(case.checkpoint)
    rows = read_prompts(case.data_path, "train")
    if len(rows) < case.prompts:
        raise UserError(f"{case.data_path}: {len(rows)} prompts, --prompts {case.prompts}")
    schemas = [tool.schema for tool in find_tools(case.tools)]
    chosen = [offer_tools(row, schemas) for row in rows[:: len(rows) // case.prompts][: case.prompts]]
    write_json(case.folder / "prompts.json", [tokenizer.render(row.messages, True)[0] for row in chosen])
    (case.folder / "hf").mkdir(exist_ok=True)
    write_hf_folder(case.folder / "hf", model, tokenizer, torch.float32, 10**10)
    return {"prompts": len(chosen)}


def sample_ours(case: RolloutCase) -> dict[str, float]:
    keep_freed_memory()  # as the training does
    model, tokenizer, _ = load_model(case.checkpoint)
    prompts = json.loads((case.folder / "prompts.json").read_text(encoding="utf-8"))
    settings = SamplingParams(max_new_tokens=case.max_new_tokens, temperature=1.0)
    if not case.stop:
        tokenizer.stop_ids = []

    def sample(seed: int) -> list[int]:
        answers = [
            Answer([], prompt, answer_seed(0, seed, row, index))
            for row, prompt in enumerate(prompts)
            for index in range(case.group_size)
        ]
        sample_answers(model, tokenizer, answers, settings, Tools())
        return [answer.length for answer in answers]

    return measure(sample)


if __name__ == "__main__":
    with fail_in_one_line():
        config = cli.parse(RolloutCase, __doc__)
        print(json.dumps(prepare(config) if config.prepare else sample_ours(config)))
