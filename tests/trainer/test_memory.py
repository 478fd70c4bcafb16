"""--plan: estimates of parameters, FLOPs and memory agree with the model; published sizes and numbers; no training."""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import parse
from common.errors import UserError
from model.config import PRESETS, ModelConfig
from model.transformer import Transformer
from tests.helpers import EXACT_FLAGS, ROOT, load_script, read_jsonl, run_script
from trainer.config import PARALLEL_MODES, PlanConfig
from trainer.memory import count_parameters, inference_memory, saved_bytes, training_memory
from trainer.plan import INFERENCE_FORMATS, implied_utilisation, training_seconds
from trainer.throughput import GPUS, flops_per_token

SMALL = ModelConfig(vocab_size=1000, dim=128, n_layers=2, n_heads=4, n_kv_heads=2)


# ---- parameters and FLOPs --------------------------------------------------------------------------------------------
def model_parameters(config: ModelConfig) -> tuple[int, int]:
    with torch.device("meta"):
        return Transformer(config).count_parameters()


@pytest.mark.parametrize("preset", PRESETS)
def test_plan_counts_the_parameters_of_every_preset(preset):
    config = ModelConfig(**PRESETS[preset])
    assert (count_parameters(config).total, count_parameters(config).active) == model_parameters(config)


def test_presets_have_the_published_sizes():
    assert count_parameters(ModelConfig(**PRESETS["mindllm-1.3b"])).total == pytest.approx(1.3e9, rel=0.02)
    assert count_parameters(ModelConfig(**PRESETS["mindllm-3b"])).total == pytest.approx(3.1e9, rel=0.01)
    assert count_parameters(ModelConfig(**PRESETS["xiangxin-3b"])).total == pytest.approx(2.78e9, rel=0.005)


@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([2, 8, 16]),
    group=st.integers(1, 3),
    layers=st.integers(1, 3),
    moe=st.booleans(),
    tie=st.booleans(),
    norm=st.booleans(),
    width=st.sampled_from([0, 6, 24]),
    bias=st.booleans(),
    routed=st.integers(1, 4),
    shared=st.integers(0, 2),
)
@settings(max_examples=15, deadline=None)
def test_parameter_count_equals_the_model(heads, head_dim, group, layers, moe, tie, norm, width, bias, routed, shared):
    config = ModelConfig(
        vocab_size=50, dim=heads * group * head_dim, n_heads=heads * group, n_kv_heads=heads, n_layers=layers,
        use_moe=moe, tie_embeddings=tie, qk_norm=norm, n_routed_experts=routed, n_active_experts=max(1, routed - 1),
        n_shared_experts=shared, head_dim=width, qkv_bias=bias,
    )  # fmt: skip
    assert (count_parameters(config).total, count_parameters(config).active) == model_parameters(config)


def test_flops_per_token_equal_hand_computed_values():
    config = ModelConfig(vocab_size=100, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=16)
    # q 8x8, k and v 8x4 each, o 8x8; gate, up, down 8x16 each; the output layer 100x8 (no norms, no embedding lookup)
    assert count_parameters(config).matmul == 64 + 2 * 32 + 64 + 3 * 128 + 800
    assert flops_per_token(config, seq=10) == 6 * 1376 + 12 * 1 * 8 * 10
    wide = dataclasses.replace(config, head_dim=8)  # two heads of 8: all attention matrices are twice as large
    assert flops_per_token(wide, seq=10) == 6 * (1376 + 192) + 12 * 1 * 2 * 8 * 10


def test_training_seconds_equal_hand_computed_values():
    assert training_seconds(989e12 * 0.5 * 8 * 3600, GPUS["h100"], 8, 0.5) == pytest.approx(3600)
    assert implied_utilisation(312e12 * 86_400, GPUS["a800"], 1, 2.0) == pytest.approx(0.5)


