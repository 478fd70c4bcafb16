"""Promise: no input file executes code: checkpoints, resume folders, data, tokenizers, templates, archives.

The source has no call that executes its input. Each script, started with files that create a marker file when executed,
creates no marker, prints no traceback and exits with 0 or 2.
"""
# ruff: noqa: E501  (tables of attacks)

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from curation.download import unpack_archive
from model.chat_template import UnsupportedChatError
from model.jinja_template import JinjaTemplate
from tests.helpers import ROOT, TINY_MODEL_FLAGS

SOURCES = sorted(file for file in ROOT.glob("**/*.py") if not {"tests", ".venv"} & set(file.relative_to(ROOT).parts))
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "yaml", "code", "pty"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {("os", "system"), ("os", "popen"), ("torch", "package"), ("torch.jit", "load"), ("runpy", "run_path")}
# Modules whose public functions unpickle.
READERS = ("torch.distributed.checkpoint", "torch.hub", "torch.package", "multiprocessing.connection")


# ---- the code --------------------------------------------------------------------------------------------------------
def dotted_name(node: ast.AST) -> str:
    """ "a.b.c" of an expression of names; "" of any other."""
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def find_executing_calls(tree: ast.AST) -> list[str]:
    """Imports and calls of a module that could execute their input, as "line: reason"."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"{node.lineno}: imports {name}" for name in names
                  if name.split(".")[0] in MODULES or name.startswith(READERS)]  # fmt: skip
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {reason}" for reason in describe_executing_call(node)]
    return found


def describe_executing_call(node: ast.Call) -> list[str]:
    name = dotted_name(node.func)
    given = {word.arg: word.value for word in node.keywords}
    is_true = lambda word: word in given and not (isinstance(given[word], ast.Constant) and not given[word].value)
    is_literal = lambda word, value: isinstance(given.get(word), ast.Constant) and given[word].value is value
    owner, _, last = name.rpartition(".")
    found = []
    is_builtin = isinstance(node.func, ast.Name) and name in BUILTINS
    if is_builtin or (owner, last) in CALLS or name.startswith(READERS):
        found.append(f"calls {name}")
    if last == "load" and owner == "torch" and not is_literal("weights_only", True):
        found.append("torch.load without weights_only=True")
    if last == "load" and owner in ("np", "numpy") and is_true("allow_pickle"):
        found.append("np.load with allow_pickle")
    found += [f"{name} with {word}" for word in ("trust_remote_code", "shell", "allow_pickle") if is_true(word)]
    if (
        last == "from_pretrained"
        and owner.split(".")[0] == "transformers"
        and not is_literal("trust_remote_code", False)
    ):
        found.append("from_pretrained without trust_remote_code=False")
    if last == "extractall" and not is_literal("filter", "data"):
        found.append("extractall of an archive")
    return found


def test_no_call_in_the_source_executes_its_input(record_attacks):
    assert len(SOURCES) > 100
    found = {str(file.relative_to(ROOT)): reasons for file in SOURCES
             if (reasons := find_executing_calls(ast.parse(file.read_text(encoding="utf-8"))))}  # fmt: skip
    # It runs a script of the checkout that is named on its command line, as Python does.
    assert found.pop("benchmarks/call_recorder.py")[0].endswith("calls runpy.run_path")
    assert not found
    record_attacks("source files searched for calls that execute", len(SOURCES), found=0)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import load", "import yaml", "torch.load(path)", "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)", "eval(text)", "exec(text)", "os.system(text)",
        "subprocess.run(text, shell=True)", "x.from_pretrained(p, trust_remote_code=True)", "tar.extractall()",
        "transformers.AutoTokenizer.from_pretrained(p)", "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
    ],
)  # fmt: skip
def test_the_search_finds_executing_calls(code):
    assert find_executing_calls(ast.parse(code))


# ---- malicious files -------------------------------------------------------------------------------------------------
class ExecutesOnLoad:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def malicious_files(marker: Path) -> dict[str, bytes]:
    """Pickles that create `marker`, in the formats of weights and arrays."""
    plain = pickle.dumps({"model": ExecutesOnLoad(marker), "format": 1})
    saved = io.BytesIO()
    torch.save({"format": 1, "stage": "pretrain", "model": {}, "x": ExecutesOnLoad(marker)}, saved)
    legacy = io.BytesIO()
    torch.save({"model": ExecutesOnLoad(marker)}, legacy, _use_new_zipfile_serialization=False)
    numpy = io.BytesIO()
    np.save(numpy, np.array([ExecutesOnLoad(marker)], dtype=object), allow_pickle=True)
    return {"pickle": plain, "torch": saved.getvalue(), "legacy": legacy.getvalue(), "npy": numpy.getvalue()}


def test_the_malicious_files_execute_with_an_unsafe_reader(tmp_path):
    """Checks the attack: unsafe readers execute the files."""
    marker = tmp_path / "executed"
    for kind, content in malicious_files(marker).items():
        if kind == "npy":
            np.load(io.BytesIO(content), allow_pickle=True)
        elif kind == "pickle":
            pickle.loads(content)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        assert marker.exists(), kind
        marker.unlink()


def run_in_folder(folder: Path, *command) -> subprocess.CompletedProcess:
    """Run a script in the folder of the malicious files; asserts exit code 0 or 2 and no traceback."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("PYTHONPATH", None)
    script, *arguments = map(str, command)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done


