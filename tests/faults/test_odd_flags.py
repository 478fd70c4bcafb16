"""Promise: a script accepts any flags or refuses them in one line; invalid values are refused before any file is read.

The tests introspect the parsers (tests/scripts/test_flags.py), so they cover new flags without a change.
"""

import os
import random
from pathlib import Path

import pytest

from common.errors import UserError, escape_controls
from common.flag_types import MAX_FLAG_VALUE, NumberType
from tests.faults.odd_inputs import disable_servers, make_tiny_inputs, script_outcome
from tests.helpers import run_here, run_script
from tests.scripts.test_flags import ACTIONS, NUMBERS, PARSERS, is_number, parse_flags

HUGE = ("9" * 30, str(2**63), str(2**64), "1e300", "1e400", "-1e400", "9" * 5000)
STRANGE = (
    "",
    " ",
    "\0",
    "-",
    "--",
    "\x1b[2J",
    "\ud800",
    "x\ny",
    "x" * 5000,
    "１",
    "1_0",
    "0x10",
    "1,5",
    "None",
    "nan",
    "[]",
)
# Values for runs of numeric flags, where the limit of the flag allows them.
LARGE = ("1", "2", "3", "1000", "1000000000", "1000000000000", "0.999999", "1e-37")
# Flags that accept any text.
FREE_TEXT = {"prompt", "system", "inspect", "keys", "source_key", "mirror", "partition", "time", "split", "only"}
LONG = {"max_steps", "epochs", "tokens_per_param", "max_minutes", "minutes"}  # a larger value makes the run longer


@pytest.fixture(scope="module")
def tiny_inputs(tmp_path_factory, tokenizer, tokenizer_dir, pretrain_dir, sft_dir):
    return make_tiny_inputs(tmp_path_factory.mktemp("world"), tokenizer, tokenizer_dir, pretrain_dir, sft_dir)


# ---- parsing ---------------------------------------------------------------------------------------------------------
def test_every_flag_has_a_limit():
    """Every flag except FREE_TEXT has choices, a type or a parser."""
    unlimited = [
        (prog, action.dest)
        for prog, action in ACTIONS
        if action.nargs != 0 and not (action.choices or action.type or hasattr(action, "parse"))
    ]
    assert {dest for _, dest in unlimited} <= FREE_TEXT, unlimited


def test_every_unusual_value_of_every_flag_is_parsed_or_refused_in_one_line(record_attacks):
    read = refused = 0
    for prog, action in ACTIONS:
        if action.nargs == 0 or not action.option_strings:
            continue
        for text in (*HUGE, *STRANGE):
            try:
                value = getattr(parse_flags(prog, f"{action.option_strings[0]}={text}"), action.dest)
                read += 1
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 6000
                continue
            if isinstance(value, int | float):
                assert abs(value) <= MAX_FLAG_VALUE, f"{prog} {action.dest}={text[:30]}: {value}"
    record_attacks("unusual values of flags, parsed", read + refused, read=read, refused=refused)
    assert refused > read


@pytest.mark.parametrize(("prog", "flag", "dest"), NUMBERS)
def test_a_number_beyond_its_limit_is_refused(prog, flag, dest):
    for text in HUGE:
        with pytest.raises(UserError, match=rf"argument .*{flag}"):
            parse_flags(prog, f"{flag}={text}")


def test_a_file_to_download_must_be_inside_the_repository():
    for name in ("..", "../x", "a/../../x", "/etc/passwd", "a\\..\\b", "C:\\x", ".", "a//b", "a/"):
        with pytest.raises(UserError, match="not a path inside the repository"):
            parse_flags("data_process.py download", f"--file={name}")
    assert parse_flags("data_process.py download", "--file=data/a.jsonl").file == ["data/a.jsonl"]


@pytest.mark.parametrize(
    "name", ["xpu", "meta", "cuda:", "cuda:x", "cuda:-1", "cuda:9999", "cpu:0", "CPU", "mps:1", " "]
)
def test_unsupported_devices_are_refused(name):
    for prog, action in ACTIONS:
        if action.dest == "device":
            with pytest.raises(UserError, match="not a device"):
                parse_flags(prog, f"--device={name}")


