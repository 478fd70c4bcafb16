"""benchmarks/peers.py: environments of the peers are installed once; without a network there is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from tests.helpers import one_line_error


def test_an_environment_is_installed_once_and_again_when_its_packages_change(monkeypatch, tmp_path):
    installed = []
    monkeypatch.setattr(peers, "_install", lambda target, python, packages: installed.append((target.name, *packages)))
    monkeypatch.setattr(peers, "REQUIREMENTS", {"a": ("a>=1",), "b": ("b>=2",)})
    first = peers.peer_python(["b", "a"], tmp_path)
    assert first == peers.peer_python(["a", "b"], tmp_path) and Path(first).is_relative_to(tmp_path / "a-b")
    assert installed == [("a-b", "a>=1", "b>=2")]
    monkeypatch.setitem(peers.REQUIREMENTS, "a", ("a>=2",))
    peers.peer_python(["a", "b"], tmp_path)
    (tmp_path / "a-b/complete.json").write_text("{")  # a killed installation
    peers.peer_python(["a", "b"], tmp_path)
    assert len(installed) == 3
    assert json.loads((tmp_path / "a-b/complete.json").read_text())["packages"] == ["a>=2", "b>=2"]


def test_the_links_are_torch_and_what_it_requires():
    names = {path.name for path in peers.torch_files()}
    assert {"torch", "torchgen"} <= names and "transformers" not in names
    assert all(path.exists() for path in peers.torch_files())


def test_an_unknown_peer_is_named(tmp_path):
    with one_line_error("unknown peer 'keras': choose from transformers, litgpt"):
        peers.peer_python(["keras"], tmp_path)


def test_a_failed_installation_gives_one_line():
    code = "import sys; sys.exit('WARNING: retrying\\nERROR: No matching distribution found for x\\n\\n[notice] pip')"
    with one_line_error("pip install x: ERROR: No matching distribution found for x: peers need PyPI", "--peers none"):
        peers._run([sys.executable, "-c", code], "pip install x")


@pytest.mark.slow
def test_an_environment_has_our_torch_and_fails_without_an_index(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "REQUIREMENTS", {"linked": ("typing_extensions",), "missing": ("no-such-package",)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = peers.peer_python(["linked"], tmp_path)
    done = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    assert done.stdout.strip() == torch.__version__
    with one_line_error("pip install no-such-package: ERROR: No matching distribution found"):
        peers.peer_python(["missing"], tmp_path)
