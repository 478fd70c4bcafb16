"""Command-line flags of every script.

Promises: every numeric flag has limits, an invalid number is a one-line error before any file is read, and every list
accepts commas.
"""

import argparse
import importlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cli import NameList
from common.errors import UserError
from common.flag_parser import FlagParser
from common.flag_types import NumberType, split_names
from tests.helpers import ROOT, TINY_MODEL_FLAGS, load_script, load_weights, read_jsonl, run_process, run_script

SCRIPTS = [*sorted(path.name for path in ROOT.glob("*.py")), "demo_world.generator", "demo_world.exam"]
INVALID_NUMBERS = ("-5", "nan", "inf", "1e400", "x", "")
# Flags that accept 0 (with its meaning) and flags that accept 0.5. Every other flag rejects them.
ZERO_MEANINGS = {
    "max_steps": "the epochs decide", "global_batch_size": "--batch_size", "max_minutes": "no limit",
    "min_lr_ratio": "to the end", "warmup_iters": "none", "n_routed_experts": "dense", "n_active_experts": "dense",
    "warmup_ratio": "--warmup_iters", "weight_decay": "none", "grad_clip": "no clipping", "seed": "a seed",
    "num_workers": "in this process", "local_rank": "a rank", "hidden_dim": "8/3 of dim", "dropout": "none",
    "n_shared_experts": "none", "balance_loss_coef": "none", "stage2_at": "nowhere", "tokens_per_param": "--epochs",
    "price_per_hour": "the table's", "lora_dropout": "none", "simpo_gamma": "no margin", "sft_weight": "none",
    "max_chosen_drop": "never", "history": "none", "temperature": "greedy", "top_k": "all", "min_p": "none",
    "shots": "none", "batch_tokens": "what suits the device", "port": "a free one", "max_queue": "none",
    "max_bad_fraction": "not one bad row", "val_fraction": "none",
    "sample_interval": "no answers", "samples": "none",
    "min_words": "no limit", "overlap": "one n-gram", "head_dim": "dim / n_heads",
    "no_repeat_ngram_size": "off", "frequency_penalty": "off", "penalty_window": "the whole answer",
    "length_penalty": "the sum decides", "lora_rank": "all weights", "kl_coef": "no KL", "min_entropy": "never",
    "max_reward_drop": "never", "clip_low": "never below 1",
    "max_loss_ratio": "no limit", "dist_timeout": "300 or 1800",
}  # fmt: skip
FRACTIONS = {
    "epochs", "max_minutes", "minutes", "learning_rate", "min_lr_ratio", "warmup_ratio", "weight_decay", "grad_clip",
    "norm_eps", "dropout", "balance_loss_coef", "mix_temperature", "stage2_at", "tokens_per_param",
    "utilisation", "price_per_hour", "alpha", "lora_dropout", "beta", "simpo_gamma", "sft_weight", "max_chosen_drop",
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "max_shard_gb",
    "val_fraction", "max_bad_fraction", "keep_fraction", "kl_coef", "clip_low", "clip_high", "min_entropy",
    "max_reward_drop",
    "overlap", "length_penalty", "dist_timeout",
}  # fmt: skip
PATHS = {
    "files",
    "checkpoint",
    "report",
    "texts",
    "against",
    "compare",
    "compare_on",
    "data",
}  # separated by spaces only, because a path may contain a comma


class _Captured(Exception):
    pass


def parser_of(script: str) -> FlagParser:
    """The parser that the script's main() creates."""
    with pytest.MonkeyPatch.context() as patch:

        def capture(parser, *_):
            raise _Captured(parser)

        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        patch.setattr(sys, "argv", [script])
        with pytest.raises(_Captured) as captured:
            (load_script(script) if script.endswith(".py") else importlib.import_module(script)).main()
    return captured.value.args[0]


def command_parsers(parser):
    """The parser, or those of its subcommands."""
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [sub for action in commands for sub in action.choices.values()] or [parser]


PARSERS = {parser.prog: parser for script in SCRIPTS for parser in command_parsers(parser_of(script))}
ACTIONS = [(prog, action) for prog, parser in PARSERS.items() for action in parser._actions]


def is_number(action) -> bool:
    number = isinstance(action.default, int | float) and not isinstance(action.default, bool)
    return number or action.type in (int, float) or isinstance(action.type, NumberType)


