"""Replaced by config.py, removed when all scripts are converted."""

import argparse
import dataclasses
import importlib.util
import os
from typing import Any

from common import cli, flag_types
from common.errors import UserError
from common.flag_types import parse_bool
from corpus.mixing import parse_mix
from model.config import FIELD_LIMITS, PRESETS, ModelConfig
from trainer.recipes import parse_with_recipe


def parse_fractions(text: str) -> list[float]:
    """Parse "0.1,0.3,1.0" into sorted unique fractions. Raises argparse.ArgumentTypeError."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give fractions separated by commas, as 0.1,0.3,1.0") from None
    if not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text}: each fraction is above 0 and at most 1")
    return found


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and appends the defaults to the help."""


class TrainingParser(cli.FlagParser):
    """Parser of a training script: the default learning rate depends on --optimizer, --recipe sets defaults."""

    learning_rates: dict[str, float]

    def parse_args(self, *arguments: Any) -> Any:  # type: ignore[override]
        args = parse_with_recipe(self, super().parse_args, *arguments)
        if not hasattr(args, "learning_rate"):
            args.learning_rate = self.learning_rates[args.optimizer]
        check_parallel(args)
        return args


from trainer.config import PARALLEL_MODES  # noqa


def check_parallel(args: argparse.Namespace) -> None:
    """Raise UserError for flags that DeepSpeed ZeRO does not support, before any file is read."""
    if not args.parallel.startswith("zero"):
        return
    if args.optimizer == "muon":
        raise UserError(
            f"--parallel {args.parallel} flattens the weights, Muon needs whole matrices: "
            "add --optimizer adamw, or use --parallel fsdp"
        )
    if args.compile:
        raise UserError(f"--parallel {args.parallel} does not support --compile: leave it out, or use ddp or fsdp")
    if args.dtype == "float16":
        raise UserError(f"--parallel {args.parallel} supports bfloat16 and float32: for float16 use ddp or fsdp")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f'--parallel {args.parallel} needs DeepSpeed: pip install "deepspeed>=0.19,<0.20"')