def plant_python(folder: Path, marker: Path) -> None:
    """Files that Python, pytest or streamlit execute if the folder is on their search path."""
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    for name in ("sitecustomize.py", "usercustomize.py", "conftest.py", "torch.py", "numpy.py", "json.py", "model.py",
                 "corpus.py", "setup.py", "__init__.py", "pages/1_page.py", "modeling_x.py", "streamlit.py"):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    (folder / ".env").write_text(f"PYTHONSTARTUP={folder}/sitecustomize.py\nBASH_ENV={folder}/x\n")
    (folder / "x.pth").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")


KINDS = ("pickle", "torch", "legacy", "npy")
PLACES = ("checkpoint", "resume", "shards", "scores")
FULL = os.environ.get("FAULTS") == "full"
CASES = [(place, kind) for place in PLACES for kind in KINDS]
SHORT = [("checkpoint", "torch"), ("resume", "pickle"), ("shards", "npy")]


@pytest.mark.parametrize(("place", "kind"), CASES if FULL else SHORT)
def test_a_pickle_in_place_of_any_input_is_never_executed(
    kind, place, marker, tmp_path, tiny_parent, tokenizer_dir, pretrain_dir, sft_dir, record_attacks
):
    content = malicious_files(marker)[kind]
    out, data = tmp_path / "out", tmp_path / "data"
    out.mkdir()
    plant_python(tmp_path, marker)
    shutil.copytree(pretrain_dir, data)
    pretrain = ["1-pretrain.py", *TINY_MODEL_FLAGS, "--device", "cpu", "--epochs", "1", "--batch_size", "8",
                "--tokenizer_path", tokenizer_dir, "--data_path", data, "--out_dir", out]  # fmt: skip
    if place == "checkpoint":
        (out / "pretrain_32.pth").write_bytes(content)
        commands = [["2-eval.py", "--out_dir", out, "--prompt", "x"], ["export_model.py", out / "pretrain_32.pth"],
                    ["3-full_sft.py", "--out_dir", out, "--data_path", sft_dir, "--device", "cpu"]]  # fmt: skip
        results = [run_in_folder(tmp_path, *command) for command in commands]
        assert all(done.returncode == 2 for done in results)
    elif place == "resume":
        step = out / "pretrain_32.resume" / "step_000000002"
        step.mkdir(parents=True)
        for name in (
            ".metadata",
            "__0_0.distcp",
            "rank_00000.safetensors",
            "rank_00000.json",
            "progress.json",
            "state.pt",
        ):
            (step / name).write_bytes(content)
            (step.parent / name).write_bytes(content)
        run_in_folder(tmp_path, *pretrain)
        (step / "progress.json").write_text(json.dumps({"step": 2, "rows_per_step": 8, "ranks": 1, "identity": {}}))
        run_in_folder(tmp_path, *pretrain)
    elif place == "shards":
        for file in (*data.glob("*.bin"), *data.glob("*.npy")):
            file.write_bytes(content)
        run_in_folder(tmp_path, *pretrain)
    else:
        for file in (out / "reference.pt", data / "scores.npy", data / "hashes_00000.npy", data / "first.npy"):
            file.write_bytes(content)
        run_in_folder(tmp_path, *pretrain)
    record_attacks("malicious files read by the scripts", 1, executed=int(marker.exists()))


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map(dict(a=messages)) }}",
    "attr": "{{ (messages | attr('__class__')) | attr('__base__') }}",
    "map": "{{ messages | map(attribute='__class__') | list }}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "include": "{% include '/etc/passwd' %}",
    "self": "{{ self._TemplateReference__context.environment }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f.__call__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__['sys'].modules['os'].system('touch MARKER') }}",
    "generator": "{% set g = messages | map('upper') %}{{ g.gi_frame.f_back.f_globals }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_chat_template_has_no_access_to_python_objects(name, marker):
    template = JinjaTemplate(ESCAPES[name].replace("MARKER", str(marker)), {}, re.compile("</s>"))
    try:
        message = template.text([{"role": "user", "content": "x"}])
    except (UnsupportedChatError, UserError) as error:
        message = str(error)
    assert not any(
        word in message for word in ("<class", "<frame", "root:", "'__builtins__'", "<module", "<jinja2.env")
    )