NUMBERS = [(prog, action.option_strings[0], action.dest) for prog, action in ACTIONS if is_number(action)]


def parse_flags(prog: str, *arguments: str):
    """Parse the arguments, with "x" for every required argument."""
    parser = PARSERS[prog]
    needed = [x for a in parser._actions if a.required and a.option_strings for x in (a.option_strings[0], "x")]
    return parser.parse_args(
        ["x" for a in parser._actions if a.required and not a.option_strings] + needed + [*arguments]
    )


def test_every_script_and_every_numeric_flag_is_covered():
    assert (
        len(PARSERS) >= 18 and len(NUMBERS) > 150 and all(isinstance(parser, FlagParser) for parser in PARSERS.values())
    )
    assert [(prog, a.dest) for prog, a in ACTIONS if is_number(a) and not isinstance(a.type, NumberType)] == []
    assert {dest for *_, dest in NUMBERS} >= {*ZERO_MEANINGS, *FRACTIONS}, "the tables name existing flags only"


MOST_FLAGS = 12  # of a command without main flags


@pytest.mark.parametrize("prog", PARSERS)
def test_help_shows_about_ten_flags_and_an_example(prog):
    parser = PARSERS[prog]
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest not in ("help", "help_all")]
    names = {option.lstrip("-") for a in shown for option in (a.dest, *a.option_strings)}
    visible = {a.dest for a in shown}
    text = parser.format_help()
    examples = text.split("\n", 1)[1]
    assert f"python {prog}" in examples or f"python -m {prog}" in examples
    if parser.main_flags:
        assert 8 <= len(parser.main_flags) <= 15 and {*parser.main_flags} < names
        assert f"--help_all describes the other {len(visible) - len(parser.main_flags)} flags" in text
    else:
        assert len(visible) <= MOST_FLAGS


@pytest.mark.parametrize(("prog", "flag", "dest"), NUMBERS)
def test_an_invalid_number_is_a_one_line_error(prog, flag, dest):
    has_zero = dest in ZERO_MEANINGS and prog != "web_demo.py"  # its --port must be known before the page starts
    rejected = [*INVALID_NUMBERS, *([] if has_zero else ["0"]), *([] if dest in FRACTIONS else ["0.5"])]
    for text in rejected:
        with pytest.raises(UserError) as error:
            parse_flags(prog, f"{flag}={text}")
        line = str(error.value)
        assert line.startswith("argument ") and f"{flag}" in line and "\n" not in line, line
    for text in {"0", "0.5"} - {*rejected}:
        value = getattr(parse_flags(prog, f"{flag}={text}"), dest)
        assert value == float(text)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["1-pretrain.py", "--max_steps", "-5"], "--max_steps"),
        (["3-full_sft.py", "--learning_rate", "-1"], "--learning_rate"),
        (["3-full_sft.py", "--weight_decay", "nan"], "--weight_decay"),
        (["data_process.py", "sft", "x", "--val_share", "inf"], "--val_share"),
        (["serve_openai_api.py", "--port", "99999"], "--port"),
    ],
)
def test_the_process_ends_with_code_2(command, flag):
    ended = run_process(sys.executable, *command)
    assert (ended.returncode, ended.stdout) == (2, "") and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"error: argument {flag}: ") and f"python {command[0]}" in ended.stderr


# ---- steps and epochs ------------------------------------------------------------------------------------------------
@pytest.fixture
def pretrain(monkeypatch, pretrain_dir, tokenizer_dir, tmp_path):
    def run(*flags):
        paths = ["--data_path", pretrain_dir, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path]
        short = [
            *TINY_MODEL_FLAGS,
            "--device",
            "cpu",
            "--batch_size",
            "8",
            "--log_interval",
            "1",
            "--eval_tokens",
            "64",
        ]
        run_script(monkeypatch, "1-pretrain.py", *paths, *short, *flags)
        return [row["step"] for row in read_jsonl(tmp_path / "pretrain_32.jsonl") if "loss" in row][-1]

    return run