# ---- memory ----------------------------------------------------------------------------------------------------------
def saved_by_autograd(config: ModelConfig, rows: int, seq: int, dtype: torch.dtype, recompute: bool = False) -> int:
    """Bytes of all tensors that a forward pass saves for the backward pass, each once, without parameters."""
    model = Transformer(config).train()
    model.activation_checkpointing = recompute
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # a reference, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(torch.randint(0, config.vocab_size, (rows, seq)))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_kv_heads": 4, "dim": 256, "hidden_dim": 512},
        {"head_dim": 64, "qkv_bias": True},
        {"head_dim": 16, "qk_norm": True},
        {"use_moe": True},
        {"use_moe": True, "n_active_experts": 1},
    ],
)
def test_saved_bytes_equal_what_autograd_saves(change, dtype):
    rows, seq = 4, 256
    config = dataclasses.replace(SMALL, **{"hidden_dim": 0, "head_dim": 0, **change})
    layers = [dataclasses.replace(config, n_layers=n) for n in (2, 3)]
    measured = saved_by_autograd(layers[1], rows, seq, dtype) - saved_by_autograd(layers[0], rows, seq, dtype)
    if dtype == torch.bfloat16:  # autocast's copies of the matrices are counted separately; down_proj's is not kept
        experts = config.n_shared_experts + config.n_routed_experts if config.use_moe else 1
        matrices = count_parameters(config).layer_matrices // config.n_layers
        measured -= 2 * (matrices - experts * config.dim * config.hidden_dim)
    assert saved_bytes(config, seq, dtype.itemsize, "cpu") * rows * seq == pytest.approx(measured, rel=0.01)


def test_recomputation_saves_only_the_residual_stream():
    deep = [dataclasses.replace(SMALL, n_layers=n) for n in (2, 6)]
    measured = [saved_by_autograd(config, 4, 256, torch.float32, recompute=True) for config in deep]
    assert (measured[1] - measured[0]) / 4 == pytest.approx(4 * 256 * 4 * SMALL.dim, rel=0.01)


PEAK = """
import json, sys
import torch
from model.config import ModelConfig
from model.transformer import Transformer
from trainer.metrics import peak_memory_mb
from trainer.loss import cross_entropy_sum
from trainer.optim import make_optimizers

fields, rows, seq, optimizer, bf16, recompute = json.loads(sys.argv[1])

def train(model, optimizers, ids):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        hidden, balance = model(ids)
        loss = cross_entropy_sum(hidden, model.lm_head.weight, ids)
    (loss / ids.numel() + balance).backward()
    for each in optimizers:
        each.step()
        each.zero_grad()

def build(config):
    model = Transformer(config).train()
    model.activation_checkpointing = recompute
    return model, make_optimizers(model, optimizer, 1e-3, 0.1)

tiny = ModelConfig(**{**fields, "n_layers": 1, "dim": 64, "hidden_dim": 64, "vocab_size": 100})
train(*build(tiny), torch.randint(0, 100, (1, 16)))  # memory of the libraries themselves
before = peak_memory_mb("cpu")
config = ModelConfig(**fields)
made = build(config)
for _ in range(2):
    train(*made, torch.randint(0, config.vocab_size, (rows, seq)))
print((peak_memory_mb("cpu") - before) * 2**20)
"""
DEEP = {"vocab_size": 6400, "dim": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "max_seq_len": 256}
WIDE = {"vocab_size": 6400, "dim": 768, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "max_seq_len": 128}


@pytest.mark.parametrize(
    ("fields", "rows", "optimizer", "bf16", "recompute"),
    [
        (DEEP, 4, "adamw", False, False),
        (WIDE, 1, "adamw", False, False),
        (WIDE, 4, "adamw", False, True),
        ({**DEEP, "n_layers": 3, "use_moe": True}, 4, "muon", True, False),
    ],
)
def test_planned_memory_is_within_15_percent_of_a_process(fields, rows, optimizer, bf16, recompute):
    """The peak memory of a process in two steps, minus its memory before the model, is within 15 % of the estimate.

    MALLOC_MMAP_THRESHOLD_ gives each tensor its own mapping, which excludes the allocator's fragmentation (LOG.md).
    """
    config, seq = ModelConfig(**fields), fields["max_seq_len"]
    job = json.dumps([fields, rows, seq, optimizer, bf16, recompute])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PEAK, job], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = training_memory(
        config, rows, seq, optimizer=optimizer, compute_bytes=2 if bf16 else 4, recompute=recompute, device="cpu"
    )
    assert planned.total == pytest.approx(float(done.stdout), rel=0.15), planned


