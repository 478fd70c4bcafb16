"""The flags that every training script shares, and the model's flags of 1-pretrain.py. Imports no torch.

Config has three owners, never a fourth: the model's config (travels in the .pth), the shared flags here, and each
stage's own numbers, which its main() passes in as defaults.
Read next: distributed.py.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
from typing import Any

from common import cli
from common.errors import UserError
from corpus.mixing import parse_mix
from model.config import FIELD_HELP, FIELD_LIMITS, PRESETS, ModelConfig
from model.parameters import count_parameters
from trainer.recipes import parse_with_recipe


def parse_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text}: say true or false")


def parse_fractions(text: str) -> list[float]:
    """0.1,0.3,1.0 -> the shares, smallest first, each once. Raises argparse.ArgumentTypeError."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: shares are numbers with commas between, as 0.1,0.3,1.0") from None
    if not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text}: each share is above 0 and at most 1")
    return found


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and shows the defaults."""


class TrainingParser(cli.FlagParser):
    """The parser of a training script: the default learning rate is that of the optimizer, --recipe sets defaults."""

    learning_rates: dict[str, float]

    def parse_args(self, *arguments: Any) -> Any:  # type: ignore[override]
        args = parse_with_recipe(self, super().parse_args, *arguments)
        if not hasattr(args, "learning_rate"):
            args.learning_rate = self.learning_rates[args.optimizer]
        check_parallel(args)
        return args


PARALLEL_MODES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


def check_parallel(args: argparse.Namespace) -> None:
    """Raises UserError for what --parallel cannot do, before anything is read."""
    if not args.parallel.startswith("zero"):
        return
    if args.optimizer == "muon":
        raise UserError(
            f"--parallel {args.parallel} cuts the weights into flat pieces, Muon turns whole matrices: "
            "add --optimizer adamw, or take --parallel fsdp"
        )
    if args.compile:
        raise UserError(f"--parallel {args.parallel} goes without --compile; ddp and fsdp go with it")
    if args.dtype == "float16":
        raise UserError(f"--parallel {args.parallel} trains in bfloat16 or float32; ddp and fsdp do float16 too")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f'--parallel {args.parallel} needs DeepSpeed: pip install "deepspeed>=0.19,<0.20"')


def make_training_parser(
    description: str | None, learning_rates: dict[str, float], **stage_defaults: Any
) -> TrainingParser:
    """A parser with all shared flags. The stage's own numbers: the peak rate of each optimizer, and other defaults."""
    if "WORLD_SIZE" in os.environ:  # else torch prints a C++ stack for every peer that is gone; ours is one line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser = TrainingParser(description=description, formatter_class=HelpWithDefaults)
    add = parser.add_argument_group("data and files").add_argument
    add("--data_path", type=cli.path_string, help="folder written by data_process.py")
    add("--out_dir", type=cli.path_string, default="out", help="where the model, the log and the curves go")
    add("--init_from", type=cli.path_string, help="checkpoint to start from")
    add("--resume", nargs="?", const="auto", default="auto", choices=("auto", "never"),
        help="auto: go on where an interrupted run of this stage stopped; never: start anew")  # fmt: skip
    add("--save_interval", type=cli.positive_int, default=200,
        help="save every so many steps (and always at the end)")  # fmt: skip

    add = parser.add_argument_group("how long").add_argument
    add("--epochs", type=cli.epochs, default=1, help="passes over the data; 0.5: half of one")
    add("--max_steps", type=cli.max_steps, default=0,
        help="stop after so many optimizer steps (-1 or 0: the epochs decide)")  # fmt: skip
    add("--max_minutes", type=cli.non_negative_float, default=0,
        help="finish within so many minutes: the learning rate falls to its end by then (0: no limit)")  # fmt: skip

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=cli.positive_int, default=8, help="rows per process and forward pass")
    add("--accumulation_steps", type=cli.positive_int, default=1, help="forward passes per optimizer step")
    add("--optimizer", choices=("muon", "adamw"), default="muon",
        help="muon: Muon for the layers' matrices, AdamW for the rest")  # fmt: skip
    rates = ", ".join(f"{rate:g} with {optimizer}" for optimizer, rate in learning_rates.items())
    add("--learning_rate", type=cli.positive_float, default=argparse.SUPPRESS,
        help=f"peak learning rate (default: {rates})")  # fmt: skip
    add("--schedule", choices=("linear", "cosine"), default="linear", help="how the rate falls after the warm-up")
    add("--final_lr_share", type=cli.fraction, default=0.0, help="share of the peak left at the end")
    add("--warmup_iters", type=cli.non_negative_int, default=10, help="steps of linear warm-up")
    add("--warmup_share", type=cli.fraction_below_one, default=0.0,
        help="share of the run that warms up, instead of --warmup_iters")  # fmt: skip
    add("--weight_decay", type=cli.non_negative_float, default=0.1, help="on matrices; never on norms and embeddings")
    add("--grad_clip", type=cli.non_negative_float, default=1.0, help="largest gradient norm (0: no clipping)")
    add("--max_loss_ratio", default=3.0,
        type=cli.NumberType(float, "0 (off) or a number of at least 1.5", lambda ratio: ratio == 0 or ratio >= 1.5),
        help="end a run that diverges: when the mean loss of the last 10 steps is above so many times the "
        "first loss (0: off). As first loss counts at least half of ln(vocabulary) per token, 2 per pair")  # fmt: skip
    add("--seed", type=cli.seed, default=42, help="random seed of the weights, the order of the data and dropout")

    add = parser.add_argument_group("machine").add_argument
    add("--device", type=cli.device_name, default="auto", help="auto (cuda, mps, cpu), cpu, cuda, cuda:1, mps")
    add("--dtype", choices=cli.DTYPE_NAMES, default="auto",
        help="number format of the matrix products; auto: bf16 where the hardware has it")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    add("--checkpoint_activations", action="store_true", help="recompute layers in backward: less memory, slower")
    add("--parallel", choices=PARALLEL_MODES, default="ddp",
        help="how torchrun's processes share the model: ddp: each has all of it; fsdp, zero3: each a piece; "
        "zero1, zero2: pieces of the optimizer, and of the gradients")  # fmt: skip
    add("--dist_timeout", type=cli.non_negative_float, default=0.0,
        help="seconds that a process may keep the others waiting before the run ends and names it "
        "(0: 300 on CPUs, 1800 on GPUs)")  # fmt: skip
    add("--num_workers", type=cli.int_between(0, 256), default=0, help="processes that prepare batches ahead")
    add("--local_rank", "--local-rank", type=cli.int_at_least(-1), default=0,
        help=argparse.SUPPRESS)  # fmt: skip  # the deepspeed launcher adds it

    add = parser.add_argument_group("what is shown").add_argument
    add("--log_interval", type=cli.positive_int, default=10, help="log every so many steps")
    add("--eval_interval", type=cli.positive_int, default=100,
        help="validate every so many steps (and always at the end)")  # fmt: skip
    add("--eval_tokens", type=cli.positive_int, default=16_384,
        help="validation tokens per language each time; eight times as many at the end")  # fmt: skip
    add("--use_wandb", action="store_true", help="log to Weights & Biases too (offline unless WANDB_MODE is set)")
    add("--wandb_project", type=cli.non_empty_text, default="mengya")
    add("--wandb_run_name", type=cli.non_empty_text, default=None)
    parser.set_defaults(**stage_defaults)
    parser.learning_rates = learning_rates
    return parser