def test_without_a_limit_of_steps_the_epochs_decide(pretrain):
    assert pretrain("--max_steps", "3") == 3
    assert pretrain("--max_steps", "-1", "--resume", "never") == 8, "59 rows in batches of 8; the model is replaced"
    assert pretrain("--max_steps", "0", "--epochs", "0.5", "--resume", "never") == 4


def test_a_run_without_steps_never_replaces_a_model(pretrain, monkeypatch, tmp_path):
    pretrain("--max_steps", "2")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("pretrain_32.*")}
    monkeypatch.setattr("trainer.sampler.BatchSampler.num_steps", lambda *_: 0)
    with pytest.raises(UserError, match="a run of 0 steps trains nothing"):
        pretrain("--resume", "never")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("pretrain_32.*")} == before
    assert load_weights(tmp_path / "pretrain_32.pth")


@given(st.integers(1, 10**6), st.integers(1, 400))
def test_epochs_in_hundredths_are_exact(steps, hundredths):
    """0.1 epochs of 30 steps are 3 steps, although 0.1 * 30 > 3 in floating point."""
    from trainer.sampler import BatchSampler

    plan = BatchSampler(steps, None, 1, seed=0)
    assert plan.num_steps(0, float(f"{hundredths / 100:.2f}")) == -(-steps * hundredths // 100)
    assert plan.num_steps(7, 0.5) == 7 and plan.num_steps(0, 1e-9) == 1


# ---- lists -----------------------------------------------------------------------------------------------------------
def test_every_list_but_paths_takes_commas():
    several = {(prog, a.dest) for prog, a in ACTIONS if isinstance(a, NameList) or a.nargs in ("+", "*")}
    lists = {(prog, a.dest) for prog, a in ACTIONS if isinstance(a, NameList)}
    assert {dest for _, dest in several - lists} == PATHS
    expected = {"targets", "data_fractions", "mix", "stage2_mix", "subjects", "cors", "skip", "also", "languages"}
    assert {dest for _, dest in lists} == expected | {"allowed_hosts"}


TWO_NAMES = (
    ["a_b,c"],
    ["a_b", "c"],
    ["a_b,", "c"],
    ["a_b", ",c"],
    ["a_b , c"],
    ["a_b，c"],
    ["a_b,c,"],
    ["a_b", "c,a_b"],
)


@pytest.mark.parametrize("given_as", TWO_NAMES, ids=str)
@pytest.mark.parametrize(
    ("prog", "flag"), [("4-lora_sft.py", "targets"), ("eval_ceval.py", "subjects"), ("serve_openai_api.py", "cors")]
)
def test_commas_and_spaces_are_equal_separators(prog, flag, given_as):
    assert getattr(parse_flags(prog, f"--{flag}", *given_as), flag) == ["a_b", "c"]


def test_lists_with_their_own_parser_take_commas():
    for texts in (["0.3,0.1"], ["0.3", "0.1"], ["0.3,", "0.1"]):
        assert parse_flags("3-full_sft.py", "--data_share", *texts).data_fractions == [0.1, 0.3]
    for texts in (["zh=0.25,en=0.75"], ["zh=0.25", "en=0.75"], ["zh=0.25,", "en=0.75"]):
        assert parse_flags("1-pretrain.py", "--mix", *texts).mix.weights == {"zh": 0.25, "en": 0.75}
    with pytest.raises(UserError, match=r"argument --data_share: 0\.1,2: each fraction"):
        parse_flags("3-full_sft.py", "--data_share", "0.1", "2")


def test_a_list_before_files_is_one_argument():
    args = PARSERS["data_process.py clean"].parse_args(
        ["--skip", "unsafe,repair", "--languages", "en, zh", "a.txt", "b,c"]
    )
    assert (args.skip, args.languages, args.files) == (["unsafe", "repair"], ["en", "zh"], ["a.txt", "b,c"])


@given(
    st.lists(st.text("abc_-:/.1", min_size=1), unique=True, max_size=5), st.sampled_from([",", " ", ", ", "，", " ,"])
)
def test_names_survive_any_separator(names, separator):
    assert split_names(separator.join(names)) == names


def test_a_path_with_a_comma_stays_one_path(tmp_path):
    assert parse_flags("2-eval.py", "--report", "a,b.pth", "c.pth").report == ["a,b.pth", "c.pth"]
    assert Path(parse_flags("export_model.py").checkpoint) == Path("x")