def test_states_are_sharded_by_parallel_mode():
    config = ModelConfig(**PRESETS["xiangxin-3b"])
    of = {p: training_memory(config, 1, 2048, parallel=p, processes=8, optimizer="adamw") for p in PARALLEL_MODES}
    parameters = count_parameters(config).total
    assert of["ddp"].optimizer == 8 * parameters and of["zero1"].optimizer == parameters
    assert of["zero1"].gradients == 4 * parameters and of["zero2"].gradients == parameters / 2
    assert of["zero3"].weights < of["zero2"].weights / 4 and of["fsdp"] == of["zero3"]
    totals = [of[p].total for p in PARALLEL_MODES]
    assert totals == sorted(totals, reverse=True)


def test_memory_agrees_with_mindllm_report():
    """Memory of 1.3 B parameters in arXiv:2310.15777, in GB.

    The report gives no batch size and no dtypes. Assumed: 2 rows of 1,024 tokens, and weights and gradients in bf16 in
    its bf16 run (this project keeps both in fp32).
    """
    config = ModelConfig(**PRESETS["mindllm-1.3b"])
    full = training_memory(config, 2, 1024, optimizer="adamw", compute_bytes=4)
    half = training_memory(config, 2, 1024, optimizer="adamw", state_bytes=(2, 2))
    assert inference_memory(config, 4, 1) / 1e9 == pytest.approx(6.08, rel=0.01)
    assert inference_memory(config, 2, 1) / 1e9 == pytest.approx(3.45, rel=0.01)
    assert full.total / 1e9 == pytest.approx(32.65, rel=0.05)
    assert half.total / 1e9 == pytest.approx(20.47, rel=0.25)


def test_implied_utilisation_of_xiangxin_training():
    """8 A800, 14 days: 150 G tokens need 89 % of the peak; 20 tokens per parameter (model card) need 33 %."""
    config = ModelConfig(**PRESETS["xiangxin-3b"])
    each = flops_per_token(config, 2048)
    assert implied_utilisation(150e9 * each, GPUS["a800"], 8, 14) == pytest.approx(0.89, abs=0.005)
    assert implied_utilisation(20 * 2.78e9 * each, GPUS["a800"], 8, 14) == pytest.approx(0.33, abs=0.005)


# ---- --plan ----------------------------------------------------------------------------------------------------------
def test_plan_trains_nothing(monkeypatch, tmp_path, capsys):
    flags = ("--preset", "mindllm-1.3b", "--plan", "--gpus", "16", "--gpu", "a100", "--batch_size", "2")
    run_script(monkeypatch, "1-pretrain.py", *flags, "--out_dir", tmp_path, "--data_path", tmp_path)
    said = capsys.readouterr().out
    assert "1,317.3 M parameters" in said and "26.3 G" in said and not list(tmp_path.iterdir())
    launch = "torchrun --nproc_per_node 8 --nnodes 2 1-pretrain.py --preset mindllm-1.3b"
    assert f"{launch} --batch_size 2 --global_batch_size 32" in said


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--plan", "--utilisation", "1.5"), "--utilisation: 1.5 is not"),
        (("--plan", "--gpus", "0"), "--gpus"),
        (("--tokens_per_param", "1", "--max_steps", "3"), "--tokens_per_param and --max_steps"),
    ],
)
def test_invalid_plan_flags_are_one_line(monkeypatch, flags, problem):
    with pytest.raises(UserError, match=problem):
        run_script(monkeypatch, "1-pretrain.py", *flags)


def test_tokens_per_param_sets_the_steps(monkeypatch, tmp_path, pretrain_dir, tokenizer_dir):
    model = ("--dim", "32", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "1", "--max_seq_len", "32")
    flags = (
        "--tokens_per_param",
        "0.05",
        "--batch_size",
        "4",
        "--tokenizer",
        tokenizer_dir,
        "--data_path",
        pretrain_dir,
    )
    run_script(monkeypatch, "1-pretrain.py", *EXACT_FLAGS, *model, *flags, "--out_dir", tmp_path)
    checkpoint = torch.load(tmp_path / "pretrain_32.pth", weights_only=True)
    expected = PlanConfig(tokens_per_param=0.05).steps_for_tokens(ModelConfig(**checkpoint["config"]), 4)
    assert [row["step"] for row in read_jsonl(tmp_path / "pretrain_32.jsonl") if "loss" in row][-1] == expected > 1


