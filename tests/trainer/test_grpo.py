"""6-grpo_train.py: rewards rise, the log, early stops, exact resume, several processes, LoRA, tools."""

import dataclasses
import functools
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import data_process
from common.errors import UserError
from corpus.prompt_data import PromptRow
from evaluation.tools import find_tools, run_tool
from export.model_card import training_section
from export.model_facts import model_facts
from model.answer_parts import answer_message
from model.checkpoint import save_model
from model.config import ModelConfig
from model.generate import generate
from model.sampling import SamplingParams
from model.transformer import Transformer
from tests.helpers import ROOT, load_weights, read_jsonl, run_script, tiny_model, write_rows
from trainer import rollout
from trainer.rollout import Answer, PromptSampler, Tools, answer_seed, offer_tools, sample_answers

# AdamW, because Muon orthogonalises in bf16, which amplifies rounding differences.
SHORT = [
    "--optimizer",
    "adamw",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--learning_rate",
    "3e-3",
    "--log_interval",
    "1",
    "--warmup_iters",
]
SHORT += ["0", "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "8", "--eval_interval", "100"]
SHORT += ["--truncated", "keep", "--reward", "toy_reward:has_digit", "--max_reward_drop", "0", "--min_entropy", "0"]
SIZE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "dropout": 0.1}
REWARDS = """
def has_digit(prompt, answer, reference):
    return float(reference in answer)

def length(prompt, answer, reference):
    return len(answer) / 8

def bad(prompt, answer, reference):
    raise ValueError("no")
"""
VOLATILE = {"seconds", "seconds_left", "tokens_per_second", "peak_memory_mb", "tflops"}


@pytest.fixture
def rl_dir(tmp_path):
    """Prompts "digit 3" and "数字3" with the reference "3"; a third of them is held out."""
    rows = [{"question": f"{'digit ' if i % 2 else '数字'}{i % 10}, {i}?", "answer": str(i % 10)} for i in range(30)]
    folder = tmp_path / "rl"
    data_process.main(
        ["rl", str(write_rows(tmp_path / "rows.jsonl", rows)), "--out_dir", str(folder), "--val_fraction", "0.3"]
    )
    return folder


def save_parent(out, tokenizer, stage="full_sft", **changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, **{**SIZE, **changes}))
    save_model(out / f"{stage}_{model.config.name}.pth", model, stage, tokenizer, [{"stage": "pretrain"}])


@pytest.fixture
def grpo(monkeypatch, tokenizer, rl_dir, tmp_path):
    """Run 6-grpo_train.py on an untrained parent; returns its output folder."""
    (tmp_path / "toy_reward.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_reward", raising=False)

    def run(*flags, out="out"):
        folder = tmp_path / out
        if not list(folder.glob("full_sft_*.pth")):
            save_parent(folder, tokenizer)
        run_script(monkeypatch, "6-grpo_train.py", *SHORT, "--data_path", rl_dir, "--out_dir", folder, *flags)
        return folder

    return run


def steps(folder, name="grpo_32"):
    rows = [row for row in read_jsonl(folder / f"{name}.jsonl") if "loss" in row]
    return [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]


# ---- training and logs -----------------------------------------------------------------------------------------------
def test_the_reward_rises_and_is_logged(curves, grpo, monkeypatch, capsys):
    """Answers that contain the digit of the prompt, from an untrained model."""
    more = ("--group_size", 16, "--prompts_per_step", 8, "--learning_rate", "3e-2", "--max_steps", 15)
    folder = grpo(*more, "--loss", "dapo", "--inner_steps", 4, "--sample_interval", 5, "--eval_interval", 5)
    rows, everything = steps(folder), read_jsonl(folder / "grpo_32.jsonl")
    first, last = (sum(row["reward"] for row in part) / 4 for part in (rows[:4], rows[-4:]))
    assert first < 0.1 and last > 0.3, "a step has 128 answers"
    names = ("loss", "grad_norm", "reward", "pass@1", "pass@16", "answer_length", "truncated", "entropy", "kl")
    for name in (*names, "clip_fraction", "no_signal", "tool_calls"):
        assert all(math.isfinite(row[name]) for row in rows), name
    assert rows[0]["entropy"] == pytest.approx(math.log(278), abs=0.1) and rows[0]["pass@1"] == rows[0]["reward"]
    assert rows[0]["pass@16"] > rows[0]["pass@1"] and rows[0]["answer_length"] <= 8 and rows[-1]["kl"] > 0.05
    assert [row["step"] for row in everything if "val_reward" in row] == [0, 5, 10, 15]
    samples = [row for row in everything if "samples" in row]
    assert [row["step"] for row in samples] == [1, 5, 10, 15]
    assert all(sample.keys() == {"prompt", "answer", "reference", "reward"} for sample in samples[0]["samples"])
    said = capsys.readouterr().out
    assert "step 0: validation en reward" in said and "step 10, reward " in said and " pass@1 " in said

    entry = torch.load(folder / "grpo_32.pth", weights_only=True)["lineage"][-1]
    assert (
        entry["stage"] == "grpo"
        and entry["answers"] == 15 * 128
        and entry["validation"]["val_reward"].keys() == {"zh", "en"}
    )
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "full_sft_32.pth", "grpo_32.jsonl", "grpo_32.png", "grpo_32.pth", "report.html"
    ]  # fmt: skip
    run_script(
        monkeypatch, "2-eval.py", "--out_dir", folder, "--prompt", "hi", "--max_new_tokens", 2, "--device", "cpu"
    )
    assert "grpo_32.pth: grpo, " in capsys.readouterr().out, "2-eval.py loads the latest stage"


