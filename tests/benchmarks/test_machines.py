"""What fits on which machine, and what does not."""

from benchmarks.machines import MACHINES, bounds
from model.config import PRESETS, ModelConfig


def test_what_bounds_which_machine():
    for preset in ("small", "base", "mindllm-1.3b"):
        for machine in MACHINES:
            found = bounds(ModelConfig(**PRESETS[preset]), machine, 2**19, 0.4)
            assert found.fits and found.memory <= machine.gpu.memory * 1e9
    assert not bounds(ModelConfig(**PRESETS["xiangxin-3b"]), MACHINES[0], 2**19, 0.4).fits
