"""benchmarks/rollouts.py: both programs read the same prompts and weights, and count tokens up to the stop token."""

import dataclasses
import json

import pytest

import data_process
from benchmarks.peer_cases import transformers_rollouts
from benchmarks.rollout_case import RolloutCase, prepare, sample_ours
from benchmarks.rollout_settings import REPEATS, measure
from common.errors import UserError
from tests.helpers import save_scripted_model, write_rows


@pytest.fixture(scope="module")
def case(tmp_path_factory, tokenizer):
    """Six prompts, of which three are used; the model answers each with "one two" and its stop token."""
    folder = tmp_path_factory.mktemp("rollouts")
    rows = [{"question": f"number {'n' * i} {i}?", "answer": str(i)} for i in range(6)]
    file = write_rows(folder / "rows.jsonl", rows)
    data_process.main(["rl", str(file), "--out_dir", str(folder / "rl"), "--val_fraction", "0"])
    checkpoint = save_scripted_model(folder / "model.pth", tokenizer, ["one", " two"])
    case = RolloutCase(folder, 2, 8, True, str(checkpoint), True, str(folder / "rl"), 3)
    assert prepare(case) == {"prompts": 3}
    return case


@pytest.mark.parametrize("program", [sample_ours, transformers_rollouts.rollouts])
def test_answers_end_at_their_stop_token_or_at_the_limit(program, case):
    numbers = program(case)
    assert numbers["mean_length"] == 3 and numbers["tokens_per_second"] > 0
    assert program(dataclasses.replace(case, stop=False))["mean_length"] == 8


def test_prompts_have_different_lengths_and_more_than_there_are_is_an_error(case, tmp_path):
    prompts = json.loads((case.folder / "prompts.json").read_text())
    assert len({len(prompt) for prompt in prompts}) == 3
    with pytest.raises(UserError, match="6 prompts, --prompts 7"):
        prepare(dataclasses.replace(case, prompts=7, folder=tmp_path))


def test_the_first_batch_is_not_counted():
    seeds = []
    numbers = measure(lambda seed: seeds.append(seed) or [4, 6] * bool(seed))
    assert seeds == [*range(REPEATS + 1)] and numbers["mean_length"] == 5