def test_groups_that_agree_give_no_gradient(grpo):
    rows = steps(grpo("--reward", "length=100000", "--kl_coef", 0, "--max_steps", 2, "--loss", "dapo"))
    assert all(row["no_signal"] == 1 and row["grad_norm"] == 0 and row["reward"] == 1 for row in rows)


def test_a_reward_that_fails_names_the_row_and_counts_zero(grpo, capsys):
    rows = steps(grpo("--reward", "toy_reward:bad", "--max_steps", 1))
    assert rows[0]["reward"] == 0
    assert re.search(
        r"train\.jsonl:\d+: the reward toy_reward:bad raised ValueError: no: it counts as 0", capsys.readouterr().err
    )


def test_truncated_answers(grpo):
    """Untrained answers are cut at 3 tokens: their reward is 0, or they are not trained, or they count as others."""
    flags = ("--reward", "length=100000", "--max_new_tokens", 2, "--max_steps", 1, "--kl_coef", 0)
    zero, mask, keep = (steps(grpo(*flags, "--truncated", how, out=how))[0] for how in ("zero", "mask", "keep"))
    assert zero["truncated"] == mask["truncated"] > 0.9 and zero["reward"] == pytest.approx(1 - zero["truncated"])
    assert mask["reward"] == keep["reward"] == 1
    assert mask["entropy"] != keep["entropy"]


def test_entropy_and_held_out_reward_end_the_run(grpo, capsys):
    folder = grpo("--min_entropy", 99, "--max_steps", 5)
    assert "stopped at step 1 of 5: the entropy of the answers fell to 5." in capsys.readouterr().out
    assert torch.load(folder / "grpo_32.pth", weights_only=True)["lineage"][-1]["stopped"].startswith("the entropy")
    assert not (folder / "grpo_32.resume").exists()


def test_a_loophole_is_seen_in_the_held_out_reward(grpo, capsys):
    """Long answers are rewarded, short ones are wanted: the held-out reward falls and ends the run."""
    flags = ("--reward", "toy_reward:length", "--val_reward", "length=8", "--max_reward_drop", 0.3, "--kl_coef", 0)
    folder = grpo(*flags, "--eval_interval", 2, "--max_steps", 20, "--learning_rate", "3e-2", "--group_size", 8)
    said = capsys.readouterr().out
    assert "the held-out reward fell from" in said and "loophole" in said and len(steps(folder)) < 20, said


def test_lora_trains_the_adapter_alone(grpo, tokenizer, tmp_path):
    folder = grpo("--lora_rank", 4, "--max_steps", 3, "--save_interval", 2, "--inner_steps", 2)
    checkpoint = torch.load(folder / "grpo_32.pth", weights_only=True)
    assert checkpoint["adapter"]["rank"] == 4 and all("lora" in name for name in checkpoint["model"])
    assert steps(folder)[0]["kl"] > 0 == steps(grpo("--lora_rank", 4, "--max_steps", 1, out="one"))[0]["kl"]
    from model.checkpoint import load_model

    assert load_model(folder / "grpo_32.pth")[0].config.dim == 32


def test_flags_that_do_not_fit_are_errors(grpo, tokenizer, rl_dir):
    for flags, message in (
        (("--global_batch_size", 5), "prompts_per_step and --group_size set the rows per step"),
        (("--parallel", "zero2"), "ddp and fsdp, not with ZeRO"),
        (("--max_new_tokens", 60), "no prompt that leaves 60 of 64 tokens"),
        (("--tools", "hammer"), "--tools hammer: unknown tool"),
        (("--group_size", 1), "1 is not a whole number from 2 to 4096"),
        (("--temperature", 0), "all answers of a group would be equal"),
    ):
        with pytest.raises(UserError, match=message):
            grpo(*flags)


