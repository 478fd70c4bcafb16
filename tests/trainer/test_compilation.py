"""--compile: when auto compiles, what it prints, and the graphs of the compiled losses."""

import functools
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from common.errors import UserError
from tests.helpers import load_script, tiny_model
from trainer import compilation, loop
from trainer.compilation import MIN_CPU_FLOPS, decide_compile
from trainer.config import TrainConfig
from trainer.distributed import DistContext
from trainer.engine import DDPEngine
from trainer.throughput import flops_per_token

CPU = torch.device("cpu")
FLOPS = flops_per_token(tiny_model().config, 32) * 32 * 8  # of a step of 8 rows of 32 tokens
LONG = int(MIN_CPU_FLOPS / FLOPS) + 2
STAGES = [("1-pretrain.py", False), ("1-pretrain.py", True), ("3-full_sft.py", False), ("5-dpo_train.py", False)]


def make_stage(compute_loss=None, lengths=None, **changes):
    data = types.SimpleNamespace(lengths=lambda: lengths)
    return types.SimpleNamespace(
        model=tiny_model(**changes), compute_loss=compute_loss, data=data, loss_unit="token", name="x"
    )


def decide(monkeypatch, tmp_path, steps, dtype=torch.bfloat16, native=True, compiler="", device=CPU, **flags):
    monkeypatch.setattr(compilation, "has_fast_bf16", lambda device: native)
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    return decide_compile(TrainConfig(**flags), make_stage(), DistContext(device, dtype), 8, steps).compile


def test_auto_compiles_long_bf16_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    choose = functools.partial(decide, monkeypatch, tmp_path)
    assert (choose(LONG - 4), choose(LONG)) == ("off", "on")
    assert str(tmp_path / "mengya" / "torchinductor") in capsys.readouterr().out
    assert choose(LONG, dtype=torch.float32) == choose(LONG, native=False) == "off"
    assert choose(LONG, max_minutes=5) == "off" and choose(LONG, compile="off") == "off"
    assert capsys.readouterr().out == ""
    assert choose(LONG, compiler="a C++ compiler") == "off"
    assert capsys.readouterr().out == "not compiled: a C++ compiler is missing\n"
    assert choose(1, compile="on") == "on"
    with pytest.raises(UserError, match=r"^--compile on needs a C\+\+ compiler: install it"):
        choose(1, compile="on", compiler="a C++ compiler")


def test_auto_compiles_every_run_on_cuda(monkeypatch, tmp_path):
    device = torch.device("cuda", 0)
    assert decide(monkeypatch, tmp_path, 1, device=device) == "on"
    assert decide(monkeypatch, tmp_path, LONG, device=torch.device("mps")) == "off"


def compiled_steps(script, use_moe, backend, widths, dtype=torch.float32):
    """Two micro-batches of each width; returns the sums of the steps and the number of graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lesson = load_script(script)
    compute_loss = lesson.compute_loss
    if hasattr(lesson, "DPOConfig"):
        compute_loss = functools.partial(compute_loss, config=lesson.DPOConfig())
    stage = make_stage(compute_loss, None if script == "1-pretrain.py" else [1], max_seq_len=160, use_moe=use_moe)
    engine = DDPEngine(TrainConfig(optimizer="adamw", compile="off"), stage, DistContext(CPU, dtype))
    if backend:
        object.__setattr__(engine.config, "compile", "on")
        engine.loss.compile(backend=backend, dynamic=True if stage.data.lengths() else None)
    sums = []
    for width in widths:
        ids = torch.randint(0, 272, (4, width), generator=torch.Generator().manual_seed(width))
        batch = {"input_ids": ids, "labels": ids, "token_mask": ids >= 0, "row_ids": torch.arange(4)}
        batch |= {"num_targets": 4 * width, "num_tokens": 4 * width, "reference": torch.zeros(4, width)}
        sums.append(loop.train_step(engine, [batch, batch]).read())
    return sums, sum(torch._dynamo.utils.counters["graph_break"].values())


def assert_equal_losses(one, other, rel=1e-3):
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=rel, abs=1e-4)


@pytest.mark.parametrize(("script", "use_moe"), STAGES)
def test_a_compiled_loss_equals_the_plain_one(script, use_moe):
    plain, _ = compiled_steps(script, use_moe, None, (16, 32))
    compiled, _ = compiled_steps(script, use_moe, "eager", (16, 32))
    assert_equal_losses(plain, compiled)


@pytest.mark.parametrize(("script", "use_moe"), STAGES)
def test_eight_widths_need_at_most_three_graphs(script, use_moe):
    """An MoE in bf16, which its grouped products need: in fp32 the host reads how many tokens each expert gets."""
    counter = CompileCounterWithBackend("aot_eager")
    dtype = torch.bfloat16 if use_moe else torch.float32
    _, breaks = compiled_steps(script, use_moe, counter, range(16, 144, 16), dtype)
    assert counter.frame_count <= 3 and breaks == 0


def test_a_compiled_moe_equals_the_plain_one_in_bf16():
    plain, _ = compiled_steps("1-pretrain.py", True, None, (16, 32), torch.bfloat16)
    compiled, breaks = compiled_steps("1-pretrain.py", True, "aot_eager", (16, 32), torch.bfloat16)
    assert breaks == 0
    assert_equal_losses(plain, compiled, rel=1e-2)
