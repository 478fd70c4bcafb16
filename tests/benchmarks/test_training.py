"""benchmarks/training.py, benchmarks/growth.py: cases with a tiny model, trainers that are commands, error lines."""

import ast
import json
import math
import re
import sys
from dataclasses import replace

import pytest

from benchmarks import growth, train_case, training
from benchmarks.harness import Case, run_case, run_rounds
from benchmarks.train_spec import TrainSpec
from common.cli import parse
from common.errors import UserError
from model.config import PRESETS, ModelConfig
from model.parameters import count_parameters
from tests.helpers import ROOT, one_line_error
from trainer import loop

MODEL = ModelConfig(vocab_size=200, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)


@pytest.fixture
def spec(tmp_path):
    spec = TrainSpec(MODEL.to_dict(), "", batch_size=2, seq_len=16, steps=2)
    return replace(spec, tokens=training.write_tokens(tmp_path, MODEL, spec.num_tokens))


def run_main(monkeypatch, capsys, module, *arguments) -> dict[str, float]:
    """Run a case in this process; return the numbers of its last line."""
    monkeypatch.setattr(sys, "argv", ["case", *arguments])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check_result(result: dict[str, float]) -> None:
    assert result["parameters"] == count_parameters(MODEL).total
    assert abs(result["first_loss"] - math.log(200)) < 0.15
    assert result["tokens_per_second"] == pytest.approx(2 * 16 / result["step_seconds"])
    assert result["peak_memory_mb"] > 50


# ---- cases -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [(), ("--optimizer", "adamw"), ("--batch_size", "1")])
def test_our_case_trains_as_the_script_does(monkeypatch, capsys, spec, flags):
    calls = []
    real = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *given: calls.append(len(given[1])) or real(*given))
    check_result(run_main(monkeypatch, capsys, train_case, replace(spec, flags=flags).to_json()))
    assert calls == 4 * [2 if "--batch_size" in flags else 1]  # two untimed steps, two timed ones; micro-batches


