import json
from types import SimpleNamespace

import pytest

from benchmarks import decoding, generation
from benchmarks.decode_mengya import MengyaGenerator
from benchmarks.decoding import DecodingConfig, busy_cores, measure_generator
from benchmarks.generation import GenerationConfig, add_limits, make_cases, write_report
from benchmarks.inputs import InputsConfig, make_inputs
from benchmarks.memory_read import measure_reads
from benchmarks.peer_cases.transformers_generate import TransformersGenerator
from common import cli
from common.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(InputsConfig(folder, "demo", decoding.CONTEXT))
    return folder


class ClockedGenerator:
    """Takes 20 ms for the prompt and 2 ms for each further token, on a clock of its own."""

    weight_bytes = 10

    def __init__(self):
        self.prompts, self.now = [], 0.0

    def generate(self, prompts, new_tokens):
        self.prompts += prompts
        self.now += 0.02 + 0.002 * (new_tokens - 1)

    def token_times(self, prompt, new_tokens):
        return [0.001 * i for i in range(new_tokens)]


def test_speed_leaves_out_the_prompt_and_prompts_are_never_repeated(tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps({"vocab_size": 6400}))
    generator = ClockedGenerator()
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: generator.now))
    numbers = measure_generator(generator, DecodingConfig(tmp_path, rows=("1", "4"), busy=True))
    assert numbers["tokens_per_second_1_row"] == pytest.approx(500)
    assert numbers["tokens_per_second_4_rows"] == pytest.approx(2000)
    assert numbers["first_token_ms_64"] == pytest.approx(20) and numbers["weight_bytes"] == 10
    assert numbers["busy_median_ms"] == pytest.approx(1)
    assert len({tuple(prompt) for prompt in generator.prompts}) == len(generator.prompts)


def test_busy_loops_end_with_the_block():
    with busy_cores():
        pass


@pytest.mark.parametrize(("generator", "dtype", "size"), [
    (MengyaGenerator, "float32", 4), (MengyaGenerator, "bfloat16", 2), (MengyaGenerator, "int8", 1),
    (TransformersGenerator, "float32", 4), (TransformersGenerator, "bfloat16", 2),
])  # fmt: skip
def test_a_generator_writes_exactly_the_requested_tokens(generator, dtype, size, folder):
    """Each of them fails by an assertion if a row ends early."""
    made = generator(DecodingConfig(folder, dtype=dtype))
    made.generate([[500 + i for i in range(20)], [600 + i for i in range(20)]], 12)
    times = made.token_times([700 + i for i in range(20)], 12)
    assert len(times) == 12 and times == sorted(times)
    assert made.weight_bytes == (4589824 - 256 * 9) * size


def test_memory_reads_are_measured():
    numbers = measure_reads(8)
    assert numbers["gb_per_second"] == max(numbers["gb_per_second_float32"], numbers["gb_per_second_bfloat16"]) > 0


def results():
    return {
        "memory": {"gb_per_second": [10.0, 20.0]},
        "peer": {"tokens_per_second_1_row": [50.0, 100.0], "tokens_per_second_16_rows": [100.0, 200.0]},
        "Mengya, float32": {
            "tokens_per_second_1_row": [80.0, 120.0],
            "tokens_per_second_16_rows": [500.0, 600.0],
            "weight_bytes": [1e8, 1e8],
            "first_token_ms_64": [3.0, 4.0],
        },
    }


def test_the_percentage_of_the_limit_is_that_of_the_round():
    found = results()
    assert add_limits(found) == [10, 20]
    assert found["Mengya, float32"]["percent_of_limit"] == [80, 60]
    assert "percent_of_limit" not in found["peer"] and "memory" not in found


def test_the_report_has_a_table_for_each_number_of_rows(tmp_path, capsys):
    found, config = results(), GenerationConfig(out_dir=str(tmp_path))
    write_report(config, found, add_limits(found), {"vocab_size": 6400})
    text = (tmp_path / "generation-small.md").read_text()
    assert text == capsys.readouterr().out
    assert "| Mengya, float32 | 550.0 (500.0 to 600.0) | 4.00 (3.00 to 5.00) |" in text
    assert "memory reads 15.0 GB/s (10.0 to 20.0)" in text
    assert (tmp_path / "generation-small.png").is_file() and (tmp_path / "generation-small.json").is_file()


def test_cases_are_one_per_dtype_with_the_peers_first(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "peer_python", lambda names: f"python-of-{names[0]}")
    config = cli.parse(GenerationConfig, "", ["--peer", "x=run {folder} {dtype} {rows}", "--rows", "1,4"])
    cases = {case.name: case for case in make_cases(config, tmp_path)}
    assert [*cases] == [
        *("memory", "transformers, float32", "transformers, bfloat16", "llama.cpp, f32", "llama.cpp, q8_0"),
        *("x, float32", "x, bfloat16", "Mengya, float32", "Mengya, bfloat16", "Mengya, int8"),
    ]
    assert cases["llama.cpp, q8_0"].command[0] == "python-of-llama.cpp"
    assert cases["x, bfloat16"].command == ["run", str(tmp_path), "bfloat16", "1,4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers", "vllm"], "--peers vllm: choose from none, transformers, llama.cpp"),
        (["--dtypes", "int4"], "--dtypes int4: choose from"),
        (["--rows", "0"], "--rows 0: give whole numbers"),
        (["--peer", "name"], "give NAME=COMMAND"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        cli.parse(GenerationConfig, "", flags)