def test_code_in_a_transformers_folder_is_never_executed(marker, tmp_path, tokenizer_dir, record_attacks):
    """pytorch_model.bin, modeling_*.py named by auto_map, adapter_model.bin, and a template with a sandbox escape."""
    for kind, content in list(malicious_files(marker).items())[: None if FULL else 2]:
        folder = tmp_path / kind
        shutil.copytree(tokenizer_dir, folder)
        plant_python(folder, marker)
        code = {
            "AutoConfig": "modeling_x.X",
            "AutoModelForCausalLM": "modeling_x.X",
            "AutoTokenizer": ["modeling_x.X", None],
        }
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
                 "vocab_size": 300, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}  # fmt: skip
        for kinds in ({"model_type": "x"}, {"model_type": "llama"})[0 if FULL else 1 :]:
            (folder / "config.json").write_text(json.dumps({**sizes, **kinds, "auto_map": code}))
            config = json.loads((folder / "tokenizer_config.json").read_text())
            config |= {
                "auto_map": code,
                "tokenizer_class": "X",
                "chat_template": ESCAPES["globals"].replace("MARKER", str(marker)),
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            for name in (
                "pytorch_model.bin",
                "adapter_model.bin",
                "model.safetensors",
                "training_args.bin",
                "optimizer.pt",
            ):
                (folder / name).write_bytes(content)
            (folder / "adapter_config.json").write_text(
                json.dumps({"base_model_name_or_path": str(folder), "auto_mapping": code})
            )
            done = run_in_folder(folder, "2-eval.py", "--checkpoint", folder, "--prompt", "x", "--device", "cpu")
            assert done.returncode == 2
            record_attacks("malicious transformers folders", 1, executed=int(marker.exists()))
    run_in_folder(folder, "export_model.py", folder)


def test_rows_and_tokenizer_files_are_never_executed(marker, tmp_path, record_attacks):
    """Rows that name Python objects; tokenizer files that are pickles."""
    plant_python(tmp_path, marker)
    text = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    rows = [{"__reduce__": ["os.system", f"touch {marker}"]}, {"py/object": "pathlib.Path", "text": text}, {"text": text * 20},
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.yaml").write_text(f"!!python/object/apply:os.system ['touch {marker}']\n")
    for kind, content in malicious_files(marker).items():
        (tmp_path / f"{kind}.parquet").write_bytes(content)
        (tmp_path / f"{kind}.jsonl").write_bytes(content)
        (tmp_path / f"{kind}.arrow").write_bytes(content)
        (tmp_path / f"tokenizer_{kind}").mkdir()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"):
            (tmp_path / f"tokenizer_{kind}" / name).write_bytes(content)
    files = sorted(file for file in tmp_path.iterdir() if file.suffix in (".jsonl", ".parquet", ".arrow", ".yaml"))
    for what in ("pretrain", "sft", "rl"):
        flags = ["--tokenizer_path", tmp_path / "tokenizer_npy"] if what != "rl" else []
        run_in_folder(tmp_path, "data_process.py", what, *files, "--out_dir", tmp_path / what, *flags)
    run_in_folder(tmp_path, "train_tokenizer.py", *files, "--out_dir", tmp_path / "tok")
    record_attacks("malicious rows and tokenizers", len(files) + 5, executed=int(marker.exists()))


def escaping_archive(tmp_path: Path, kind: str) -> Path:
    """An archive with members outside its folder or links to a path outside."""
    path = tmp_path / f"exam.{kind}"
    names = ["../executed", f"{tmp_path}/executed", "a/../../executed", "..\\executed", "val/../../executed.csv"]
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "x")
    else:
        with tarfile.open(path, "w:xz" if kind.endswith("xz") else "w") as archive:
            link = tarfile.TarInfo("val/link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            archive.addfile(link)
            for name in [*names, "val/link/executed", "val/link/executed.csv"]:
                member = tarfile.TarInfo(name)
                member.size = 1
                archive.addfile(member, io.BytesIO(b"x"))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.xz"])
def test_archives_write_nothing_outside_their_folder(kind, marker, tmp_path, tiny_parent, record_attacks):
    folder = tmp_path / "downloads"
    folder.mkdir()
    archive = escaping_archive(folder, kind)
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    with pytest.raises(UserError, match="contains a path outside its folder"):
        unpack_archive(archive)
    done = run_in_folder(
        folder,
        "eval_ceval.py",
        "--data",
        archive,
        "--checkpoint",
        tiny_parent,
        "--device",
        "cpu",
        "--out_dir",
        folder / "o",
    )
    assert done.returncode == 2
    assert {path for path in tmp_path.rglob("*") if folder not in path.parents} == before
    record_attacks("archives with members outside", 1, written=int(marker.exists()))