# ---- inference -------------------------------------------------------------------------------------------------------
def table_rows(text: str, head: str) -> dict[str, list[str]]:
    """Return {first cell: other cells} of the table whose first column is `head`."""
    lines = [line.split() for line in text.splitlines()]
    start = next(i for i, cells in enumerate(lines) if cells[:1] == [head]) + 2
    rows = itertools.takewhile(bool, (line for line in lines[start:]))
    return {cells[0]: cells[1:] for cells in rows}


def test_plan_prints_inference_memory(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    flags = ("--preset", "mindllm-1.3b", "--plan", "--out_dir", tmp_path, "--data_path", tmp_path)
    run_script(monkeypatch, "1-pretrain.py", *flags)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines()[:-1])) <= 100 and "…" not in said and "1,024 tokens each" in said
    rows, n = table_rows(said, "inference"), count_parameters(ModelConfig(**PRESETS["mindllm-1.3b"])).total
    cached = 2 * 24 * 2048 * 1024  # keys and values, layers, width, tokens
    for name, weight, number in (("fp32", 4, 4), ("bf16", 2, 2), ("int8", 34 / 32, 2)):
        shown = [float(cell) for cell in rows[name] if cell != "(GGUF)"]
        parts = [n * weight, cached * number, n * weight + cached * number + 0.8e9]
        parts += [8 * parts[1], n * weight + 8 * parts[1] + 0.8e9]
        assert shown == pytest.approx([part / 1e9 for part in parts], abs=0.006)


@pytest.mark.parametrize("flags", [["--presets", "mindllm-1.3b,mindllm-3b,xiangxin-3b"], ["--preset", "mindllm-3b"]])
def test_plan_numbers_are_not_cut_at_80_columns(monkeypatch, capsys, tmp_path, flags):
    """rich cuts tables to 80 columns when the output is a pipe."""
    monkeypatch.setenv("COLUMNS", "80")
    run_script(monkeypatch, "1-pretrain.py", "--plan", *flags, "--out_dir", tmp_path, "--data_path", tmp_path)
    said = capsys.readouterr().out
    assert "…" not in said and all(len(line) <= 80 or "torchrun" in line for line in said.splitlines())


ALL_MODES = ["ddp", "zero1", "zero2", "zero3", "fsdp"]


@pytest.mark.parametrize(
    ("flags", "modes"),
    [
        (["--gpus", "8"], ["ddp", "fsdp"]),
        (["--gpus", "1"], ["ddp"]),
        (["--gpus", "8", "--optimizer", "adamw"], ALL_MODES),
        (["--gpus", "8", "--optimizer", "adamw", "--dtype", "float16"], ["ddp", "fsdp"]),
        (["--gpus", "8", "--optimizer", "adamw", "--compile", "on"], ["ddp", "fsdp"]),
    ],
)
def test_the_plan_lists_the_modes_that_training_accepts_and_no_others(monkeypatch, capsys, tmp_path, flags, modes):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("trainer.config.require_packages", lambda *_: None)
    run_script(monkeypatch, "1-pretrain.py", "--plan", *flags, "--data_path", tmp_path)
    said = capsys.readouterr().out
    assert [name for name in table_rows(said, "--parallel") if name in ALL_MODES] == modes
    assert max(len(line) for line in said.splitlines() if "1-pretrain.py" not in line) <= 100 and "…" not in said
    accepted = []
    for mode in ALL_MODES if "8" in flags else ["ddp"]:
        with contextlib.suppress(UserError):
            parse(load_script("1-pretrain.py").PretrainConfig, "", [*flags, "--parallel", mode])
            accepted.append(mode)
    assert accepted == modes


