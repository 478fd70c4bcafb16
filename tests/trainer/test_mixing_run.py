"""A run with a two-stage mixture that is killed before or after the switch ends with the same weights."""

import json

import pytest
import torch

from common.errors import UserError
from corpus.mixing import parse_mix
from tests.helpers import EXACT_FLAGS, TINY_MODEL_FLAGS, load_weights, read_jsonl, run_script
from tests.trainer.test_resume import stop_after
from trainer.config import MixFlags
from trainer.datasets import MicroBatches
from trainer.mixing import MixedDataset, read_mix_schedule

STAGES = ["--mix", "zh=0.2,en=0.8", "--stage2_mix", "zh=0.9,en=0.1", "--stage2_at", "0.6"]


@pytest.fixture(scope="module")
def mixed_dir(tokenizer, tmp_path_factory):
    """About 60 rows of each language, as data_process.py pretrain writes them."""
    from corpus.data_config import PretrainDataConfig
    from corpus.prepare_text import prepare_text
    from corpus.stats import DataStats

    folder = tmp_path_factory.mktemp("mixed")
    texts = [f"第{i}天太阳出来了" for i in range(80)] + [f"on day {i} the sun came up" for i in range(80)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = PretrainDataConfig((folder / "a.jsonl",), out_dir=folder / "pretrain", val_fraction=0.05)
    prepare_text(config, tokenizer, DataStats())
    return folder / "pretrain"


@pytest.fixture
def pretrain(monkeypatch, mixed_dir, tokenizer_dir, tmp_path):
    def run(name, *flags):
        common = [*TINY_MODEL_FLAGS, *EXACT_FLAGS, "--max_steps", 20, "--batch_size", 4, "--data_path", mixed_dir]
        out = tmp_path / name
        run_script(monkeypatch, "1-pretrain.py", *common, "--tokenizer", tokenizer_dir, "--out_dir", out, *flags)
        return out

    return run


def test_mix_switch_is_printed_and_exact_under_resume(monkeypatch, pretrain, capsys):
    whole = pretrain("whole", *STAGES)
    said = capsys.readouterr().out
    assert "stage 2 begins at step 13 of 20" in said and "stage 2 begins at step 13: zh 90.0%, en 10.0%" in said
    rows = [row for row in read_jsonl(whole / "pretrain_32.jsonl") if "mix" in row]
    assert [row["mix"]["stage"] for row in rows] == [1] * 12 + [2] * 8
    tokens = [row["mix"]["tokens"] for row in rows]
    assert sum(tokens[-1].values()) == 20 * 4 * 32
    share = {name: tokens[11][name] / sum(tokens[11].values()) for name in tokens[11]}
    assert share == pytest.approx({"zh": 0.2, "en": 0.8}, abs=0.05)
    entry = torch.load(whole / "pretrain_32.pth", weights_only=True)["lineage"][-1]
    assert entry["mix"] == {"zh": 0.2, "en": 0.8} and entry["stage2_at"] == 0.6

    for killed_at in (5, 12, 16):  # before, at and after the switch
        with monkeypatch.context() as patch:
            stop_after(patch, killed_at)
            out = pretrain(f"killed{killed_at}", *STAGES)
        assert (out / "pretrain_32.resume").exists()
        pretrain(f"killed{killed_at}", *STAGES)
        for name, tensor in load_weights(whole / "pretrain_32.pth").items():
            assert torch.equal(tensor, load_weights(out / "pretrain_32.pth")[name]), (killed_at, name)


def test_run_does_not_resume_with_another_mix(monkeypatch, pretrain):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        pretrain("out", *STAGES)
    for flags in ((), ("--mix", "zh=0.3,en=0.7"), (*STAGES[:5], "0.5"), (*STAGES, "--max_steps", 30)):
        with pytest.raises(UserError, match="--mix was"):
            pretrain("out", *flags)


def test_two_processes_train_the_rows_of_one(pretrain, mixed_dir):
    schedule = read_mix_schedule(str(mixed_dir), MixFlags(parse_mix("zh=0.25,en=0.75")), max_steps=30)
    data = MixedDataset(str(mixed_dir), schedule, 32)
    sampler = data.batch_sampler(8, seed=42)
    for step in (0, 7, 29):
        one = [row for batch in MicroBatches(data, sampler, 8, 0, 1)[step] for row in batch["row_ids"].tolist()]
        both = [
            row
            for rank in (0, 1)
            for batch in MicroBatches(data, sampler, 2, rank, 2)[step]
            for row in batch["row_ids"].tolist()
        ]
        assert sorted(one) == sorted(both)


def test_minutes_read_the_languages_by_a_power_of_their_tokens(monkeypatch, pretrain):
    """Without --mix; with it the run keeps the given mixture."""
    monkeypatch.setattr("time.process_time", lambda: 0.0)  # what the tests before have used
    monkeypatch.setattr("trainer.timed_run.measure_step", lambda *given: 10.0)
    zh = 1814**0.3 / (1814**0.3 + 1888**0.3)  # the tokens of the two languages
    cases = ("balanced", (), {"en": 1 - zh, "zh": zh}), ("given", STAGES[:2], {"zh": 0.2, "en": 0.8})
    for name, flags, mix in cases:
        out = pretrain(name, "--max_steps", 0, "--minutes", 2, *flags)
        entry = torch.load(out / "pretrain_32.pth", weights_only=True)["lineage"][-1]
        assert entry["mix"] == pytest.approx(mix, abs=1e-6)