def test_control_characters_are_escaped(capsys, monkeypatch):
    assert escape_controls("a\x1b[2J\u202e太阳\ud800\n") == "a\\x1b[2J\\u202e太阳\\ud800\\n"
    assert escape_controls("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"
    ended = run_here(monkeypatch, capsys, "2-eval.py", "--checkpoint", "no\x1b[2Jfile\n.pth", "--prompt", "x")
    assert ended.returncode == 2 and "\x1b" not in ended.stderr and ended.stderr.count("\n") == 1


# ---- running ---------------------------------------------------------------------------------------------------------
def run_with_odd_flags(tiny_inputs, monkeypatch, capsys, cases):
    """Run each script with additional flags; returns the outcomes, "done" or "refused"."""
    disable_servers(monkeypatch)
    outcomes, wrong = [], []
    for prog, flags in cases:
        try:
            outcomes.append(script_outcome(monkeypatch, capsys, prog, [*tiny_inputs.flags(prog), *flags]))
        except AssertionError as error:
            wrong.append(f"{prog} {flags}: {error}")
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n".join(wrong)
    return outcomes


def test_a_model_of_impossible_sizes_is_refused(tiny_inputs, monkeypatch, capsys):
    for flags in (
        ["--dim", "0"], ["--n_layers", "0"], ["--n_heads", "0"], ["--n_kv_heads", "0"], ["--max_seq_len", "0"],
        ["--dim", "65536", "--n_layers", "1000"], ["--hidden_dim", "1000000", "--n_layers", "1000"],
        ["--use_moe", "--n_routed_experts", "4096", "--n_layers", "1000"], ["--head_dim", "3"], ["--n_heads", "3"],
        ["--max_seq_len", "8000000", "--head_dim", "512"], ["--seed", "-1"], ["--learning_rate", "nan"],
        ["--learning_rate", "-1"], ["--weight_decay", "-5"], ["--grad_clip", "-1"], ["--device", "xpu"],
        ["--dtype", "int8"],
    ):  # fmt: skip
        assert run_with_odd_flags(tiny_inputs, monkeypatch, capsys, [("1-pretrain.py", flags)]) == ["refused"], flags


def test_the_largest_numbers_of_each_flag_run_or_are_refused(
    tiny_inputs, monkeypatch, capsys, num_attacks, record_attacks
):
    cases = []
    for prog, flag, dest in NUMBERS:
        for text in LARGE:
            if dest in LONG and float(text) > 2:
                continue
            try:
                parse_flags(prog, f"{flag}={text}")
            except UserError:
                continue
            cases.append((prog, [f"{flag}={text}"]))
    chosen = random.Random(0).sample(cases, min(num_attacks(8, len(cases)), len(cases)))
    outcomes = run_with_odd_flags(tiny_inputs, monkeypatch, capsys, chosen)
    record_attacks(
        "numbers of flags, run", len(outcomes), done=outcomes.count("done"), refused=outcomes.count("refused")
    )
    assert "done" in outcomes


def is_path(action) -> bool:
    return getattr(action.type, "__name__", "") in ("path_string", "pathlib_path")


def test_paths_and_numbers_are_declared_with_a_type():
    assert sum(is_path(action) for _, action in ACTIONS) > 60
    assert all(isinstance(action.type, NumberType) for _, action in ACTIONS if is_number(action))


@pytest.mark.parametrize("prog", PARSERS)
def test_non_utf_8_names_run_or_are_refused(prog, tiny_inputs, monkeypatch, capsys, record_attacks):
    """The output folder and a link to each input except models have such a name."""
    odd, flags = os.fsdecode(b"caf\xe9 \xff"), []
    for flag in tiny_inputs.flags(prog):
        place = Path(flag)
        if place.is_relative_to(tiny_inputs.folder) and place.exists() and place.suffix != ".pth":
            link = place.with_name(place.stem + odd + place.suffix)
            if not link.is_symlink():
                link.symlink_to(place)
            flag = str(link)
        flags.append(flag + odd if flag.endswith("/out") else flag)
    outcomes = run_with_odd_flags(tiny_inputs, monkeypatch, capsys, [(prog, [])])
    outcomes.append(script_outcome(monkeypatch, capsys, prog, flags))
    record_attacks("names that are not UTF-8", 1, **{outcomes[1]: 1})
    assert outcomes[0] == outcomes[1], "the name does not change the outcome"


def test_a_model_whose_name_is_not_utf_8_is_refused_with_the_reason(tiny_inputs, monkeypatch, capsys):
    link = tiny_inputs.folder / os.fsdecode(b"parent\xff.pth")
    link.symlink_to(tiny_inputs.parent__pth)
    with pytest.raises(UserError, match="the name is not UTF-8, torch cannot open it: rename"):
        run_script(monkeypatch, "2-eval.py", "--checkpoint", link, "--prompt", "x")
