"""Promise: the closing of the demo names the stages that were cut short."""

from demo_world.report import stages_cut_short
from model.checkpoint import save_model
from tests.helpers import tiny_model


def test_stages_that_ended_early_are_named(tmp_path, tokenizer):
    entries = {"pretrain": {}, "full_sft": {}, "dpo": {"stopped": "log p fell"}}
    for stage, entry in entries.items():
        save_model(tmp_path / f"{stage}_32.pth", tiny_model(), stage, tokenizer, [{"stage": stage, **entry}])
    (tmp_path / "full_sft_32.resume").mkdir()
    logs = {stage: {"steps": 1200} for stage in entries}
    assert stages_cut_short(tmp_path, 32, logs) == {
        "full_sft": "a time limit, after 1,200 steps",
        "dpo": "log p fell (after 1,200 steps)",
    }
