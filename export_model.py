"""Exports a model as a transformers folder, a GGUF file for llama.cpp or a peft adapter, and uploads it to the hub.

    python export_model.py out/dpo_512.pth small-chat                          a folder for stock transformers
    python export_model.py out/dpo_512.pth small-chat --gguf q8_0              and a GGUF, with a Modelfile for Ollama
    python export_model.py out/lora_sft_512.pth small-chat                     an adapter is merged into its parent
    python export_model.py out/lora_sft_512.pth adapter --adapter              or exported alone, for the peft library
    python export_model.py out/dpo_512.pth small-chat --push_to_hub me/small-chat --dry_run

A dense model becomes a Llama, a Qwen2 with biases on queries, keys and values, or a Qwen3 with QK-norm. A mixture of
experts becomes a Qwen3-MoE (QK-norm, no shared experts) or a GraniteMoeShared. RoPE scaling is exported too.
The files are opened by transformers, peft and, if llama-cpp-python is installed, llama.cpp, and compared with the
model: equal tokens, logits within a stated tolerance, an equal greedy answer. A difference is an error, and no folder
is written.
To load the folder: `--init_from small-chat` in 3-full_sft.py, `--checkpoint small-chat` in 2-eval.py.

Reads   a .pth, or a transformers folder.
Writes  DIR: config, weights, tokenizer, the model card README.md, lineage.json; all files or none.
Read next: export/hf_export.py (the folder), export/gguf_export.py (the GGUF), export/model_card.py (the card).
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

from common import cli
from common.cli import Config, flag
from common.errors import UserError, fail_in_one_line
from common.files import write_text
from common.flag_types import NumberType, non_empty_text, pathlib_path
from export import hub
from export.gguf_export import QUANTIZATIONS, check_supported, modelfile, write_gguf
from export.hf_export import hf_architecture, staging_folder, write_hf_folder
from export.hf_import import open_folder, open_model
from export.model_card import model_card, model_name
from export.model_facts import LICENSE_PATTERN, LINEAGE_FILE, Facts, facts_json, model_facts
from export.peft_adapter import write_peft
from export.verify_gguf import check_gguf
from export.verify_hf import check_adapter, check_hf_folder
from model.checkpoint import load_state, open_adapter, read_checkpoint
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

SHARD_SIZE = NumberType(float, "a number above 0 (of GB)", lambda size: size >= 1e-6, 1e6)
HUB = "model hub (token from `hf auth login` or HF_TOKEN)"


@dataclass(frozen=True)
class ExportConfig(Config):
    """The command line."""

    main_flags = ("checkpoint", "folder", "dtype", "gguf", "adapter", "license", "overwrite", "verify", "push_to_hub")
    checkpoint: Path = flag(MISSING, "out/*.pth, or a transformers folder", type=pathlib_path, positional=True)
    folder: Path = flag(
        MISSING, "output folder: new, empty, or see --overwrite", type=pathlib_path, metavar="DIR", positional=True
    )
    dtype: str = flag("", "number format of the weights (default: float32)", group="output",
        choices=("float32", "bfloat16", "float16"))  # fmt: skip
    max_shard_gb: float = flag(4.0, "largest size of a weights file, in GB", type=SHARD_SIZE, group="output")
    gguf: str = flag(
        "", "also write a GGUF file in this format, and a Modelfile", choices=QUANTIZATIONS, group="output"
    )
    adapter: bool = flag(False, "write a LoRA adapter alone, as a peft folder", group="output")
    base: str = flag("", "with --adapter: folder or hub name of its parent (default: the parent's name)",
        type=non_empty_text, metavar="NAME", group="output")  # fmt: skip
    license: str = flag("", "licence of the weights in the model card: apache-2.0, … (default: unknown)",
        type=non_empty_text, metavar="ID", group="output")  # fmt: skip
    overwrite: bool = flag(False, "replace an earlier export in DIR", group="output")
    verify: bool = flag(True, "compare the files in transformers, peft and llama.cpp", group="output")
    push_to_hub: str = flag(
        "", "USER/MODEL: upload DIR after the export", type=non_empty_text, metavar="NAME", group=HUB
    )
    private: bool = flag(False, "create a private repository", group=HUB)
    dry_run: bool = flag(False, "list the files, but do not upload them", group=HUB)

    def check(self) -> None:
        if self.adapter and (self.dtype or self.gguf):
            raise UserError("--adapter takes neither --dtype nor --gguf: leave them out")
        if self.base and not self.adapter:
            raise UserError("--base names the parent of an exported adapter: add --adapter")
        if (self.private or self.dry_run) and not self.push_to_hub:
            raise UserError("--private and --dry_run need --push_to_hub")
        if self.license and not re.fullmatch(LICENSE_PATTERN, self.license):
            raise UserError(f"--license {self.license!r}: use an identifier such as apache-2.0 or cc-by-4.0")


def main() -> None:
    config = cli.parse(ExportConfig, __doc__)
    if config.push_to_hub:
        hub.check_repo_id(config.push_to_hub, needs_token=not config.dry_run)
    facts = model_facts(config.checkpoint)
    if config.adapter and not facts["adapter"]:
        raise UserError(f"{config.checkpoint} is not an adapter: leave out --adapter")
    parent_name = (config.base or Path(facts["parent"] or "").stem) if config.adapter else ""
    model, tokenizer, _ = open_model(config.checkpoint)
    if config.gguf:
        check_supported(model.config, tokenizer)
    print(f"{config.checkpoint}: {facts['stage']}, {facts['parameters'] / 1e6:.1f} M parameters", flush=True)
    with staging_folder(config.folder, config.overwrite) as folder:
        if config.adapter:
            model = write_adapter(folder, config, tokenizer, parent_name)
        else:
            write_merged(folder, config, model, tokenizer)
        if config.gguf:
            write_gguf_files(folder, config, model, tokenizer, facts)
        write_model_card(folder, config, model, facts, parent_name)
    print(f"saved {config.folder}:", *hub.list_files(config.folder), sep="\n")
    if config.push_to_hub and config.dry_run:
        print(f"these files would be uploaded to {config.push_to_hub}; nothing was uploaded (--dry_run)")
    elif config.push_to_hub:
        print(f"pushed to {hub.push_to_hub(config.folder, config.push_to_hub, config.private)}")


def write_merged(folder: Path, config: ExportConfig, model: Transformer, tokenizer: ChatTokenizer) -> None:
    """Write the transformers folder and compare it with the model."""
    dtype = getattr(torch, config.dtype or "float32")
    write_hf_folder(folder, model, tokenizer, dtype, int(config.max_shard_gb * 1e9))
    with comparison("transformers"):
        result = f"{hf_architecture(model.config)[0]}: not compared with transformers (--no-verify)"
        print(check_hf_folder(folder, model, tokenizer, dtype) if config.verify else result, flush=True)


def write_adapter(folder: Path, config: ExportConfig, tokenizer: ChatTokenizer, parent_name: str) -> Transformer:
    """Write the adapter as a peft folder and compare it with the model, which is returned with its adapter attached."""
    checkpoint = read_checkpoint(config.checkpoint)
    model = open_adapter(config.checkpoint, checkpoint["adapter"], checkpoint["model"], open_folder=open_folder).eval()
    model.adapter["parent"] = parent_name
    write_peft(folder, model)
    tokenizer.save(folder)
    if not config.verify:
        print("adapter: not compared with peft (--no-verify)", flush=True)
        return model
    with comparison("peft"), tempfile.TemporaryDirectory() as temporary:
        parent = Transformer(model.config)
        weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
        load_state(parent, weights, parent_name)
        write_hf_folder(Path(temporary), parent, tokenizer, torch.float32, 2**62)
        print(check_adapter(folder, Path(temporary), model, tokenizer), flush=True)
    return model


def write_gguf_files(
    folder: Path, config: ExportConfig, model: Transformer, tokenizer: ChatTokenizer, facts: Facts
) -> None:
    """Write the GGUF file and its Modelfile and compare the file with the model."""
    path = folder / f"{model_name(facts)}-{config.gguf}.gguf"
    write_gguf(path, model, tokenizer, config.gguf, facts)
    write_text(folder / "Modelfile", modelfile(path.name, tokenizer, model.config))
    with comparison("llama.cpp"):
        result = f"{path.name}: not compared with llama.cpp (--no-verify)"
        print(check_gguf(path, model, tokenizer, config.gguf) if config.verify else result, flush=True)


def write_model_card(folder: Path, config: ExportConfig, model: Transformer, facts: Facts, parent_name: str) -> None:
    """Write README.md and lineage.json."""
    files = sorted(path.name for path in folder.iterdir())
    license, name = (
        config.license or facts["license"] or "unknown",
        config.push_to_hub or f"./{config.folder.resolve().name}",
    )
    card = model_card(facts, hf_architecture(model.config)[0], license, name, files, parent_name)
    write_text(folder / "README.md", card)
    write_text(folder / LINEAGE_FILE, facts_json({**facts, "license": license}))


@contextlib.contextmanager
def comparison(program: str) -> Iterator[None]:
    """Name `program` in the error of a failed comparison. `staging_folder` then removes the files."""
    try:
        yield
    except UserError as error:
        raise UserError(f"the exported model differs in {program}, so its files were removed: {error}") from None


if __name__ == "__main__":
    with fail_in_one_line():
        main()
