"""The time dial (trainer/dial.py, trainer/scaling_law.py): the chosen size follows time, speed, memory and data.

The speed of the machine is an argument everywhere, so that nothing here depends on the one that runs the tests.
"""

import itertools
import math
import re

import pytest
import torch
import transformers

from common.cli import parse
from common.errors import UserError
from corpus.mixing import MixComponent
from export.hf_export import hf_architecture
from model.config import ModelConfig
from model.parameters import count_parameters
from model.transformer import Transformer
from tests.helpers import load_script, one_line_error, run_script
from trainer import plan
from trainer.config import PlanConfig
from trainer.dial import (
    FORWARD_COST,
    SAVE_SECONDS,
    STEP_TOKENS,
    Budget,
    candidate_sizes,
    choose,
    describe_repeats,
    interpolate_seconds,
    longest_run,
    texts_of_run,
)
from trainer.mixing import MixSchedule
from trainer.scaling_law import LADDER, ScalingLaw, effective_tokens, ladder_fields, read_law
from trainer.throughput import flops_per_token

LAW = ScalingLaw("layer_matrices", E=0.8, A=60, alpha=0.35, B=60, beta=0.3)
SIZES = candidate_sizes(PlanConfig(), 6400)
MUCH_TEXT = {"web": (1.0, 10**13)}


def make_budget(minutes, texts=MUCH_TEXT, **flags):
    return Budget(60 * minutes, texts, 2, PlanConfig(**flags))


def machine(flops_per_second):
    """A machine with this speed at every size."""
    return lambda size: STEP_TOKENS * flops_per_token(size, size.max_seq_len) / flops_per_second


def parameters(run):
    return count_parameters(run.size).total


# ---- the choice ------------------------------------------------------------------------------------------------------
def test_the_size_and_the_tokens_grow_with_the_minutes_and_the_prediction_falls():
    runs = [choose(SIZES, machine(2e11), make_budget(minutes), LAW) for minutes in (0.5, 2, 8, 32, 128, 512, 2048)]
    sizes, tokens = [parameters(run) for run in runs], [run.tokens for run in runs]
    assert sizes == sorted(sizes) and tokens == sorted(tokens) and len(set(sizes)) >= 5
    scores = [run.bits_per_byte for run in runs]
    assert scores == sorted(scores, reverse=True)


def test_the_size_grows_with_the_speed_and_only_the_product_with_the_time_counts():
    runs = [choose(SIZES, machine(speed), make_budget(10), LAW) for speed in (1e10, 1e11, 1e12, 1e13, 1e14)]
    sizes = [parameters(run) for run in runs]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    twice_as_slow = choose(SIZES, machine(5e11), make_budget(20), LAW)
    assert (twice_as_slow.size, twice_as_slow.tokens) == (runs[2].size, pytest.approx(runs[2].tokens, rel=0.02))


def test_a_machine_that_is_twice_as_slow_gets_half_the_tokens_of_a_given_size():
    for size in SIZES[::3]:
        fast, slow = (longest_run(size, machine(speed)(size), make_budget(30), LAW) for speed in (4e12, 2e12))
        assert slow.tokens == pytest.approx(fast.tokens / 2, rel=0.03)
        assert slow.bits_per_byte > fast.bits_per_byte


