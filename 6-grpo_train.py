"""Lesson 6: reinforcement learning with rewards that a program computes (GRPO; Shao et al. 2024, arXiv:2402.03300).

    advantage = (r - mean r) / std r              over the rewards of the G answers to one prompt
    ratio     = pi(token) / pi_old(token)         pi_old sampled the answers: 1 at the first of --inner_steps
    loss      = - min(ratio * advantage, clip(ratio) * advantage) + kl_coef * KL(pi || pi_ref)
    --loss grpo      clip(ratio) to 1 - clip_low … 1 + clip_high; mean over tokens, then over answers
    --loss dr_grpo   no std; sum over tokens / max_new_tokens, so that long answers count fully   (arXiv:2503.20783)
    --loss dapo      mean over all tokens of the step; clip_high above clip_low keeps exploring     (arXiv:2503.14476)
    --loss cispo     - clip(ratio).detach() * advantage * log pi: clipped tokens keep a gradient    (arXiv:2506.13585)

    python 6-grpo_train.py                                          starts from the only out/dpo_*.pth, lora_sft or sft
    python 6-grpo_train.py --reward exact,length=200:0.1 --tools calculator --loss dapo --inner_steps 2
    torchrun --nproc_per_node 2 6-grpo_train.py                     two processes
Reads   dataset/rl (written by data_process.py rl) and the parent checkpoint.
Writes  out/grpo_512.pth, its log (.jsonl), its curves (.png) and, until the run is complete, its .resume folder.
Next:   2-eval.py (chat with it); code: trainer/rollout.py (sampling, tools), trainer/grpo.py, trainer/rewards.py.
"""

import common  # isort: skip  # noqa: F401  before torch: it sets the log level of torch
import copy
import functools

import torch

from common.cli import parse
from common.errors import fail_in_one_line
from common.files import check_writable
from evaluation.tools import find_tools, run_tool
from export.hf_import import open_folder, open_model
from model.checkpoint import record_parent
from model.lora import LoRAConfig, attach
from trainer import grpo
from trainer.checkpoint_writer import with_run_lock
from trainer.distributed import init_distributed
from trainer.dpo import without_dropout
from trainer.grpo_config import GRPOConfig
from trainer.loop import train_step
from trainer.loss import token_log_probs
from trainer.rollout import Tools, open_prompts
from trainer.run import Run
from trainer.stage import Stage, find_source


def group_advantages(rewards, loss):
    """(prompts, G) -> (prompts, G). Where a whole group agrees they are 0: it gives no gradient."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if loss != "dr_grpo":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages.masked_fill(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0)


def token_weights(lengths, mean_length, config):
    """The weight of each token of an answer, (answers,). lengths: trained tokens. The loop divides by the answers."""
    if config.loss == "grpo":
        return 1 / lengths.clamp(min=1)
    return torch.full(lengths.shape, 1 / (config.max_new_tokens if config.loss == "dr_grpo" else mean_length))


def policy_loss(log_probs, old, advantages, config):
    """Return the loss of every token and where it is clipped. log_probs, old: (answers, seq); advantages: (…, 1)."""
    ratio = (log_probs - old).exp()
    is_high = (ratio > 1 + config.clip_high) & (advantages > 0)
    if config.loss == "cispo":
        return -ratio.clamp(max=1 + config.clip_high).detach() * advantages * log_probs, is_high
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    is_low = (ratio < 1 - config.clip_low) & (advantages < 0)
    return -torch.min(ratio * advantages, clipped * advantages), is_high | is_low


def compute_loss(model, batch, config):
    """Return (sum of the losses of the answers, {name: sum to log}). A batch: grpo.Rollouts.batches."""
    hidden, aux_loss = model(batch["input_ids"], token_mask=batch["token_mask"])
    log_probs = token_log_probs(hidden / config.temperature, model.lm_head.weight, batch["labels"])
    log_ratio = batch["reference"] - log_probs
    kl = log_ratio.exp() - 1 - log_ratio  # the estimator "k3", http://joschu.net/blog/kl-approx.html
    loss, is_clipped = policy_loss(log_probs, batch.get("old", log_probs.detach()), batch["advantages"], config)
    total = ((loss + config.kl_coef * kl) * batch["weights"]).sum()
    aux_loss = aux_loss * batch["num_targets"]
    return total + aux_loss, {"aux_loss": aux_loss} | grpo.policy_metrics(log_probs, batch, kl, is_clipped)


def make_batches(config, rollouts, groups):
    """Return the micro-batches of a step: the answers with their advantages and weights."""
    rewards = torch.tensor([[score.total for score in group.scores] for group in groups])
    lengths = rollouts.trained_lengths(groups)
    weights = token_weights(lengths, rollouts.mean_length(lengths), config)
    return rollouts.batches(groups, group_advantages(rewards, config.loss).flatten(), lengths, weights)


@with_run_lock
def train_on_rewards(config, stage, dist, rollouts):
    with Run(config, stage, dist, rollouts.validate) as run:
        for step, lr in run.steps():
            groups = rollouts.sample(run.engine, step, run.sampler.row_ids(step))  # G answers to each prompt
            batches = make_batches(config, rollouts, groups)
            sums = [train_step(run.engine, batches).read() for _ in range(config.inner_steps)]
            rollouts.log_samples(run.logger, step + 1, groups)
            run.end_step(grpo.mean_sums(sums), batches, lr, **rollouts.metrics(groups))
        run.finish()


def main() -> None:
    config = parse(GRPOConfig, __doc__)
    check_writable(config.out_dir)
    source = find_source(config, "grpo")
    model, tokenizer, parent = open_model(source)
    model, reference = without_dropout(model), copy.deepcopy(model)
    if config.lora_rank:
        attach(model, LoRAConfig(config.lora_rank, 2.0 * config.lora_rank), config.seed)
    with init_distributed(config.device, config.dtype, config.seed, config.dist_timeout) as dist:
        known = find_tools(config.tools, config.lookup_file) if config.tools else []
        schemas, rounds = [tool.schema for tool in known], config.max_tool_calls * bool(known)
        tools = Tools(schemas, functools.partial(run_tool, tools=known), rounds)
        prompts = open_prompts(config, tokenizer, tools, model.config.max_seq_len)
        loss, data = functools.partial(compute_loss, config=config), prompts.pop("train")
        stage = Stage(
            "grpo", model.to(dist.device), tokenizer, loss, data, prompts, parent["lineage"], "answer", source=source
        )
        stage.early_stop = grpo.collapse_stop(config)
        if config.lora_rank:
            record_parent(model, source, stage.checkpoint_path(config.out_dir), open_folder)
        rollouts = grpo.Rollouts(config, stage, dist, reference, tools)
        if config.explain:
            from trainer.explain import explain

            def first_batches(engine, row_ids):
                return make_batches(config, rollouts, rollouts.sample(engine, 0, row_ids))

            return explain(config, stage, dist, train_step, first_batches)
        train_on_rewards(config, stage, dist, rollouts)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