@pytest.mark.parametrize("kind", ["plain", "trainer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_trains_a_model_of_the_same_size(monkeypatch, capsys, spec, kind, dtype):
    pytest.importorskip("transformers")
    if kind == "trainer":
        pytest.importorskip("accelerate")
    from benchmarks.peer_cases import transformers_llama

    check_result(run_main(monkeypatch, capsys, transformers_llama, replace(spec, dtype=dtype).to_json(), kind))


def test_litgpt_trains_a_model_of_the_same_size(monkeypatch, capsys, spec):
    pytest.importorskip("litgpt")
    from benchmarks.peer_cases import litgpt_gpt

    check_result(run_main(monkeypatch, capsys, litgpt_gpt, spec.to_json()))


def test_peers_read_the_tokens_in_order_and_each_label_is_the_next_token(spec):
    pytest.importorskip("torch")
    from benchmarks.peer_cases.plain_loop import token_rows

    first, second = token_rows(spec, 0), token_rows(spec, 1)
    assert first[0].shape == (2, 16) and first[0].max() < 200
    assert first[0].flatten()[1:].tolist() == first[1].flatten()[:-1].tolist()
    assert first[1].flatten()[-1] == second[0].flatten()[0]


def test_cases_of_peers_import_nothing_of_ours_but_their_spec():
    ours = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {path.stem for path in ROOT.glob("*.py")}
    for path in [*ROOT.glob("benchmarks/peer_cases/*.py"), ROOT / "benchmarks/train_spec.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ours or name.startswith(
                    (
                        "benchmarks.peer_cases.",
                        "benchmarks.train_spec",
                        "benchmarks.decoding",
                        "benchmarks.rollout_settings",
                        "common",
                    )
                ), f"{path.name} imports {name}"


# ---- the table -------------------------------------------------------------------------------------------------------
PRINTS = "import json, sys; print(json.dumps({{'tokens_per_second': {speed}, 'peak_memory_mb': 9, {more}}}))"


def fake_case(name: str, spec: TrainSpec, flags=()) -> Case:
    code = PRINTS.format(
        speed=spec.batch_size, more=f"'parameters': {count_parameters(ModelConfig(**spec.model)).total}"
    )
    return Case(name, [sys.executable, "-c", code], metrics=training.METRICS)


@pytest.fixture
def run_table(monkeypatch, capsys, tmp_path):
    """Run a command with cases that print numbers at once. Returns its output."""

    def run(module, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["table", *arguments, "--rounds", "2", "--out_dir", str(tmp_path / "out")])
        module.main()
        return capsys.readouterr().out

    for module in (training, growth):
        monkeypatch.setattr(module, "our_case", fake_case)
        monkeypatch.setattr(
            module, "resolve", lambda device, dtypes: ("cpu", [n for n in dtypes if n != "auto"] or ["float32"])
        )
    return run


def test_a_trainer_given_as_a_command_gets_the_setting_and_a_row(run_table, tmp_path):
    code = PRINTS.format(speed="2 * float(sys.argv[1])", more="'seen': len(sys.argv)").replace('"', "'")
    peer = f'other={sys.executable} -c "{code}" {{batch_size}} {{dtype}} {{tokens}} {{seq_len}} {{steps}}'
    text = run_table(training, "--preset", "demo", "--peers", "none", "--peer", peer, "--ours", "tuned=--compile")
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) .*?\| ([\d.]+) ", text, re.M)
    assert rows[0] == ("other", "16", "1.00")
    assert [row[0] for row in rows[1:]] == ["Mengya, AdamW", "Mengya, Muon (default)", "Mengya, tuned"]
    assert rows[2][2] == "0.50"
    assert "8 x 512 tokens per step, float32; reading the batches counts. 4.6 M parameters." in text
    assert "\nother: its number of parameters is not stated." in text
    out = tmp_path / "out"
    assert json.loads((out / "training-demo.json").read_text())["other"]["seen"] == [6, 6]
    assert (out / "training-demo.md").read_text() == text and (out / "training-demo.png").stat().st_size > 1000


def test_two_dtypes_give_two_rows_of_each_but_of_a_command_without_dtype(run_table):
    code = PRINTS.format(speed=1, more="").replace('"', "'")
    text = run_table(training, "--preset", "demo", "--peers", "none", "--dtype", "float32,bfloat16",
                     "--peer", f'fp32 only={sys.executable} -c "{code}"')  # fmt: skip
    rows = re.findall(r"^\| (.+?) \| \d", text, re.M)
    assert rows == ["fp32 only", *(f"Mengya, {name}, {dtype}" for dtype in ("float32", "bfloat16")
                                   for name in ("AdamW", "Muon (default)"))]  # fmt: skip


def test_moe_is_compared_with_the_dense_model_of_equal_active_size(run_table):
    text = run_table(training, "--what", "moe")
    assert "The rows of a model have equally many parameters." in text
    assert re.findall(r"^\| (Mengya.+?) \|", text, re.M) == ["Mengya, dense of equal active size", "Mengya, MoE"]
    moe = ModelConfig(**PRESETS["small-moe"])
    dense = training.dense_of_equal_active_size(moe)
    router = moe.n_layers * moe.dim * moe.n_routed_experts
    assert count_parameters(dense).total == count_parameters(moe).active - router


def test_growth_draws_a_panel_per_axis(run_table, tmp_path):
    text = run_table(growth, "--batch_size", "8,2", "--experts", "none", "--processes", "1")
    assert re.findall(r"^\| ([a-z ]+) \|", text, re.M) == ["tokens per row", "rows per step", "layers", "processes"]
    assert "| 2 | 2 (2 to 2) |" in text and "| 8 | 8 (8 to 8) |" in text
    assert (tmp_path / "out/growth.png").stat().st_size > 1000


def test_growth_starts_processes_with_torchrun(spec):
    config = growth.GrowthConfig()
    point = {**config.base, "processes": 2}
    command = growth.point_case(config, "processes 2", point, spec).command
    assert command[1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    assert command[7] == "benchmarks.train_case" and '"n_layers": 4' in command[8]


# ---- error lines -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "keras"], "--peers keras: choose from none, transformers, compile, trainer, litgpt"),
        (["--dtype", "float64"], "--dtype float64: choose from auto, float32, bfloat16"),
        (["--peer", "python run.py"], "'python run.py': give a name, = and a command or flags"),
        (["--ours", "=--compile"], "give a name, = and a command or flags"),
    ],
)
def test_a_wrong_flag_gives_one_line(arguments, message):
    with one_line_error(message):
        parse(training.TrainingConfig, "", arguments)


def test_an_unknown_placeholder_and_a_missing_speed_are_named(spec):
    with one_line_error("--peer other: {vocab}: choose from {batch_size}, {seq_len}, {steps}, {dtype}"):
        training.command_case("other=python x.py {vocab}", spec)
    silent = training.command_case(f"silent={sys.executable} -c \"print('{{}}')\"", spec)
    with pytest.raises(UserError, match="silent: its last line has no tokens_per_second"):
        run_case(silent)


def test_a_failing_trainer_ends_the_table_with_its_last_line(spec):
    failing = training.command_case(f"failing={sys.executable} -c \"raise SystemExit('no GPU')\"", spec)
    with one_line_error("failing: exit code 1: no GPU"):
        run_rounds([failing], 1)


@pytest.mark.parametrize("text", ["0", "many", "-1"])
def test_a_wrong_value_of_an_axis_gives_one_line(text):
    with one_line_error(f"--layers {text}: give whole numbers of at least 1, or none"):
        growth.GrowthConfig(layers=("2", text))
