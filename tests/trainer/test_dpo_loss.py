"""Preference losses and metrics equal hand-computed values; losses, margins and gradients equal trl's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.transformer import Transformer
from tests.helpers import load_script, write_shards
from tests.model.test_hf_parity import hf_settings, make_random_model
from tests.trainer.test_loss import random_problem
from trainer import loss as loss_module
from trainer.datasets import ChatDataset, PreferenceDataset
from trainer.distributed import DistContext
from trainer.dpo import preference_metrics, reference_log_probs
from trainer.loss import IGNORE_INDEX, LOGITS_CHUNK, token_log_probs

DPO = load_script("5-dpo_train.py")


def loss_config(loss="dpo", **changes):
    return DPO.DPOConfig(loss=loss, **changes)


# ---- hand-computed values --------------------------------------------------------------------------------------------
POLICY, REFERENCE = torch.tensor([-10.0, -20.0]), torch.tensor([-12.0, -19.0])  # log p of chosen and rejected
LENGTHS = torch.tensor([5, 4])


@pytest.mark.parametrize(
    ("config", "loss", "margin"),
    [
        (loss_config(beta=0.5), math.log(1 + math.exp(-1.5)), 1.5),  # 0.5 * ((-10 + 12) - (-20 + 19)) = 1.5
        (loss_config("ipo", beta=0.5), (0.65 - 1) ** 2, 0.65),  # 2/5 + 1/4 against 1 / (2 * 0.5)
        (loss_config("simpo", beta=2.0, simpo_gamma=1.0), math.log(1 + math.exp(-5)), 6.0),  # 2 * (-2 + 5) - 1 = 5
    ],
    ids=["dpo", "ipo", "simpo"],
)
def test_preference_losses_equal_hand_computed_values(config, loss, margin):
    ours, their_margin = DPO.preference_loss(POLICY, REFERENCE, LENGTHS, config)
    assert ours.tolist() == pytest.approx([loss], abs=1e-6)
    assert their_margin.tolist() == pytest.approx([margin], abs=1e-6)


def test_preference_metrics_equal_hand_computed_values():
    """Two chosen tokens, one rejected token: log r is 1, 0 and -1, so k3 is e - 2, 0 and 1/e."""
    log_probs = torch.tensor([[-1.0, -2.0], [-4.0, 0.0]])
    batch = {
        "labels": torch.tensor([[7, 7], [7, IGNORE_INDEX]]),
        "reference": torch.tensor([[-2.0, -2.0], [-3.0, 0.0]]),
    }
    found = preference_metrics(log_probs, batch, torch.tensor([0.2]), torch.tensor([True]))
    wanted = {
        "reward_accuracy": 1,
        "reward_margin": 0.2,
        "chosen_logp": -3,
        "rejected_logp": -4,
        "chosen_logp_delta": 1,
    }
    wanted |= {"chosen_preferred": 1, "chosen_preferred_before": 1}  # per token -1.5 > -4; under pi_ref -2 > -3
    wanted |= {"chosen_length": 2, "rejected_length": 1, "kl": (math.e - 2 + 1 / math.e) / 3}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(wanted, abs=1e-6)


# ---- log-probabilities per token -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [2, 64, 2 * LOGITS_CHUNK + 6])
def test_token_log_probs_equal_torch(tokens):
    hidden, weight, labels = random_problem(tokens)
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    ours = token_log_probs(hidden, weight, labels)
    (ours * upstream).sum().backward()
    mine = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    theirs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    theirs = theirs * (labels != IGNORE_INDEX)
    (theirs * upstream).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], weight.grad, rtol=1e-4, atol=1e-4)


def test_batch_without_targets_gives_zero_gradients():
    hidden, weight, labels = random_problem(8, ignored=1.1)
    found = token_log_probs(hidden, weight, labels)
    found.sum().backward()
    assert found.abs().sum() == hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_logits_are_computed_in_chunks(monkeypatch):
    from tests.trainer.test_loss import LargestTensor

    monkeypatch.setattr(loss_module, "LOGITS_CHUNK", 16)
    hidden, weight, labels = random_problem(256, dim=4, vocab=300, ignored=0.0)
    with LargestTensor() as watch:
        token_log_probs(hidden, weight, labels).sum().backward()
    assert watch.largest <= 16 * 300 < 256 * 300


# ---- a batch of pairs ------------------------------------------------------------------------------------------------
def random_documents(vocab):
    """Six pairs of random token ids: prompts of 3 to 8 tokens, answers of 1 to 20 tokens."""
    random = np.random.default_rng(3)
    for _ in range(6):
        prompt = random.integers(20, vocab, random.integers(3, 9)).tolist()
        for _ in ("chosen", "rejected"):
            answer = random.integers(20, vocab, random.integers(1, 21)).tolist()
            yield prompt + answer, [0] * len(prompt) + [1] * len(answer)


@pytest.fixture(scope="module")
def models_and_pairs(tokenizer, tmp_path_factory):
    """(model, reference model, pairs with the log-probabilities of the reference model)."""
    folder = tmp_path_factory.mktemp("pairs") / "dpo"
    write_shards(folder, "pairs", tokenizer, {"train": random_documents(97)})
    model = make_random_model(tie_embeddings=False)
    torch.manual_seed(7)
    parent = make_random_model(tie_embeddings=False)
    with torch.no_grad():
        for weight in parent.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    dist = DistContext(torch.device("cpu"), torch.float32)
    answers = ChatDataset(str(folder), "train", tokenizer.pad_id)
    reference = reference_log_probs(dist, parent, answers, batch_size=5)
    return model, parent, PreferenceDataset(str(folder), "train", tokenizer.pad_id, reference)


def test_preference_batch_holds_chosen_then_rejected_rows(models_and_pairs, tokenizer):
    _, parent, pairs = models_and_pairs
    batch = pairs.batch(np.array([4, 1]))
    assert batch["row_ids"].tolist() == [4, 1] and batch["input_ids"].shape[0] == 4
    for row, document in enumerate([8, 2, 9, 3]):
        ids, mask = pairs.answers.tokens.read_document(document)
        labels = batch["labels"][row][batch["labels"][row] != IGNORE_INDEX]
        assert labels.tolist() == ids[mask == 1].tolist(), "only answer tokens"
    with torch.no_grad():
        exact = token_log_probs(parent(batch["input_ids"])[0], parent.lm_head.weight, batch["labels"])
    torch.testing.assert_close(batch["reference"], exact, rtol=1e-5, atol=1e-5)
    assert (batch["reference"][batch["labels"] == IGNORE_INDEX] == 0).all()
    lengths = pairs.answers.lengths()
    assert pairs.lengths().tolist() == [2 * max(lengths[2 * i], lengths[2 * i + 1]) for i in range(6)]
    ids, mask = pairs.answers.tokens.read_document(8)
    assert pairs.prompt_ids(4) == ids[: mask.tolist().index(1)].tolist()


def test_loss_of_a_policy_equal_to_its_reference(models_and_pairs):
    _, parent, pairs = models_and_pairs
    batch = pairs.batch(np.arange(6))
    for loss, expected in (("dpo", math.log(2)), ("ipo", 25.0)):
        total, metrics = DPO.compute_loss(parent, batch, loss_config(loss))
        assert batch["num_targets"] == 6 and total.item() / 6 == pytest.approx(expected, abs=1e-4)
        assert metrics["kl"].item() == pytest.approx(0, abs=1e-5)


def test_sft_term_is_the_chosen_likelihood(models_and_pairs):
    model, _, pairs = models_and_pairs
    batch = pairs.batch(np.arange(6))
    plain, _ = DPO.compute_loss(model, batch, loss_config())
    more, _ = DPO.compute_loss(model, batch, loss_config(sft_weight=0.5))
    logits, labels = model.logits(batch["input_ids"]), batch["labels"]
    per_answer = [F.cross_entropy(logits[i], labels[i], ignore_index=IGNORE_INDEX).item() for i in range(6)]
    assert (more - plain).item() == pytest.approx(0.5 * sum(per_answer), rel=1e-4)


def test_empty_batch_gives_zero_loss_and_gradients(models_and_pairs):
    from trainer.datasets import empty_batch

    model, _, pairs = models_and_pairs
    model.zero_grad()
    batch = empty_batch(pairs)
    total, metrics = DPO.compute_loss(model, batch, loss_config(sft_weight=1.0))
    total.backward()
    assert batch["num_targets"] == 0 and total.item() == 0 and all(value == 0 for value in metrics.values())
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())


def test_reference_has_no_gradient_and_moe_adds_aux_loss(models_and_pairs):
    _, _, pairs = models_and_pairs
    torch.manual_seed(0)
    moe = Transformer(ModelConfig(97, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, use_moe=True, n_routed_experts=4))
    batch = pairs.batch(np.arange(6))
    total, metrics = DPO.compute_loss(moe.train(), batch, loss_config())
    total.backward()
    assert 0.009 < metrics["aux_loss"].item() / 6 < 0.04 and not batch["reference"].requires_grad
    assert total.item() == pytest.approx((metrics["preference_loss"] + metrics["aux_loss"]).item(), rel=1e-5)
    assert all(p.grad is not None for p in moe.parameters())


# ---- trl -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("loss", "trl_name"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_loss_margins_and_gradients_equal_trl(models_and_pairs, tokenizer_dir, tmp_path, loss, trl_name):
    """trl's DPOTrainer with its collator and loss, on the same weights, reference model and pairs."""
    import datasets
    import transformers
    import trl

    model, parent, pairs = models_and_pairs
    stock, stock_parent = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_settings(ours.config))) for ours in (model, parent)
    )
    stock.load_state_dict(model.state_dict())
    stock_parent.load_state_dict(parent.state_dict())
    trainer = trl.DPOTrainer(
        stock,
        stock_parent,
        trl.DPOConfig(str(tmp_path), beta=0.3, loss_type=[trl_name], use_cpu=True, bf16=False, report_to=[]),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_dir),
    )
    examples = []
    for i in range(len(pairs)):
        (chosen, mask), (rejected, _) = (
            pairs.answers.tokens.read_document(document) for document in (2 * i, 2 * i + 1)
        )
        start = mask.tolist().index(1)
        parts = {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
        examples.append({name: ids.tolist() for name, ids in parts.items()})
    theirs = trainer.compute_loss(trainer.model.train(), trainer.data_collator(examples))
    theirs.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}

    model.zero_grad()
    batch = pairs.batch(np.arange(len(pairs)))
    ours, sums = DPO.compute_loss(model, batch, loss_config(loss, beta=0.3))
    (ours / len(pairs)).backward()
    assert abs(metrics["rewards/margins"]) > 0.05, "policy and reference differ"
    assert ours.item() / len(pairs) == pytest.approx(theirs.item(), abs=1e-5)
    mean = {name: value.item() / len(pairs) for name, value in sums.items()}
    assert mean["chosen_logp"] == pytest.approx(metrics["logps/chosen"], abs=1e-4)
    assert mean["rejected_logp"] == pytest.approx(metrics["logps/rejected"], abs=1e-4)
    assert 0.3 * mean["chosen_logp_delta"] == pytest.approx(metrics["rewards/chosen"], abs=1e-5)
    if loss == "dpo":
        assert mean["reward_margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-5)
        assert mean["reward_accuracy"] == pytest.approx(metrics["rewards/accuracies"], abs=1e-6)
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5)