# ---- prompts and rollouts --------------------------------------------------------------------------------------------
def test_seeds_depend_on_step_prompt_and_index_alone():
    seeds = {answer_seed(42, *key) for key in itertools.product(range(5), range(5), range(5))}
    assert len(seeds) == 125 and answer_seed(42, 1, 2, 3) == answer_seed(42, 1, 2, 3) != answer_seed(43, 1, 2, 3)
    assert answer_seed(42, 0, 0, 0) == 11465652750463011511, "a run resumed elsewhere samples the same answers"


def test_every_step_has_equally_many_prompts_and_an_epoch_has_each_prompt_once():
    sampler = PromptSampler(10, None, 4, 1)
    rows = np.concatenate([sampler.row_ids(step) for step in range(5)])
    assert [len(sampler.row_ids(step)) for step in range(5)] == [4] * 5
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10].tolist() != rows[10:].tolist()


def test_sampled_answers_are_those_of_single_generation(tokenizer):
    """Each answer equals `generate` of its prompt alone with its seed; ids end with the stop token."""
    model, settings = tiny_model(vocab_size=tokenizer.vocab_size), SamplingParams(1.0, max_new_tokens=12)
    prompts = [tokenizer.encode(text) for text in ("a", "hello", "数字")]
    answers = [Answer([], prompt, seed) for seed, prompt in enumerate(prompts * 4)]
    sample_answers(model, tokenizer, answers, settings, Tools())
    for answer in answers:
        (alone,) = generate(model, [answer.prompt], dataclasses.replace(settings, seed=answer.seed), tokenizer)
        stopped = alone.finish_reason == "stop"
        assert answer.ids[: len(alone.ids)] == alone.ids and len(answer.ids) == len(alone.ids) + stopped
        assert answer.mask == [1] * len(answer.ids) and answer.text == alone.text
        assert answer.is_truncated == (not stopped) and (not stopped or answer.ids[-1] in tokenizer.stop_ids)


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "17 * 3"}}\n</tool_call>'


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """Replace generation: each answer gets the next of these texts and a stop token."""

    def use(*texts, reason="stop"):
        remaining = list(texts)

        def complete(model, tokenizer, seqs, decoder=None):
            for seq in seqs:
                seq.completion.text = remaining.pop(0)
                seq.completion.ids = tokenizer.renderer.backend.encode(
                    seq.completion.text, add_special_tokens=False
                ).ids
                seq.completion.finish_reason, seq.last_tokens = reason, [tokenizer.stop_ids[0]]

        monkeypatch.setattr(rollout, "complete", complete)

    return use


def test_tool_results_are_context_and_not_trained(scripted, tokenizer):
    """The ids are those of the rendered chat; the mask is 1 exactly at the two generated texts with their end."""
    known = find_tools("calculator")
    tools = Tools([tool.schema for tool in known], functools.partial(run_tool, tools=known), 2)
    question = offer_tools(PromptRow([{"role": "user", "content": "17 * 3?"}], "51"), tools.schemas).messages
    prompt = tokenizer.render(question, add_generation_prompt=True)[0]
    answer = Answer(question, prompt, 0)
    scripted(CALL, "It is 51.")
    sample_answers(tiny_model(max_seq_len=2048), tokenizer, [answer], SamplingParams(1.0, max_new_tokens=400), tools)

    chat = [
        *question,
        answer_message(CALL),
        {"role": "tool", "content": "51"},
        {"role": "assistant", "content": "It is 51."},
    ]
    ids, mask = tokenizer.render(chat)
    length = len(prompt) + len(answer.ids)
    assert prompt + answer.ids == ids[:length] and mask[:length] == [0] * len(prompt) + answer.mask
    assert not any(mask[length:]), "only the text after the end of the turn is left out"
    trained = [token for token, bit in zip(answer.ids, answer.mask, strict=True) if bit]
    assert tokenizer.decode(trained) == f"{CALL}<|im_end|>It is 51.<|im_end|>"
    context = tokenizer.decode([token for token, bit in zip(answer.ids, answer.mask, strict=True) if not bit])
    assert "<tool_response>\n51\n</tool_response>" in context and context.endswith("<|im_start|>assistant\n")
    assert answer.text == f"{CALL}\nIt is 51." and answer.num_calls == 1 and answer.length == sum(answer.mask)