def make_training_parser(
    description: str | None, learning_rates: dict[str, float], **stage_defaults: Any
) -> TrainingParser:
    """Return a parser with all shared flags. `learning_rates`: the stage's default peak rate of each optimizer."""
    if "WORLD_SIZE" in os.environ:  # hides torch's C++ stack trace for every lost peer; we print one line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser = TrainingParser(description=description, formatter_class=HelpWithDefaults)
    add = parser.add_argument_group("data and files").add_argument
    add("--data_path", type=flag_types.path_string, help="folder written by data_process.py")
    add(
        "--out_dir",
        type=flag_types.path_string,
        default="out",
        help="folder for the checkpoint, the log and the curves",
    )
    add("--init_from", type=flag_types.path_string, help="checkpoint to start from")
    add("--resume", nargs="?", const="auto", default="auto", choices=("auto", "never"),
        help="auto: resume an interrupted run of this stage; never: start anew")  # fmt: skip
    add("--save_interval", type=flag_types.positive_int, default=200,
        help="steps between saves (a save at the end is always made)")  # fmt: skip

    add = parser.add_argument_group("duration").add_argument
    add("--epochs", type=flag_types.epochs, default=1, help="passes over the data; 0.5: half of one")
    add("--max_steps", type=flag_types.max_steps, default=0,
        help="number of optimizer steps (-1 or 0: given by --epochs)")  # fmt: skip
    add("--max_minutes", type=flag_types.non_negative_float, default=0,
        help="time limit in minutes; the learning rate decays to its final value by then (0: no limit)")  # fmt: skip

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=flag_types.positive_int, default=8, help="rows per process and forward pass")
    add("--accumulation_steps", type=flag_types.positive_int, default=1, help="forward passes per optimizer step")
    add("--optimizer", choices=("muon", "adamw"), default="muon",
        help="muon: Muon for the matrices of the layers, AdamW for all other weights")  # fmt: skip
    rates = ", ".join(f"{rate:g} with {optimizer}" for optimizer, rate in learning_rates.items())
    add("--learning_rate", type=flag_types.positive_float, default=argparse.SUPPRESS,
        help=f"peak learning rate (default: {rates})")  # fmt: skip
    add("--schedule", choices=("linear", "cosine"), default="linear", help="learning-rate decay after the warm-up")
    add("--final_lr_share", type=flag_types.fraction, default=0.0, help="final learning rate as a fraction of the peak")
    add("--warmup_iters", type=flag_types.non_negative_int, default=10, help="steps of linear warm-up")
    add("--warmup_share", type=flag_types.fraction_below_one, default=0.0,
        help="warm-up as a fraction of the run, instead of --warmup_iters")  # fmt: skip
    add(
        "--weight_decay",
        type=flag_types.non_negative_float,
        default=0.1,
        help="of matrices; norms and embeddings have none",
    )
    add("--grad_clip", type=flag_types.non_negative_float, default=1.0, help="maximum gradient norm (0: no clipping)")
    add("--max_loss_ratio", default=3.0,
        type=flag_types.NumberType(float, "0 (off) or a number of at least 1.5", lambda ratio: ratio == 0 or ratio >= 1.5),
        help="stop a diverging run: when the mean loss of the last 10 steps exceeds this multiple of the first "
        "loss (0: off). The first loss counts as at least ln(vocabulary) / 2 per token, 2 per pair")  # fmt: skip
    add(
        "--seed", type=flag_types.seed, default=42, help="random seed of the weights, the order of the data and dropout"
    )

    add = parser.add_argument_group("hardware and parallelism").add_argument
    add("--device", type=flag_types.device_name, default="auto", help="auto (cuda, mps, cpu), cpu, cuda, cuda:1, mps")
    add("--dtype", choices=flag_types.DTYPE_NAMES, default="auto",
        help="dtype of matrix products (autocast); auto: bf16 where the hardware supports it")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the model (on a CPU this needs a C++ compiler)")
    add("--checkpoint_activations", action="store_true",
        help="activation checkpointing: recompute layers in backward; less memory, slower")  # fmt: skip
    add("--parallel", choices=PARALLEL_MODES, default="ddp",
        help="parallelism of several processes: ddp: every process holds the whole model; zero1: optimizer state is "
        "sharded; zero2: also gradients; fsdp, zero3: also weights")  # fmt: skip
    add("--dist_timeout", type=flag_types.non_negative_float, default=0.0,
        help="seconds that a process may keep the others waiting before the run ends with an error that names it "
        "(0: 300 on CPUs, 1800 on GPUs)")  # fmt: skip
    add(
        "--num_workers", type=flag_types.int_between(0, 256), default=0, help="worker processes that load batches ahead"
    )
    add("--local_rank", "--local-rank", type=flag_types.int_at_least(-1), default=0,
        help=argparse.SUPPRESS)  # fmt: skip  # set by the deepspeed launcher

    add = parser.add_argument_group("logging and validation").add_argument
    add("--log_interval", type=flag_types.positive_int, default=10, help="steps between log rows")
    add("--eval_interval", type=flag_types.positive_int, default=100,
        help="steps between validations (a validation at the end is always made)")  # fmt: skip
    add("--eval_tokens", type=flag_types.positive_int, default=16_384,
        help="tokens per validation and language; eight times as many at the end")  # fmt: skip
    add("--use_wandb", action="store_true", help="also log to Weights & Biases (offline unless WANDB_MODE is set)")
    add("--wandb_project", type=flag_types.non_empty_text, default="mengya")
    add("--wandb_run_name", type=flag_types.non_empty_text, default=None)
    parser.set_defaults(**stage_defaults)
    parser.learning_rates = learning_rates
    return parser


def add_length_flag(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--max_seq_len", type=flag_types.positive_int,
        help=f"tokens per row; {what}; if omitted: the model's max_seq_len")  # fmt: skip


