"""Promise: for a path of the wrong kind a script exits early with code 2 and one line.

The tests combine each flag that takes a path with each unexpected path: a file for a folder and the reverse, a broken
link, a cycle of links, a device, a folder in /proc, a name that is too long, and files with other content.
"""

import os
import random
import shutil
import stat
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import check_writable
from tests.faults.odd_inputs import disable_servers, make_tiny_inputs, script_outcome
from tests.helpers import run_process
from tests.scripts.test_flags import ACTIONS


@pytest.fixture(scope="module")
def tiny_inputs(tmp_path_factory, tokenizer, tokenizer_dir, pretrain_dir, sft_dir):
    return make_tiny_inputs(tmp_path_factory.mktemp("world"), tokenizer, tokenizer_dir, pretrain_dir, sft_dir)


@pytest.fixture(scope="module")
def odd_paths(tmp_path_factory):
    """name -> a path that no script expects."""
    folder = tmp_path_factory.mktemp("places")
    made = {name: folder / name for name in ("empty", "folder", "file", "broken", "loop", "binary.pth", "text.pth")}
    made["folder"].mkdir()
    made["empty"].write_bytes(b"")
    made["file"].write_text("not what you think\n")
    made["binary.pth"].write_bytes(bytes(range(256)) * 40)
    made["text.pth"].write_text("weights\n" * 50)
    made["broken"].symlink_to(folder / "gone" / "away")
    made["loop"].symlink_to(made["loop"])
    for name, content in {
        "a.json": "[" * 5000,
        "b.json": '{"a": ',
        "c.jsonl": b'{"text": "\xff\xfe"}\n',
        "d.csv": "a,b\n",
        "e.txt": "\0" * 100,
        "meta.json": "[]",
        "config.json": '{"model_type": "llama"}',
        "tokenizer.json": "{}",
        "report.json": "7",
        "lineage.json": "{}",
        "adapter_config.json": "[]",
    }.items():
        (made["folder"] / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        made[name] = made["folder"] / name
    made |= {
        "nothing": folder / "nothing",
        "below a file": made["file"] / "x",
        "below nothing": folder / "no" / "such",
        "/dev/null": Path("/dev/null"),
        "/proc": Path("/proc/self"),
        "new folder in /proc": Path("/proc/self/new"),
        "root": Path("/"),
        "too long": folder / ("n" * 300),
        "too deep": Path("/".join(["d"] * 3000)),
        "-": Path("-"),
        "a file of /proc": Path("/proc/self/cmdline"),
    }
    return {name: str(odd_path) for name, odd_path in made.items()}


def path_flags():
    """(prog, action) of every flag and argument that takes a path."""
    return [
        (prog, action)
        for prog, action in ACTIONS
        if getattr(action.type, "__name__", "") in ("path_string", "pathlib_path") and prog in KNOWN
    ]


KNOWN = {prog for prog, _ in ACTIONS}
POSITIONAL = {"files": 1, "checkpoint": 0, "folder": 1}  # index among a script's flags in TinyInputs.flags
REQUIRES = {  # other flags that a flag requires
    "questions": {"3-full_sft.py": ["--data_share", "0.5"]},
    "texts": {"2-eval.py": ["--report"]},
    "chats": {"2-eval.py": ["--report"]},
    "compare_on": {"train_tokenizer.py": ["--compare", "TOKENIZER"]},
    "out": {"train_tokenizer.py": ["--compare", "TOKENIZER"]},
}
EXCLUDES = {  # flags of TinyInputs.flags that the flag excludes
    ("2-eval.py", "prompts"): "--prompt", ("2-eval.py", "questions"): "--prompt",
    ("2-eval.py", "report"): "--checkpoint", ("2-eval.py", "texts"): "--checkpoint",
    ("2-eval.py", "chats"): "--checkpoint", ("eval_ceval.py", "model"): "--checkpoint",
}  # fmt: skip


def command(tiny_inputs, prog, action, odd_path):
    """Flags with which a script succeeds, with one path replaced by `odd_path`."""
    flags = tiny_inputs.flags(prog)
    if not action.option_strings:
        first = 1 if prog.startswith("data_process.py") else 0
        flags[first + (action.dest == "folder")] = odd_path
        return flags
    flag, given = action.option_strings[0], {EXCLUDES.get((prog, action.dest))} - {None}
    if action.dest in ("compare", "compare_on", "out") and prog == "train_tokenizer.py":
        flags = []
    for name in (given, {flag})[flag in flags] | given:
        if name in flags:
            at = flags.index(name)
            del flags[at : at + 2]
    more = [
        tiny_inputs.tokenizer if word == "TOKENIZER" else word for word in REQUIRES.get(action.dest, {}).get(prog, [])
    ]
    value = f"zh={odd_path}" if action.dest == "texts" else odd_path
    return [*flags, *more, f"{flag}={value}"]


def test_every_unexpected_path_for_every_flag_is_used_or_refused(
    tiny_inputs, odd_paths, monkeypatch, capsys, num_attacks, record_attacks
):
    disable_servers(monkeypatch)
    monkeypatch.chdir(tiny_inputs.folder)
    cases = [(prog, action, name) for prog, action in path_flags() for name in odd_paths]
    chosen = random.Random(0).sample(cases, min(num_attacks(120, len(cases)), len(cases)))
    outcomes, wrong = [], []
    for prog, action, name in chosen:
        if name == "root" and action.dest in ("out_dir", "out_root", "json", "out", "folder", "peft_dir"):
            continue  # root may write there
        try:
            outcomes.append(
                script_outcome(monkeypatch, capsys, prog, command(tiny_inputs, prog, action, odd_paths[name]))
            )
        except AssertionError as error:
            wrong.append(f"{prog} {action.dest} {name}: {error}")
    assert not wrong, f"{len(wrong)} of {len(chosen)}\n" + "\n".join(wrong)
    record_attacks(
        "unexpected paths for flags", len(outcomes), done=outcomes.count("done"), refused=outcomes.count("refused")
    )
    assert outcomes.count("refused") > len(outcomes) / 2


@pytest.mark.parametrize(
    "script", ["1-pretrain.py", "3-full_sft.py", "4-lora_sft.py", "5-dpo_train.py", "6-grpo_train.py"]
)
@pytest.mark.parametrize(
    "name", ["file", "below a file", "broken", "loop", "new folder in /proc", "/dev/null", "too long"]
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    script, name, tiny_inputs, odd_paths, monkeypatch, capsys
):
    """The inputs do not exist, but the error names the output."""
    shutil.rmtree(Path(odd_paths["broken"]).parent / "gone", ignore_errors=True)  # another test creates it
    flags = ["--data_path", "/no/data", "--out_dir", odd_paths[name], *(["--init_from", "/no"] * (script > "2"))]
    assert script_outcome(monkeypatch, capsys, script, flags) == "refused"
    with pytest.raises(UserError, match="cannot write"):
        check_writable(odd_paths[name])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tiny_inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    for script in ("1-pretrain.py", "3-full_sft.py"):
        flags = [*tiny_inputs.flags(script), "--out_dir", str(tmp_path / "out")]
        assert script_outcome(monkeypatch, capsys, script, flags) == "refused"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o500


def test_checking_an_output_creates_no_files(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error(tmp_path):
    script = f"{sys.executable} data_process.py download | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    ended = run_process("bash", "-c", script)
    assert "Traceback" not in ended.stderr and ended.stdout.strip() in ("0", "141")
