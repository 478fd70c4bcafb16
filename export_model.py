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

import argparse
import re
from pathlib import Path

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line

WEIGHT_DTYPE_NAMES = ("float32", "bfloat16", "float16")
SHARD_SIZE = flag_types.NumberType(float, "a number above 0 (of GB)", lambda size: size >= 1e-6, 1e6)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=flag_types.pathlib_path, help="out/*.pth, or a transformers folder")
    parser.add_argument(
        "folder", type=flag_types.pathlib_path, metavar="DIR", help="output folder: new, empty, or see --overwrite"
    )
    add = parser.add_argument_group("output").add_argument
    add("--dtype", choices=WEIGHT_DTYPE_NAMES, help="number format of the weights (default: float32)")
    add("--max_shard_gb", type=SHARD_SIZE, default=4.0,
        help="largest size of a weights file, in GB (default: 4)")  # fmt: skip
    add("--gguf", choices=("f32", "f16", "bf16", "q8_0"), help="also write a GGUF file in this format, and a Modelfile")
    add("--adapter", action="store_true", help="write a LoRA adapter alone, as a peft folder")
    add(
        "--base",
        type=flag_types.non_empty_text,
        metavar="NAME",
        help="with --adapter: folder or hub name of its parent (default: the parent's name)",
    )
    add(
        "--license",
        type=flag_types.non_empty_text,
        metavar="ID",
        help="licence of the weights in the model card: apache-2.0, … (default: unknown)",
    )
    add("--overwrite", action="store_true", help="replace an earlier export in DIR")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the files in transformers, peft and llama.cpp",
    )
    add = parser.add_argument_group("model hub (token from `hf auth login` or HF_TOKEN)").add_argument
    add("--push_to_hub", type=flag_types.non_empty_text, metavar="NAME", help="USER/MODEL: upload DIR after the export")
    add("--private", action="store_true", help="create a private repository")
    add("--dry_run", action="store_true", help="list the files, but do not upload them")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that conflict. Reads no file."""
    for problem, wrong in {
        "--adapter takes neither --dtype nor --gguf: leave them out": args.adapter and (args.dtype or args.gguf),
        "--base names the parent of an exported adapter: add --adapter": args.base and not args.adapter,
        "--private and --dry_run need --push_to_hub": (args.private or args.dry_run) and not args.push_to_hub,
    }.items():
        if wrong:
            raise UserError(problem)


def main() -> None:
    args = make_parser().parse_args()
    check_flags(args)

    import torch

    from export import gguf_export, hub, steps
    from export.facts_file import LICENSE_PATTERN
    from export.hf_import import open_model
    from export.model_facts import model_facts

    if args.license and not re.fullmatch(LICENSE_PATTERN, args.license):
        raise UserError(f"--license {args.license!r}: use an identifier such as apache-2.0 or cc-by-4.0")

    if args.push_to_hub:
        hub.check_repo_id(args.push_to_hub, needs_token=not args.dry_run)
    facts = model_facts(args.checkpoint)
    if args.adapter and not facts["adapter"]:
        raise UserError(f"{args.checkpoint} is not an adapter: leave out --adapter")
    license = args.license or facts["license"] or "unknown"
    base = (args.base or Path(facts["parent"] or "").stem) if args.adapter else ""
    model, tokenizer, _ = open_model(args.checkpoint)
    if args.gguf:
        gguf_export.check_supported(model.config, tokenizer)
    print(f"{args.checkpoint}: {facts['stage']}, {facts['parameters'] / 1e6:.1f} M parameters", flush=True)
    with steps.staging_folder(args.folder, args.overwrite) as folder:
        if args.adapter:
            model, line = steps.export_adapter(folder, args.checkpoint, tokenizer, base, args.verify)
        else:
            dtype = getattr(torch, args.dtype or "float32")
            line = steps.export_hf_folder(folder, model, tokenizer, dtype, int(args.max_shard_gb * 1e9), args.verify)
        print(line, flush=True)
        if args.gguf:
            print(steps.export_gguf(folder, model, tokenizer, args.gguf, facts, args.verify), flush=True)
        steps.write_model_card(folder, model, facts, license, args.push_to_hub or "", base)
    print(f"saved {args.folder}:", *hub.list_files(args.folder), sep="\n")
    if args.push_to_hub and args.dry_run:
        print(f"these files would be uploaded to {args.push_to_hub}; nothing was uploaded (--dry_run)")
    elif args.push_to_hub:
        print(f"pushed to {hub.push_to_hub(args.folder, args.push_to_hub, args.private)}")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