def model_flag_type(field: "dataclasses.Field[Any]") -> Any:
    """Return the argparse type of a field of ModelConfig, with the limits of the config.

    Counts that are 0 in the config of a dense model (experts) must be at least 1 as flags, except n_shared_experts.
    """
    if isinstance(field.default, bool):
        return parse_bool
    return FIELD_LIMITS[field.name]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add --preset and a flag for every field of ModelConfig except vocab_size (the tokenizer's) and rope_scaling."""
    group = parser.add_argument_group("model (flags override the preset)")
    group.add_argument("--preset", choices=PRESETS, help="named model size; if omitted: small")
    for field in dataclasses.fields(ModelConfig):
        if field.name in ("vocab_size", "rope_scaling"):
            continue
        options: dict[str, Any] = {
            "type": model_flag_type(field),
            "default": None,
            "help": field.metadata["flag"]["help"],
        }
        if isinstance(field.default, bool):
            options |= {"nargs": "?", "const": True}
        group.add_argument(f"--{field.name}", **options)


def add_mix_flags(parser: argparse.ArgumentParser) -> None:
    """Add --mix and the other flags of data mixtures."""
    add = parser.add_argument_group("data mixture (if omitted: all data, without reweighting)").add_argument
    add("--mix", action=cli.NameList, parse=parse_mix, metavar="MIX",
        help="zh=0.25,en=0.75: weights by language or source; zh=1x,en=2x: epochs; or language, source")  # fmt: skip
    add("--mix_temperature", type=flag_types.positive_float, default=1.0,
        help="weights to the power of 1/T: T above 1 makes them more equal")  # fmt: skip
    add("--stage2_mix", action=cli.NameList, parse=parse_mix, metavar="MIX",
        help="mixture of stage 2, the last part of the run")  # fmt: skip
    add("--stage2_at", type=flag_types.non_negative_float, default=0.0,
        help="start of stage 2: a fraction of the steps, as 0.7, or a step number")  # fmt: skip


def given_model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ModelConfig that were given as flags."""
    fields = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(ModelConfig)}
    return {name: value for name, value in fields.items() if value is not None}


def make_model_config(args: argparse.Namespace, vocab_size: int) -> ModelConfig:
    """Return the config of the preset, overridden by the flags. Raises UserError for an invalid combination."""
    preset = PRESETS[args.preset or "small"]
    try:
        return ModelConfig(**{**preset, **given_model_flags(args), "vocab_size": vocab_size})
    except ValueError as error:
        raise UserError(str(error)) from None


from trainer.memory import check_memory  # noqa

from trainer.plan import GPUS  # noqa


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("plan (trains nothing)").add_argument
    add("--plan", action="store_true", help="print parameters, tokens, memory, time and cost, and stop")
    add(
        "--presets",
        type=flag_types.non_empty_text,
        metavar="A,B",
        help="with --plan: print a table of these presets with their memory and GPUs instead",
    )
    add("--tokens_per_param", type=flag_types.non_negative_float, default=0.0,
        help="training tokens per parameter; Xiangxin used 20 (0: given by --epochs; with --plan: 20)")  # fmt: skip
    add("--gpu", choices=GPUS, default="h100", help="the GPU of the plan's launch line")
    add("--gpus", type=flag_types.positive_int, default=8, help="number of GPUs")
    add("--utilisation", type=flag_types.positive_fraction, default=0.4,
        help="assumed model FLOPs utilisation (MFU), a fraction of the GPUs' peak")  # fmt: skip
    add("--price_per_hour", type=flag_types.non_negative_float, default=0.0,
        help="price per GPU and hour in US dollars (0: the price in the plan's table)")  # fmt: skip


def print_plan(args: argparse.Namespace) -> None:
    from trainer import plan
    from trainer.config import PlanConfig

    known = {f.name for f in dataclasses.fields(PlanConfig)}
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    plan.print_plan(PlanConfig(**given, model=given_model_flags(args)))