def test_the_launch_line_is_accepted_and_describes_the_planned_run(monkeypatch, capsys, tmp_path):
    flags = ["--dim", "4096", "--n_layers", "64", "--n_heads", "32", "--optimizer", "adamw", "--batch_size", "2"]
    monkeypatch.setattr("trainer.config.require_packages", lambda *_: None)
    run_script(monkeypatch, "1-pretrain.py", "--plan", *flags, "--tokenizer", tmp_path / "a b", "--data_path", tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if "1-pretrain.py" in line)
    arguments = shlex.split(line.split("1-pretrain.py")[1])
    config = parse(load_script("1-pretrain.py").PretrainConfig, "", arguments)
    assert (config.optimizer, config.tokenizer, config.batch_size) == ("adamw", str(tmp_path / "a b"), 2)
    assert config.model == {"dim": 4096, "n_layers": 64, "n_heads": 32} and config.parallel.startswith("zero")


def test_a_price_is_a_number_or_said_to_be_unknown(monkeypatch, capsys, tmp_path):
    for flags, unknown in (([], 6), (["--price_per_hour", "2"], 0)):
        run_script(monkeypatch, "1-pretrain.py", "--plan", *flags, "--data_path", tmp_path)
        said = capsys.readouterr().out
        costs = [cells[-1] for cells in table_rows(said, "GPU").values() if len(cells) == 5]
        assert len(costs) == len(GPUS) and costs.count("–") == unknown and "?" not in said
        assert ("–: no price is known, --price_per_hour sets one" in said) == bool(unknown)
        assert all(float(cost) > 0 for cost in costs if cost != "–")


def test_kv_cache_has_the_planned_size():
    from model.transformer import KVCache

    config = ModelConfig(vocab_size=100, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, max_seq_len=32)
    cache = KVCache(config, 8, 32, torch.device("cpu"), torch.bfloat16)
    weights = 2 * count_parameters(config).total
    assert inference_memory(config, 2, 8 * 32, "cpu") - weights == cache.keys.nbytes + cache.values.nbytes


def test_gguf_file_has_the_planned_size():
    gguf = pytest.importorskip("gguf")
    from export.gguf_export import gguf_tensors, storage_type

    config = ModelConfig(vocab_size=6400, dim=512, n_layers=3, n_heads=8, n_kv_heads=4)
    tensors = (
        (tensor.numpy(), storage_type(gguf, name, tensor, "q8_0")) for name, tensor in gguf_tensors(Transformer(config))
    )
    written = sum(gguf.quants.quantize(numbers, kind).nbytes for numbers, kind in tensors)
    assert written == pytest.approx(count_parameters(config).total * INFERENCE_FORMATS["int8 (GGUF)"][0], rel=0.002)


def test_presets_are_listed_in_one_table(monkeypatch, capsys):
    """MindLLM's table: sizes, memory in full and half precision, and the smallest GPU."""
    monkeypatch.setenv("COLUMNS", "100")
    flags = ("--plan", "--presets", "mindllm-1.3b,xiangxin-3b,small", "--optimizer", "adamw", "--batch_size", "2")
    run_script(monkeypatch, "1-pretrain.py", *flags)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100 and "…" not in said
    rows = table_rows(said, "model")
    assert list(rows) == ["mindllm-1.3b", "xiangxin-3b", "small"]
    size, context, train, half, gpu, fp32, bf16, int8, smallest = rows["mindllm-1.3b"]
    assert (size, context) == ("1,317.3", "1,024")
    assert float(train) == pytest.approx(32.65, rel=0.05) and gpu == "l40s", "arXiv:2310.15777: 32.65 GB"
    config = ModelConfig(**PRESETS["mindllm-1.3b"])
    assert float(half) == pytest.approx(training_memory(config, 2, 1024, optimizer="adamw").total / 1e9, abs=0.006)
    assert float(fp32) == pytest.approx(inference_memory(config, 4, 1024) / 1e9, abs=0.006)
    assert float(bf16) > float(int8) and smallest == "3090" and rows["xiangxin-3b"][-5] == "a100"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--plan", "--presets", "small,huge"), "--presets: there is no huge; choose from demo, small"),
        (("--plan", "--presets", ","), "--presets is empty"),
        (("--presets", "small"), "--presets belongs to --plan"),
    ],
)
def test_invalid_preset_lists_are_one_line(monkeypatch, flags, problem):
    with pytest.raises(UserError, match=problem):
        run_script(monkeypatch, "1-pretrain.py", *flags)
