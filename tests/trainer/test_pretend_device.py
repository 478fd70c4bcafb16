"""The code of training, validation and generation on a pretend accelerator (pretend_device.py): what a GPU would do."""

import json
import sys

import pytest

from tests.helpers import run_process
from tests.trainer.pretend_device import SAMPLING, STAGES

# Kernels of a step of two micro-batches through one layer: at most.
LAUNCHES = {
    "pretrain muon": 640, "moe muon": 1075, "sft muon": 640, "lora muon": 855, "dpo muon": 830,
    "grpo muon": 730,
    "pretrain adamw": 475, "moe adamw": 890, "sft adamw": 475, "lora adamw": 535, "dpo adamw": 670,
    "grpo adamw": 575,
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tokenizer_dir):
    result = run_process(sys.executable, "-m", "tests.trainer.pretend_device", tokenizer_dir)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_stays_on_the_device(jobs, name):
    """A host read makes the GPU idle; a launch costs the host 4 to 7 microseconds."""
    job = jobs[f"step {name}"]
    assert not job["error"]
    assert job["reads"] == {}
    assert job["launches"] <= LAUNCHES[name]


@pytest.mark.parametrize("name", [*(f"evaluate {stage}" for stage in STAGES), *(f"generate {how}" for how in SAMPLING)])
def test_no_cpu_tensor_meets_a_device_tensor(jobs, name):
    assert not jobs[name]["error"]
    assert jobs[name]["launches"] > 50, "the job must run on the device"


def test_a_cpu_batch_is_noticed(jobs):
    assert "at least two devices" in jobs["mixed devices"]["error"]
