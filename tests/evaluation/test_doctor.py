"""evaluation.doctor: what prevents `make demo` is an error with exit code 2, everything else a note with its fix."""

import shutil
import sys

import pytest

from common.errors import UserError
from evaluation import doctor
from evaluation.doctor import (
    DoctorConfig,
    check_checkpoints,
    check_core_packages,
    check_data_folders,
    check_machine,
    is_in_range,
)
from model.checkpoint import load_model, read_checkpoint, record_parent, save_model
from model.lora import LoRAConfig, attach
from tests.helpers import ROOT, run_process


def texts(findings, level):
    return [str(finding) for finding in findings if finding.level == level]


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.fixture
def out_dir(tmp_path, tiny_parent):
    """A pretrained model and an adapter for it."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(tiny_parent, folder)
    model, tokenizer, parent = load_model(folder / "pretrain_32.pth")
    attach(model, LoRAConfig(rank=2))
    record_parent(model, folder / "pretrain_32.pth", folder / "lora_sft_32.pth")
    save_model(folder / "lora_sft_32.pth", model, "lora_sft", tokenizer, [*parent["lineage"], {"stage": "lora_sft"}])
    return folder


def test_readable_checkpoints_are_listed_with_their_chain(out_dir):
    findings = [*check_checkpoints(out_dir)]
    assert texts(findings, "note") == []
    assert (
        f"{out_dir}/lora_sft_32.pth: lora_sft, an adapter for pretrain_32.pth, trained by pretrain → lora_sft"
        in (texts(findings, "ok")[0])
    )
    assert texts(findings, "ok")[-1].endswith(f"stages in {out_dir}: pretrain → lora_sft")


def test_a_damaged_checkpoint_is_a_note_with_its_fix(out_dir):
    path = out_dir / "pretrain_32.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_checkpoint(path)
    notes = texts(check_checkpoints(out_dir), "note")
    assert len(notes) == 2, "the parent, and the adapter that needs it"
    assert all(f"cannot read {path}" in note and "copy it again or train it again" in note for note in notes)


def test_an_adapter_without_its_parent_and_an_interrupted_run_are_notes(out_dir):
    (out_dir / "pretrain_32.pth").unlink()
    (out_dir / "full_sft_32.resume").mkdir()
    adapter, resume = texts(check_checkpoints(out_dir), "note")
    assert "is an adapter for" in adapter and "put it beside the adapter" in adapter
    assert resume.endswith("full_sft_32.resume is an interrupted run: python 3-full_sft.py resumes it")


def test_an_empty_folder_names_the_command(tmp_path):
    assert texts(check_checkpoints(tmp_path), "note")[0].endswith("yet: make demo, or python 1-pretrain.py")


# ---- data ------------------------------------------------------------------------------------------------------------
def test_data_folders_are_checked_for_their_kind_files_and_tokenizer(process, tmp_path, tokenizer_dir):
    (tmp_path / "text.txt").write_text("一段文字。\n\nSome text of several words.\n" * 20, encoding="utf-8")
    (tmp_path / "chats.jsonl").write_text('{"instruction": "Hi?", "output": "Hello."}\n' * 30, encoding="utf-8")
    process("pretrain", tmp_path / "text.txt")
    sft = process("sft", tmp_path / "chats.jsonl")
    config = DoctorConfig(data_dir=str(tmp_path), tokenizer=str(tokenizer_dir))
    findings = [*check_data_folders(config)]
    assert [finding.level for finding in findings] == ["ok", "ok", "ok", "note", "note"]
    assert str(findings[3]).endswith("dpo is not there yet: python data_process.py dpo FILES…")

    (sft / "train.jsonl").write_text("")
    shutil.copytree(tmp_path / "pretrain", tmp_path / "dpo")
    (next((tmp_path / "pretrain").glob("train*.bin"))).write_bytes(b"")
    found = [str(finding) for finding in check_data_folders(config)][1:4]
    assert "cannot be read" in found[0] and "python data_process.py pretrain" in found[0]
    assert "train.jsonl is missing or incomplete: python data_process.py sft" in found[1]
    assert "holds pretrain data, not messages: python data_process.py dpo" in found[2]


# ---- machine and libraries -------------------------------------------------------------------------------------------
def test_too_little_memory_or_disk_and_a_file_as_out_dir_are_errors(tmp_path, monkeypatch):
    assert texts(check_machine(str(tmp_path / "new")), "error") == [] and not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    assert "is a file" in texts(check_machine(str(tmp_path / "file")), "error")[0]
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (4e9, 1e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**8, 10**8))
    memory, disk = texts(check_machine(str(tmp_path)), "error")
    assert "1.0 GB of memory are free" in memory and "0.1 GB are free" in disk and "free some space" in disk


def test_a_missing_core_package_is_an_error_and_another_version_a_note(monkeypatch):
    assert texts(check_core_packages(), "error") == []
    monkeypatch.setattr(doctor, "core_requirements", lambda: ["no-such-a>=1", "no-such-b", "numpy>=1,<1.5"])
    findings = [*check_core_packages()]
    assert texts(findings, "error") == [
        "error  libraries    not installed: no-such-a, no-such-b: python -m pip install -r requirements.txt"
    ]
    assert texts(findings, "note")[0].endswith('outside the tested range: python -m pip install "numpy>=1,<1.5"')


@pytest.mark.parametrize(
    ("version", "is_inside"), [("2.13.0+cpu", True), ("2.9", True), ("2.8.1", False), ("2.13.1", False)]
)
def test_the_range_of_a_requirement(version, is_inside):
    assert is_in_range(version, "torch>=2.9,<=2.13.0") == is_inside


def test_without_torch_the_doctor_still_runs_and_changes_nothing(tmp_path):
    hide = "import sys; sys.modules['torch'] = None; sys.path.insert(0, '.')\n"
    code = (
        "from evaluation import doctor; from common.errors import *\n"
        "doctor.core_requirements = lambda: ['no-such-torch>=2']\n"
        f"sys.argv = ['doctor.py', '--out_dir', {str(tmp_path / 'out')!r}]\n"
        "with fail_in_one_line(): doctor.main()"
    )
    before = sorted(tmp_path.iterdir())
    done = run_process(sys.executable, "-c", hide + code)
    assert done.returncode == 2 and "error  libraries    not installed: no-such-torch: " in done.stdout
    assert done.stderr == "error: make demo cannot run: fix what begins with error above (1)\n"
    assert "device" not in done.stdout and sorted(tmp_path.iterdir()) == before


def test_every_finding_is_one_line_with_its_fix(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    findings = [*doctor.diagnose(DoctorConfig(out_dir=str(tmp_path / "out"), data_dir=str(tmp_path)))]
    assert {finding.part for finding in findings} == {"machine", "disk", "libraries", "device", "data", "checkpoints"}
    assert all("\n" not in str(finding) for finding in findings)
    assert all(finding.fix or ": " in finding.text for finding in findings if finding.level != "ok")