def add_length_flag(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--max_seq_len", type=cli.positive_int,
        help=f"{what}; none given: as many tokens as the model reads")  # fmt: skip


def model_flag_type(field: "dataclasses.Field[Any]") -> Any:
    """The argparse type of a field of ModelConfig, with the limits that the config itself has.

    A count that a file may leave at 0 (experts of a dense model) is at least 1 as a flag, but for shared experts.
    """
    if isinstance(field.default, bool):
        return parse_bool
    least, most = FIELD_LIMITS[field.name]
    if isinstance(field.default, int):
        least = least if field.name == "n_shared_experts" or not field.default else max(least, 1)
        return cli.int_between(int(least), int(most))
    rule = f"a number from {least:g} to {most:g}"
    return cli.NumberType(float, rule, lambda value: least <= value <= most)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--preset and one flag for every field of ModelConfig but vocab_size (the tokenizer's) and rope_scaling."""
    group = parser.add_argument_group("model (a flag wins over the preset)")
    group.add_argument("--preset", choices=PRESETS, help="a size with a name (small when none is given)")
    for field in dataclasses.fields(ModelConfig):
        if field.name in ("vocab_size", "rope_scaling"):
            continue
        options: dict[str, Any] = {"type": model_flag_type(field), "default": None, "help": FIELD_HELP[field.name]}
        if isinstance(field.default, bool):
            options |= {"nargs": "?", "const": True}
        group.add_argument(f"--{field.name}", **options)


def add_mix_flags(parser: argparse.ArgumentParser) -> None:
    """--mix and what goes with it: which part of the data gives how much of the training."""
    add = parser.add_argument_group("mixture (none given: everything, as often as it is there)").add_argument
    add("--mix", action=cli.NameList, read=parse_mix, metavar="MIX",
        help="zh=0.25,en=0.75: shares, by language or source; zh=1x,en=2x: passes; or language, source")  # fmt: skip
    add("--mix_temperature", type=cli.positive_float, default=1.0,
        help="shares to the power of 1/T: above 1 evens them out")  # fmt: skip
    add("--stage2_mix", action=cli.NameList, read=parse_mix, metavar="MIX",
        help="another mixture for the rest of the run")  # fmt: skip
    add("--stage2_at", type=cli.non_negative_float, default=0.0,
        help="where it begins: a share of the steps, as 0.7, or a step number")  # fmt: skip


def given_model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The model's fields that were given as flags."""
    fields = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(ModelConfig)}
    return {name: value for name, value in fields.items() if value is not None}


def make_model_config(args: argparse.Namespace, vocab_size: int) -> ModelConfig:
    """The preset with the flags that were given. Raises UserError for an impossible combination."""
    preset = PRESETS[args.preset or "small"]
    try:
        return ModelConfig(**{**preset, **given_model_flags(args), "vocab_size": vocab_size})
    except ValueError as error:
        raise UserError(str(error)) from None


def check_memory(config: ModelConfig) -> None:
    """Raise UserError when the weights alone are larger than the machine's memory, before they are made."""
    needed, available = 4 * count_parameters(config).total, machine_memory()
    if needed > available:
        raise UserError(
            f"the weights take {needed / 1e9:,.1f} GB in fp32, this machine has {available / 1e9:,.1f} GB of memory: "
            "choose a smaller --preset, --dim or --n_layers (--plan calculates before you train)"
        )


def machine_memory() -> float:
    """Bytes of main memory; infinity where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf
