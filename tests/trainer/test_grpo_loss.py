"""GRPO losses equal hand-computed values; advantages, losses and gradients equal trl's GRPOTrainer; tool results."""

import copy
import math
import types

import numpy as np
import pytest
import torch

from corpus.prompt_data import PromptRow
from tests.helpers import load_script, tiny_model
from tests.model.test_hf_parity import hf_settings, make_random_model
from trainer.datasets import WIDTH_MULTIPLE
from trainer.distributed import DistContext
from trainer.grpo import Rollouts, collapse_stop, group_metrics
from trainer.grpo_config import GRPOConfig
from trainer.loss import IGNORE_INDEX
from trainer.rewards import Score
from trainer.rollout import Answer, Group, Tools, sample_answers

GRPO = load_script("6-grpo_train.py")
LOSSES = ("grpo", "dr_grpo", "dapo", "cispo")
DIST = DistContext(torch.device("cpu"), torch.float32)


# ---- hand-computed values --------------------------------------------------------------------------------------------
def test_advantages_equal_hand_computed_values():
    """Rewards 1, 0, 0, 1: mean 0.5, standard deviation sqrt(4 * 0.25 / 3) = 0.57735. A group that agrees has 0."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.7, 0.7, 0.7, 0.7], [0.1, 0.1, 0.1, 0.1]])
    one = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    expected = torch.tensor([[one, -one, -one, one], [0.0] * 4, [0.0] * 4])
    torch.testing.assert_close(GRPO.group_advantages(rewards, "grpo"), expected)
    assert GRPO.group_advantages(rewards, "dr_grpo")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert not GRPO.group_advantages(rewards, "dr_grpo")[1:].any(), "exactly 0, although 0.1 has no exact mean"


@pytest.mark.parametrize(
    ("loss", "expected", "clipped"),
    [  # ratios 2, 0.5, 2, 0.5 with advantages 1, 1, -1, -1; clipped to 0.8 … 1.2, dapo 1.28
        ("grpo", [-1.2, -0.5, 2.0, 0.8], [True, False, False, True]),
        ("dr_grpo", [-1.2, -0.5, 2.0, 0.8], [True, False, False, True]),
        ("dapo", [-1.28, -0.5, 2.0, 0.8], [True, False, False, True]),
        ("cispo", [3.0, 1.5, -3.0, -1.5], [False, False, False, False]),  # - 2 * 1 * log pi, with log pi = -1.5, -3
    ],
)
def test_policy_losses_equal_hand_computed_values(loss, expected, clipped):
    log_probs = torch.tensor([-1.5, -3.0, -1.5, -3.0], requires_grad=True)
    old = log_probs.detach() - torch.tensor([2.0, 0.5, 2.0, 0.5]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    found, is_clipped = GRPO.policy_loss(log_probs, old, advantages, GRPOConfig(loss=loss))
    assert found.tolist() == pytest.approx(expected, abs=1e-6) and is_clipped.tolist() == clipped
    (gradient,) = torch.autograd.grad(found.sum(), log_probs)
    if loss == "cispo":  # the weight is a constant: - ratio * advantage
        assert gradient.tolist() == pytest.approx([-2.0, -0.5, 2.0, 0.5], abs=1e-6)
    else:  # - ratio * advantage where it is not clipped
        assert gradient.tolist() == pytest.approx([0.0, -0.5, 2.0, 0.0], abs=1e-6)


def test_cispo_limits_the_weight_and_keeps_the_gradient():
    log_probs, old = torch.tensor([-1.0], requires_grad=True), torch.tensor([-4.0])
    config = GRPOConfig(loss="cispo", clip_high=0.5)
    found, is_clipped = GRPO.policy_loss(log_probs, old, torch.tensor([2.0]), config)
    (gradient,) = torch.autograd.grad(found.sum(), log_probs)
    assert found.tolist() == [3.0] and gradient.tolist() == [-3.0] and is_clipped.all()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("grpo", [1 / 2, 1 / 8, 1.0]), ("dr_grpo", [1 / 16] * 3), ("dapo", [0.3] * 3), ("cispo", [0.3] * 3)],
)
def test_token_weights(loss, expected):
    """Answers of 2, 8 and 0 trained tokens; the mean length of all processes is 1 / 0.3."""
    config = GRPOConfig(loss=loss, max_new_tokens=16)
    found = GRPO.token_weights(torch.tensor([2, 8, 0]), 1 / 0.3, config)
    assert found.tolist() == pytest.approx(expected)


def test_metrics_of_a_group():
    answers = [Answer([], [1], 0, [5] * n, [1] * n, is_truncated=n == 4) for n in (2, 4)]
    scores = [Score(1.2, {"exact": 1.0, "format": 1.0}), Score(0.2, {"exact": 0.0, "format": 1.0})]
    found = group_metrics(Group(PromptRow([], "x"), answers, scores), ["exact", "format"])
    assert found == pytest.approx(
        {"reward": 0.7, "reward_exact": 0.5, "reward_format": 1.0, "pass@1": 0.5, "pass@2": 1.0, "no_signal": 0.0,
         "answer_length": 3.0, "truncated": 0.5, "tool_calls": 0.0}
    )  # fmt: skip


def test_early_stops_name_their_cause():
    stop = collapse_stop(GRPOConfig())
    row = {"entropy": 0.5, "no_signal": 0.25, "reward": 0.9}
    assert stop(row) == "" and stop({**row, "val_best_reward": 0.5, "val_mean_reward": 0.36}) == ""
    assert "entropy of the answers fell to 0.0040" in stop({**row, "entropy": 0.004})
    assert "fell from 0.500 to 0.340" in stop({**row, "val_best_reward": 0.5, "val_mean_reward": 0.34})
    assert stop({**row, "val_best_reward": 0.5, "val_mean_reward": 0.34, "val_best_error": 0.06}) == "", "noise"
    never = collapse_stop(GRPOConfig(min_entropy=0.0, max_reward_drop=0.0))
    assert never({**row, "entropy": 0.0, "val_best_reward": 0.5, "val_mean_reward": 0.0}) == ""


# ---- a step on the rollouts of another model -------------------------------------------------------------------------
SETTINGS = {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 12, "batch_size": 12, "inner_steps": 2}


def perturbed(model, size, seed):
    torch.manual_seed(seed)
    other = make_random_model(tie_embeddings=False)
    with torch.no_grad():
        for mine, weight in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(weight + size * torch.randn_like(weight))
    return other


def random_groups(stop_id):
    """Three prompts with four answers of 2 to 12 tokens, one with a tool result, one truncated, one group agrees."""
    random, groups = np.random.default_rng(5), []
    rewards = [[1.0, 0.0, 0.25, 1.0], [0.5] * 4, [0.0, 0.0, 1.2, 0.0]]
    for row in rewards:
        prompt, answers = random.integers(20, 97, random.integers(3, 9)).tolist(), []
        for _ in row:
            ids = [*random.integers(20, 97, random.integers(1, 12)).tolist(), stop_id]
            answers.append(Answer([], prompt, 0, ids, [1] * len(ids)))
        groups.append(Group(PromptRow([], ""), answers, [Score(value, {}) for value in row]))
    called, truncated = groups[0].answers[1], groups[2].answers[2]
    called.ids, called.mask = [30, 31, 40, 41, 42, 32, stop_id], [1, 1, 0, 0, 0, 1, 1]
    truncated.ids, truncated.mask, truncated.is_truncated = [50] * 12, [1] * 12, True
    return groups


def make_rollouts(config, model, reference, tokenizer):
    data = types.SimpleNamespace(num_dropped=0)
    stage = types.SimpleNamespace(model=model, tokenizer=tokenizer, data=data, validation={})
    return Rollouts(config, stage, DIST, reference, Tools())


def our_batches(config, rollouts, groups):
    rewards = torch.tensor([[score.total for score in group.scores] for group in groups])
    lengths = rollouts.trained_lengths(groups)
    weights = GRPO.token_weights(lengths, rollouts.mean_length(lengths), config)
    advantages = GRPO.group_advantages(rewards, config.loss)
    return rollouts.batches(groups, advantages.flatten(), lengths, weights), advantages


@pytest.fixture(scope="module")
def models():
    """(policy, the model that sampled the answers, the frozen parent)."""
    policy = make_random_model(tie_embeddings=False)
    return policy, perturbed(policy, 0.02, 7), perturbed(policy, 0.03, 8)


def trl_trainer(config, policy, groups, tokenizer_dir, tmp_path):
    """trl's trainer, whose generation returns our rollouts and whose reward function returns our rewards."""
    import datasets
    import transformers
    import trl

    stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_settings(policy.config)))
    stock.load_state_dict(policy.state_dict())
    answers = [answer for group in groups for answer in group.answers]
    rewards = [score.total for group in groups for score in group.scores]
    settings = trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=12, num_generations=4, max_completion_length=config.max_new_tokens,
        loss_type=config.loss, scale_rewards="none" if config.loss == "dr_grpo" else "group", use_cpu=True, bf16=False,
        epsilon=config.clip_low, epsilon_high=config.clip_high + (config.loss == "cispo"), report_to=[], beta=0.0,
        use_bias_correction_kl=False,
        mask_truncated_completions=config.truncated == "mask", temperature=config.temperature,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        stock, lambda **_: rewards, settings, train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 12),
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_dir),
    )  # fmt: skip
    prompts, ids, masks = ([getattr(each, name) for each in answers] for name in ("prompt", "ids", "mask"))
    trainer._generate = lambda _: (prompts, ids, masks, ["x"] * 12, None, {}, None, None)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("truncated", ["keep", "mask"])
@pytest.mark.parametrize("loss", LOSSES)
def test_advantages_losses_and_gradients_equal_trl(models, tokenizer, tokenizer_dir, tmp_path, loss, truncated):
    policy, sampler, parent = models
    config = GRPOConfig(
        loss=loss, kl_coef=0.05, truncated=truncated, temperature=0.8, clip_high=0.1, clip_low=0.1, **SETTINGS
    )
    groups = random_groups(tokenizer.stop_ids[0])
    rollouts = make_rollouts(config, sampler, parent, tokenizer)
    (batch,), advantages = our_batches(config, rollouts, groups)

    trainer = trl_trainer(config, policy, groups, tokenizer_dir, tmp_path)
    inputs = trainer._generate_and_score_completions([{"prompt": "a"}] * 12)
    torch.testing.assert_close(advantages.flatten(), inputs["advantages"], rtol=1e-5, atol=1e-5)
    order = batch["row_ids"].tolist()  # ours are sorted by length
    for name, values in (("old_per_token_logps", batch["old"]), ("ref_per_token_logps", batch["reference"])):
        inputs[name] = torch.zeros(inputs["completion_ids"].shape)
        for i, row in enumerate(order):
            start = inputs["prompt_mask"][row].sum() - 1  # labels are shifted by one
            length = inputs["completion_mask"][row].sum()
            inputs[name][row, :length] = values[i, start : start + length]
    trainer.beta = config.kl_coef  # above it would make trl load a reference model
    theirs = trainer._compute_loss(trainer.model.train(), inputs)
    theirs.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    policy.zero_grad()
    ours, sums = GRPO.compute_loss(policy, batch, config)
    (ours / 12).backward()
    assert ours.item() / 12 == pytest.approx(theirs.item(), abs=1e-5)
    mean = {name: value.item() / 12 for name, value in sums.items()}
    assert mean["kl"] == pytest.approx(metrics["kl"], rel=1e-4) and metrics["kl"] > 0.01
    clipped = metrics["cispo_clip_ratio" if loss == "cispo" else "clip_ratio/region_mean"]
    assert mean["clip_fraction"] == pytest.approx(clipped, rel=1e-5) and 0 < clipped < 1
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    for name, parameter in policy.named_parameters():
        assert parameter.grad.abs().max() > 1e-5, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5)


