"""The experiments: an arm without a change equals the script, and each change does what it says."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import training
from experiments.__main__ import EXPERIMENTS
from experiments.catalogue import SENTENCES, chosen_experiments
from experiments.dpo_no_reference import forget_reference
from experiments.no_rmsnorm import remove_norms
from experiments.no_rope import remove_rope
from experiments.padding import PaddedDocuments, pad_documents, sort_documents
from experiments.pictures import compared, span
from experiments.shifted_mask import shift_masks, shifted
from experiments.training import QUIET, SMALL_MODEL
from experiments.wrong_accumulation import accumulate_means, unsort
from model.transformer import RMSNorm
from tests.helpers import one_line_error, run_here, run_script, visible_names
from trainer.loss import IGNORE_INDEX

TINY = SMALL_MODEL + " --dim 16 --n_layers 1 --device cpu --dtype float32"


def first_stage(space, script, flags, change=None):
    """The Stage of an arm before its first step, and the arm."""
    seen = []

    def keep(stage):
        if change:
            change(stage)
        stage.initial = {name: weight.clone() for name, weight in stage.model.state_dict().items()}
        seen.append(stage)

    arm = space.train(script, flags, 0, keep)
    return seen[0], arm


# ---- names -----------------------------------------------------------------------------------------------------------
def test_every_experiment_is_listed_with_a_sentence():
    assert list(EXPERIMENTS) == list(SENTENCES) == chosen_experiments("all")


def test_an_unknown_name_gets_one_line_with_the_nearest_name():
    with one_line_error("no_rop ", "did you mean no_rope?", "--experiment list"):
        chosen_experiments("no_rop")


def test_demo_lists_the_experiments(monkeypatch, capsys):
    done = run_here(monkeypatch, capsys, "demo.py", "--experiment", "list")
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == list(SENTENCES)


def test_demo_runs_an_experiment_on_data_that_exists(folders, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr("subprocess.Popen", lambda command, **_: commands.append(command) or Done())
    demo, _ = folders
    done = run_here(monkeypatch, capsys, "demo.py", "--experiment", "no_rope", "--out_dir", demo, "--max_steps", "2")
    assert done.returncode == 0, done.stderr
    assert [command[1:4] for command in commands] == [["-m", "experiments", "no_rope"]], "no step of the demo ran"


class Done:
    def wait(self):
        return 0


# ---- the arm without a change ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", training.MAKE_STAGE)
def test_an_arm_without_a_change_equals_the_script(space, monkeypatch, tmp_path, script):
    flags = TINY if script == "1-pretrain.py" else "--batch_size 4 --device cpu --dtype float32"
    arm = space.train(script, flags, seed=3)
    words = f"{QUIET} {flags} --seed 3 --max_steps 2 --out_dir {tmp_path}".split()
    run_script(monkeypatch, script, *space.data_flags(script), *words)
    saved = torch.load(next(tmp_path.glob("*.pth")), weights_only=True)["model"]
    trained = {name: arm.model.state_dict()[name] for name in saved}
    assert saved and all(torch.equal(weight, trained[name]) for name, weight in saved.items())
    assert len(arm.steps) == 2 and np.isfinite(arm.validated())


def test_ctrl_c_ends_an_arm_and_leaves_nothing(space, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = visible_names(space.out)

    def interrupt(stage):
        loss = stage.compute_loss
        stage.compute_loss = lambda model, batch: os.kill(os.getpid(), signal.SIGINT) or loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        space.train("1-pretrain.py", TINY, 0, interrupt)
    assert visible_names(space.out) == before and not list(tmp_path.glob("tmp*"))


def test_a_run_that_diverges_is_a_result(space):
    def break_weights(stage):
        stage.model.lm_head.weight.data.fill_(float("nan"))

    arm = dataclasses.replace(space, max_steps=6).train("1-pretrain.py", TINY, 0, break_weights)
    assert "not finite" in arm.problem and arm.validated() == float("inf")


# ---- the changes -----------------------------------------------------------------------------------------------------
def test_without_norms_all_other_weights_start_equal(space):
    control, _ = first_stage(space, "1-pretrain.py", TINY)
    stage, _ = first_stage(space, "1-pretrain.py", TINY, remove_norms)
    assert not any(isinstance(module, RMSNorm) for module in stage.model.modules())
    left = {name: weight for name, weight in control.initial.items() if "norm" not in name}
    assert stage.initial.keys() == left.keys() < control.initial.keys()
    assert all(torch.equal(weight, stage.initial[name]) for name, weight in left.items())


def test_without_rope_one_layer_does_not_see_the_order_of_the_tokens_before(space):
    stage, _ = first_stage(space, "1-pretrain.py", TINY, remove_rope)
    control, _ = first_stage(space, "1-pretrain.py", TINY)
    ids = torch.tensor([[20, 21, 22, 23, 24]])
    swapped = ids[:, [2, 0, 3, 1, 4]]
    with torch.no_grad():
        last = [[each.model.logits(row)[0, -1] for row in (ids, swapped)] for each in (stage, control)]
    assert torch.allclose(*last[0], atol=1e-5) and not torch.allclose(*last[1], atol=1e-5)


def test_a_shifted_mask_is_shifted_by_one():
    mask = np.array([0, 0, 1, 1, 0, 1], np.uint8)
    assert shifted(mask, 1).tolist() == [0, 0, 0, 1, 1, 0] and shifted(mask, -1).tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("by", [1, -1])
def test_a_shifted_mask_trains_each_label_one_position_later_or_earlier(space, by):
    control, _ = first_stage(space, "3-full_sft.py", "--batch_size 4")
    stage, _ = first_stage(space, "3-full_sft.py", "--batch_size 4", lambda stage: shift_masks(stage, by))
    rows = np.arange(20)
    right, moved = (each.data.batch(rows) for each in (control, stage))
    assert torch.equal(right["input_ids"], moved["input_ids"])
    trained, other = right["labels"] != IGNORE_INDEX, moved["labels"] != IGNORE_INDEX
    inside = right["token_mask"]
    assert torch.equal(trained.roll(by, 1)[:, 1:-1] & inside[:, 1:-1], other[:, 1:-1])


def test_padded_rows_hold_one_document_each(space):
    control, _ = first_stage(space, "1-pretrain.py", TINY)
    padded, _ = first_stage(space, "1-pretrain.py", TINY + " --batch_size 64 --global_batch_size 8", pad_documents)
    in_order, _ = first_stage(space, "1-pretrain.py", TINY + " --batch_size 64 --global_batch_size 8", sort_documents)
    assert isinstance(padded.data, PaddedDocuments) and len(padded.data) == control.data.tokens.documents
    batch, narrow = padded.data.batch(np.arange(9)), in_order.data.batch(np.arange(9))
    for i in range(9):
        ids = torch.as_tensor(control.data.tokens.read_document(i)[0][:129].astype(np.int64))
        assert batch["labels"][i][batch["labels"][i] != IGNORE_INDEX].tolist() == ids[1:].tolist()
    assert batch["labels"].shape == (9, 128) and narrow["num_targets"] == batch["num_targets"]
    assert narrow["labels"].shape[1] == max(narrow["token_mask"].sum(1)).item()
    packed = control.data.batch_sampler(8, 0).row_ids(0)
    rows = padded.data.batch_sampler(8, 0).row_ids(0)
    tokens = [stage.data.batch(ids)["num_tokens"] for stage, ids in ((control, packed), (padded, rows))]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.3)


def test_the_wrong_accumulation_is_the_mean_of_the_means(space):
    flags = "--global_batch_size 8 --device cpu --dtype float32 --batch_size"
    whole, arm = first_stage(space, "3-full_sft.py", f"{flags} 8", unsort)
    _, divided = first_stage(space, "3-full_sft.py", f"{flags} 2", unsort)
    _, means = first_stage(space, "3-full_sft.py", f"{flags} 2", accumulate_means)
    whole.model.load_state_dict(whole.initial)
    rows = whole.data.batch_sampler(8, 0).row_ids(0).reshape(4, 2)
    batches = [whole.data.batch(part) for part in rows]
    with torch.no_grad():
        losses = [whole.compute_loss(whole.model, batch)[0].item() for batch in batches]
    counts = [batch["num_targets"] for batch in batches]
    assert len(set(counts)) > 1, "else both means are equal"
    assert divided.steps[0]["loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    expected = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / 4
    assert means.steps[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert arm.steps[0]["loss"] == pytest.approx(divided.steps[0]["loss"], rel=1e-5)


def test_without_its_reference_only_the_training_pairs_have_reference_0(space):
    control, right = first_stage(space, "5-dpo_train.py", "--batch_size 4")
    stage, arm = first_stage(space, "5-dpo_train.py", "--batch_size 4", forget_reference)
    assert not stage.data.reference.any() and control.data.reference.any()
    for split, pairs in stage.validation.items():
        assert torch.equal(pairs.reference, control.validation[split].reference)
    assert right.steps[0]["preference_loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert arm.steps[0]["preference_loss"] != pytest.approx(np.log(2), abs=1e-3)


# ---- words -----------------------------------------------------------------------------------------------------------
def test_a_difference_is_stated_only_beyond_the_spread_of_the_seeds():
    assert compared([3.0, 3.1], [2.0, 2.1]) == "higher" and compared([2.0, 2.1], [3.0, 3.1]) == "lower"
    assert compared([2.0, 2.2], [2.1, 2.15]) == compared([2.3, 2.6], [2.2, 2.25]) == "not clearly different"
    assert compared([float("inf"), 3.0], [2.0, 2.1]) == "unknown"
    assert (
        span([2.311, 2.314]) == "2.31"
        and span([2.3, 2.45]) == "2.30 to 2.45"
        and span([2.3, float("inf")]) == "2.30 to diverged"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_draws_a_picture_and_says_a_sentence(space, name):
    sentence = EXPERIMENTS[name](space)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) > 60
    assert Path(space.out, f"{name}.png").read_bytes().startswith(b"\x89PNG")