@pytest.mark.parametrize("minutes", [0.5, 2, 20, 180])
@pytest.mark.parametrize("speed", [1e10, 1e11, 1e13])
def test_training_and_all_validations_fit_into_the_time(minutes, speed):
    for size in SIZES:
        step_seconds = machine(speed)(size)
        run = longest_run(size, step_seconds, make_budget(minutes), LAW)
        validation = 2 * run.eval_tokens * FORWARD_COST * step_seconds / STEP_TOKENS
        needed = run.steps * step_seconds + (run.steps // 100 + 8) * validation
        needed += SAVE_SECONDS * count_parameters(size).total
        assert run.steps == 1 or needed <= 60 * minutes
        assert run.steps < 20 or needed > 0.9 * 60 * minutes, "and they use it"
        assert run.tokens == run.steps * STEP_TOKENS and 2048 <= run.eval_tokens <= 16_384


def test_a_size_of_the_ladder_gets_equal_tokens_per_step_at_every_context_unless_the_flags_say_otherwise():
    assert {make_budget(1).step_tokens(size) for size in SIZES} == {STEP_TOKENS}
    assert make_budget(1, batch_size=2).step_tokens(SIZES[0]) == 2 * SIZES[0].max_seq_len
    assert make_budget(1, global_batch_size=6).step_tokens(SIZES[0]) == 6 * SIZES[0].max_seq_len
    assert Budget(60, MUCH_TEXT, 2, PlanConfig(), processes=2).step_tokens(SIZES[0]) == 2 * STEP_TOKENS


def test_interpolation_reproduces_measured_sizes_and_a_machine_of_constant_speed():
    budget = make_budget(1)
    few = {size: machine(3e11)(size) for size in SIZES[2:9:3]}
    step_seconds = interpolate_seconds(few, budget)
    assert [step_seconds(size) for size in SIZES] == pytest.approx([machine(3e11)(size) for size in SIZES])
    slower = {SIZES[0]: 2 * machine(3e11)(SIZES[0]), SIZES[8]: machine(3e11)(SIZES[8])}
    step_seconds = interpolate_seconds(slower, budget)
    ratios = [step_seconds(size) / machine(3e11)(size) for size in SIZES[:10]]
    assert ratios[0] == 2 and ratios[8] == ratios[9] == pytest.approx(1)
    assert ratios == sorted(ratios, reverse=True), "in between the FLOP/s lie in between"


# ---- the sizes -------------------------------------------------------------------------------------------------------
def test_the_ladder_rises_from_1_to_110_million_parameters_in_a_dozen_sizes_and_beyond():
    counts = [count_parameters(size).total for size in SIZES]
    assert counts == sorted(counts) and 1e6 < counts[0] < 2.5e6 and sum(count < 110e6 for count in counts) >= 12
    assert all(1.1 < more / less < 2.1 for less, more in itertools.pairwise(counts))
    layers = [size.n_layers for size in SIZES]
    assert layers[-1] > layers[6] > layers[0]
    for size in SIZES:
        assert size.dim % 64 == 0 and size.head_dim == 64 and size.max_seq_len in (256, 512)


@pytest.mark.parametrize("rung", LADDER)
def test_every_size_exports_as_a_stock_qwen3(rung):
    size = ModelConfig(**ladder_fields(rung))
    settings = transformers.Qwen3Config(
        vocab_size=size.vocab_size, hidden_size=size.dim, intermediate_size=size.hidden_dim,
        num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads, num_key_value_heads=size.n_kv_heads,
        tie_word_embeddings=size.tie_embeddings, head_dim=size.head_dim,
    )  # fmt: skip
    with torch.device("meta"):
        ours, stock = Transformer(size), transformers.Qwen3ForCausalLM(settings)
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    assert hf_architecture(size)[0] == "Qwen3ForCausalLM"
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes


def test_a_size_on_the_command_line_is_kept_and_other_model_flags_leave_the_size_open():
    config = load_script("1-pretrain.py").PretrainConfig

    def sizes(*flags):
        return candidate_sizes(parse(config, None, ["--minutes", "5", *flags]), 6400)

    assert sizes("--preset", "small") == [config().model_config(6400)]
    assert [size.dim for size in sizes("--dim", "128", "--n_heads", "2", "--n_kv_heads", "1")] == [128]
    assert len(sizes("--use_moe")) == 1
    assert sizes() == sizes("--preset", "auto") == SIZES
    longer = sizes("--max_seq_len", "1024", "--qk_norm", "false")
    assert [size.dim for size in longer] == [size.dim for size in SIZES]
    assert {(size.max_seq_len, size.qk_norm) for size in longer} == {(1024, False)}
    for model in ({"max_seq_len": 2**25}, {"max_seq_len": 2**23, "head_dim": 2**14}):
        with one_line_error("max_seq_len"):
            candidate_sizes(PlanConfig(model=model), 6400)


# ---- the law and the texts -------------------------------------------------------------------------------------------
def test_the_law_of_the_project_predicts_less_for_more_parameters_and_for_more_tokens():
    law = read_law()
    assert min(law.E, law.A, law.alpha, law.B, law.beta) > 0
    by_size = [law.bits_per_byte(size, 1e7) for size in SIZES]
    by_tokens = [law.bits_per_byte(SIZES[3], tokens) for tokens in (1e5, 1e6, 1e7, 1e9)]
    assert by_size == sorted(by_size, reverse=True) and by_tokens == sorted(by_tokens, reverse=True)
    assert by_size[-1] > law.E and by_tokens[0] < 8


def test_the_law_by_hand():
    law = ScalingLaw("total", E=1, A=8, alpha=0.5, B=27, beta=1 / 3)
    size = ModelConfig(vocab_size=300, dim=64, n_layers=1, n_heads=1, n_kv_heads=1)
    assert law.bits_per_byte(size, 27e6) == pytest.approx(1 + 8 / math.sqrt(count_parameters(size).total) + 0.09)


def test_a_second_pass_is_worth_almost_a_first_one_and_many_passes_at_most_16_texts():
    assert effective_tokens(70, [(1.0, 100)]) == 70 and effective_tokens(100, [(1.0, 100)]) == 100
    assert effective_tokens(200, [(1.0, 100)]) == pytest.approx(100 + 1539 * (1 - math.exp(-1 / 15.39)))
    assert 196 < effective_tokens(200, [(1.0, 100)]) < 197
    assert effective_tokens(1e9, [(1.0, 100)]) == pytest.approx(1639)
    assert effective_tokens(400, [(0.5, 1000), (0.5, 100)]) == pytest.approx(200 + effective_tokens(200, [(1, 100)]))


def test_data_smaller_than_the_tokens_makes_the_prediction_worse_and_never_the_model_smaller():
    runs = [choose(SIZES, machine(1e12), make_budget(60, {"tales": (1.0, unique)}), LAW)
            for unique in (10**13, 3 * 10**6, 3 * 10**5)]  # fmt: skip
    scores, sizes = [run.bits_per_byte for run in runs], [parameters(run) for run in runs]
    assert scores == sorted(scores) and sizes == sorted(sizes)
    assert len(set(sizes)) > 1, "time that more passes would waste buys a larger model"


def test_more_than_four_passes_are_reported_by_name():
    texts = {"zh": (0.5, 1000), "en": (0.5, 100)}
    assert describe_repeats(800, texts) == ""
    assert describe_repeats(1200, texts) == "en is read 6.0 times: beyond 4 passes repeated text helps little"


def test_the_texts_of_a_mixture_have_the_fractions_of_both_stages():
    zh, en, code = (MixComponent(name, frozenset(), tokens, 0.0) for name, tokens in (("zh", 9), ("en", 5), ("c", 2)))

    def stage(*parts):
        return [MixComponent(part.name, part.labels, part.tokens, weight) for part, weight in parts]

    one = MixSchedule([stage((zh, 0.25), (en, 0.75))])
    assert texts_of_run("unused", one) == {"zh": (0.25, 9), "en": (0.75, 5)}
    two = MixSchedule([stage((zh, 0.5), (en, 0.5)), stage((zh, 0.2), (code, 0.8))], stage2_at=0.75)
    found = texts_of_run("unused", two)
    assert {name: unique for name, (_, unique) in found.items()} == {"zh": 9, "en": 5, "c": 2}
    assert [fraction for fraction, _ in found.values()] == pytest.approx([0.425, 0.375, 0.2])


# ---- flags -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--minutes", "0"], "--minutes"), (["--minutes", "-3"], "--minutes"), (["--minutes", "nan"], "--minutes"),
        (["--minutes", "20", "--max_minutes", "5"], "--max_minutes"),
        (["--minutes", "20", "--max_steps", "5"], "--max_steps"), (["--minutes", "20", "--epochs", "2"], "--epochs"),
        (["--minutes", "20", "--tokens_per_param", "20"], "--tokens_per_param"),
        (["--minutes", "20", "--init_from", "x.pth"], "--max_minutes"),
        (["--preset", "auto"], "--preset auto needs --minutes"),
        (["--preset", "auto", "--minutes", "20", "--dim", "64"], "--dim"),
    ],
)  # fmt: skip
def test_values_and_combinations_that_make_no_sense_are_refused_in_one_line(flags, part):
    with pytest.raises(UserError) as error:
        parse(load_script("1-pretrain.py").PretrainConfig, None, flags)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_the_planner_states_the_choice_for_gpus_without_training(monkeypatch, capsys):
    monkeypatch.setattr(plan, "read_law", lambda: LAW)

    def choice(*flags):
        run_script(monkeypatch, "1-pretrain.py", "--plan", "--minutes", "180", *flags)
        line, about = capsys.readouterr().out.splitlines()
        assert "docs/size_sweep.csv" in about
        found = re.fullmatch(
            r"180 minutes on (\d x \w+) at 40% of the peak: (\S+) M parameters, (\S+) M tokens, .*", line
        )
        return found[1], float(found[2]), float(found[3])

    one, many, packed = choice("--gpu", "3090", "--gpus", "1"), choice("--gpus", "8"), choice("--batch_size", "256")
    assert one[0] == "1 x 3090" and many[0] == "8 x h100" and many[1] > one[1] > 25 and many[2] > one[2]
    assert packed[1] < many[1], "sizes that need more memory than the GPU has are no candidates"
    assert choice("--preset", "small", "--gpus", "1")[1] == 26.9
    with one_line_error("--gpu abacus"):
        choice("--gpu", "abacus")