# ---- sampled answers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"use_moe": True, "n_routed_experts": 4}], ids=["dense", "moe"])
def test_the_first_ratio_is_exactly_one(tokenizer, monkeypatch, changes):
    """In fp32: log p before the first inner step is computed as in training, not by the decoding step."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_seq_len=64, **changes)
    config = GRPOConfig(**{**SETTINGS, "batch_size": 5}, loss="dapo", temperature=0.9)
    groups = [
        Group(
            PromptRow([], ""),
            [Answer([], tokenizer.encode(text), i) for i in range(4)],
            [Score(float(i % 2), {}) for i in range(4)],
        )
        for text in ("a", "hello", "数字")
    ]
    answers = [answer for group in groups for answer in group.answers]
    sample_answers(model, tokenizer, answers, config.sampling, Tools())
    batches, _ = our_batches(config, make_rollouts(config, model, copy.deepcopy(model), tokenizer), groups)
    ratios, real = [], GRPO.policy_loss
    record = lambda log_probs, old, *more: ratios.append((log_probs - old).exp()) or real(log_probs, old, *more)
    monkeypatch.setattr(GRPO, "policy_loss", record)
    model.train()
    for batch in batches:
        assert batch["input_ids"].shape[1] % WIDTH_MULTIPLE == 0 and (batch["old"] != 0).equal(
            batch["labels"] != IGNORE_INDEX
        )
        GRPO.compute_loss(model, batch, config)[0].backward()
    assert [len(batch["old"]) for batch in batches] == [4, 4, 4] and all((ratio == 1).all() for ratio in ratios)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    GRPO.compute_loss(model, batches[0], config)
    assert not (ratios[-1] == 1).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_group_that_agrees_gives_no_gradient(models, tokenizer, loss):
    """Not even with other probabilities than those of sampling."""
    policy, sampler, parent = models
    config = GRPOConfig(loss=loss, kl_coef=0.0, **SETTINGS)
    groups = random_groups(tokenizer.stop_ids[0])[1:2]
    batches, _ = our_batches(config, make_rollouts(config, sampler, parent, tokenizer), groups)
    policy.zero_grad()
    GRPO.compute_loss(policy, batches[0], config)[0].backward()
    assert all(not parameter.grad.any() for parameter in policy.parameters())


def test_micro_batches_add_up_to_the_whole_step(models, tokenizer):
    policy, sampler, parent = models
    found = []
    for size in (12, 5):
        config = GRPOConfig(loss="dapo", kl_coef=0.1, **{**SETTINGS, "batch_size": size})
        batches, _ = our_batches(
            config, make_rollouts(config, sampler, parent, tokenizer), random_groups(tokenizer.stop_ids[0])
        )
        assert sum(batch["num_targets"] for batch in batches) == 12 and len(batches) == (1 if size == 12 else 3)
        found.append(sum(GRPO.compute_loss(policy, batch, config)[0].item() for batch in batches))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] != 0