def test_tool_calls_are_limited(scripted, tokenizer):
    known = find_tools("calculator")
    run = functools.partial(run_tool, tools=known)
    question = [{"role": "user", "content": "17 * 3?"}]
    prompt = tokenizer.render(question, add_generation_prompt=True)[0]
    for limit, calls in ((0, 0), (1, 1), (3, 3)):
        answer = Answer(question, prompt, 0)
        scripted(*[CALL] * (limit + 1))
        sample_answers(
            tiny_model(max_seq_len=2048),
            tokenizer,
            [answer],
            SamplingParams(1.0, max_new_tokens=4000),
            Tools([], run, limit),
        )
        assert answer.num_calls == calls and answer.texts == [CALL] * (limit + 1)
    answer = Answer(question, prompt, 0)
    scripted(CALL, CALL)
    short = SamplingParams(1.0, max_new_tokens=50)  # the first call is longer: the answer is cut
    sample_answers(tiny_model(max_seq_len=2048), tokenizer, [answer], short, Tools([], run, 2))
    assert answer.is_truncated and len(answer.texts) == 1
    answer = Answer(question, prompt, 0)
    scripted(CALL, reason="length")
    sample_answers(tiny_model(max_seq_len=2048), tokenizer, [answer], SamplingParams(1.0), Tools([], run, 2))
    assert answer.is_truncated and not answer.num_calls, "a call without its end of turn is not run"


# ---- resume and several processes ------------------------------------------------------------------------------------
class Killed(BaseException):
    """Simulates SIGKILL: no handler catches it."""


@pytest.mark.parametrize("kill_at", [3, 8])
def test_a_killed_run_ends_with_the_same_weights(grpo, monkeypatch, capsys, kill_at):
    """Two optimizer steps per step, saves after steps 2 and 4: the kills are within step 2 and at step 5."""
    flags = ("--max_steps", 6, "--save_interval", 2, "--inner_steps", 2, "--eval_interval", 3)
    whole = grpo(*flags, out="whole")
    from trainer import loop

    real_step, done = loop.train_step, 0

    def step_then_die(*positional):
        nonlocal done
        if done == kill_at:
            raise Killed
        done += 1
        return real_step(*positional)

    monkeypatch.setattr(loop, "train_step", step_then_die)
    with pytest.raises(Killed):
        grpo(*flags, out="parts")
    monkeypatch.setattr(loop, "train_step", real_step)
    capsys.readouterr()
    parts = grpo(*flags, out="parts")
    assert ("resuming after step 4" in capsys.readouterr().out) == (kill_at == 8)
    ours, theirs = load_weights(whole / "grpo_32.pth"), load_weights(parts / "grpo_32.pth")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [
        [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_jsonl(folder / "grpo_32.jsonl")]
        for folder in (whole, parts)
    ]
    assert logs[0] == logs[1], "with the sampled answers and the validations"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


FSDP_MOE = pytest.param(
    "fsdp", {"use_moe": True, "n_routed_experts": 4, "balance_loss_coef": 0.0}, marks=pytest.mark.slow
)


@pytest.mark.parametrize(("mode", "changes"), [("ddp", {}), FSDP_MOE], ids=["ddp", "fsdp moe"])
def test_two_processes_give_the_run_of_one(grpo, tokenizer, rl_dir, tmp_path, mode, changes):
    for name in ("one", "two"):
        save_parent(tmp_path / name, tokenizer, **changes)
    if changes:
        (tmp_path / "one" / "full_sft_32.pth").unlink(missing_ok=True)
    flags = ["--max_steps", 3, "--inner_steps", 2, "--batch_size", 3, "--loss", "dapo"]
    name = "grpo_32_moe" if changes else "grpo_32"
    one = grpo(*flags, out="one")
    paths = ["--data_path", rl_dir, "--out_dir", tmp_path / "two", "--parallel", mode]
    command = map(str, [*TORCHRUN, ROOT / "6-grpo_train.py", *SHORT, *flags, *paths])
    result = subprocess.run(list(command), cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-800:] + result.stderr[-2500:]
    logs = [read_jsonl(folder / f"{name}.jsonl") for folder in (one, tmp_path / "two")]
    assert len(logs[0]) == len(logs[1])
    for mine, theirs in zip(*logs, strict=True):
        for key in {
            "loss",
            "grad_norm",
            "reward",
            "entropy",
            "kl",
            "answer_length",
            "pass@4",
            "aux_loss",
        } & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), (key, mine["step"])
        for split, value in mine.get("val_reward", {}).items():
            assert value == pytest.approx(theirs["val_reward"][split], abs=1e-6)
    ours, others = (load_weights(folder / f"{name}.pth") for folder in (one, tmp_path / "two"))
    for key in ours:
        torch.testing.assert_close(ours[key], others[key], rtol=1e-3, atol=1e-3)


def test_the_model_card_names_the_stage_and_its_figures(grpo):
    path = grpo("--max_steps", 2) / "grpo_32.pth"
    facts = model_facts(path)
    assert facts["stage"] == "grpo" and facts["languages"] == ["zh", "en"]
    row = training_section(facts).splitlines()[-3]
    assert "rewards that a program computes" in row and "32 answers" in row and "% right" in row
