"""The steps of an export: staging folder, transformers folder or adapter, GGUF file, model card.

Folder, adapter and GGUF file are compared with the model unless --no-verify is given. An export is atomic: all files
appear under the target name, or none.
Read next: hf_export.py, verify_hf.py, gguf_export.py, verify_gguf.py, model_card.py; ../export_model.py.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from common.errors import UserError
from common.files import remove, replace_folder, temporary_path, write_text
from common.locks import lock_output
from export.facts_file import LINEAGE_FILE, Facts, facts_json
from export.gguf_export import modelfile, write_gguf
from export.hf_export import hf_architecture, write_hf_folder
from export.hf_import import open_folder
from export.model_card import model_card, model_name
from export.peft_adapter import write_peft
from export.verify_gguf import check_gguf
from export.verify_hf import check_adapter, check_hf_folder
from model.checkpoint import load_state, open_adapter, read_checkpoint
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer


def check_target(target: Path, overwrite: bool) -> None:
    """Raises UserError if `target` exists, unless it is empty, or an earlier export and `overwrite` is set."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder")
    is_occupied = target.is_dir() and any(target.iterdir())
    if is_occupied and not (target / LINEAGE_FILE).is_file():
        raise UserError(f"{target} is not empty and not an exported model: choose another folder")
    if is_occupied and not overwrite:
        raise UserError(f"{target} already contains an exported model: choose another folder, or add --overwrite")


@contextlib.contextmanager
def staging_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `target`, renamed to `target` at the end and removed after an error.

    `target` is locked meanwhile, and files left by a killed export are removed. Raises UserError as `check_target`
    does, if another process holds the lock, or if writing fails.
    """
    from safetensors import SafetensorError

    check_target(target, overwrite)
    target = target.resolve()
    folder = temporary_path(target, "tmp")
    with lock_output(target):
        check_target(target, overwrite)  # another export may have finished before the lock was taken
        try:
            folder.mkdir(parents=True)
            yield folder
            replace_folder(folder, target)
        except (OSError, SafetensorError) as error:
            reason = str(error)[:200]
            raise UserError(f"cannot write {target} ({reason}): free some space or choose another folder") from error
        finally:
            remove(folder)


def export_hf_folder(
    folder: Path, model: Transformer, tokenizer: ChatTokenizer, dtype: torch.dtype, max_shard_bytes: int, verify: bool
) -> str:
    """Write and verify the transformers folder; return the line to print."""
    write_hf_folder(folder, model, tokenizer, dtype, max_shard_bytes)
    if not verify:
        return f"{hf_architecture(model.config)[0]}: not compared with transformers (--no-verify)"
    with report_mismatch("transformers"):
        return check_hf_folder(folder, model, tokenizer, dtype)


def export_gguf(
    folder: Path, model: Transformer, tokenizer: ChatTokenizer, quantization: str, facts: Facts, verify: bool
) -> str:
    """Write and verify the GGUF file, write its Modelfile; return the line to print."""
    path = folder / f"{model_name(facts)}-{quantization}.gguf"
    write_gguf(path, model, tokenizer, quantization, facts)
    write_text(folder / "Modelfile", modelfile(path.name, tokenizer, model.config))
    if not verify:
        return f"{path.name}: not compared with llama.cpp (--no-verify)"
    with report_mismatch("llama.cpp"):
        return check_gguf(path, model, tokenizer, quantization)


def export_adapter(
    folder: Path, checkpoint_path: Path, tokenizer: ChatTokenizer, base: str, verify: bool
) -> tuple[Transformer, str]:
    """Write and verify the adapter as a peft folder for the parent `base`; return (model, line to print)."""
    checkpoint = read_checkpoint(checkpoint_path)
    model = open_adapter(checkpoint_path, checkpoint["adapter"], checkpoint["model"], open_folder=open_folder).eval()
    model.adapter["parent"] = base
    write_peft(folder, model)
    tokenizer.save(folder)
    if not verify:
        return model, "adapter: not compared with peft (--no-verify)"
    with report_mismatch("peft"), tempfile.TemporaryDirectory() as temporary:
        parent = Transformer(model.config)
        weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
        load_state(parent, weights, base)
        write_hf_folder(Path(temporary), parent, tokenizer, torch.float32, 2**62)
        return model, check_adapter(folder, Path(temporary), model, tokenizer)


def write_model_card(
    folder: Path, model: Transformer, facts: Facts, license: str, name: str, adapter_of: str = ""
) -> None:
    """Write README.md and lineage.json."""
    files = sorted(path.name for path in folder.iterdir())
    text = model_card(facts, hf_architecture(model.config)[0], license, name or model_name(facts), files, adapter_of)
    for file, content in (("README.md", text), (LINEAGE_FILE, facts_json({**facts, "license": license}))):
        write_text(folder / file, content)


@contextlib.contextmanager
def report_mismatch(program: str) -> Iterator[None]:
    """Name `program` in the error of a failed comparison. `staging_folder` then removes the files."""
    try:
        yield
    except UserError as error:
        raise UserError(f"the exported model differs in {program}, so its files were removed: {error}") from None
