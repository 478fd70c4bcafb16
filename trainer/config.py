"""TrainConfig: the settings that all training scripts share, and the model's for 1-pretrain.py. Imports no torch.

A script subclasses TrainConfig: it sets other defaults and adds its own flags.

    @dataclass(frozen=True)
    class SFTConfig(TrainConfig):
        data_path: str = "dataset/sft"
        learning_rates = {"muon": 1e-3, "adamw": 2e-4}

    config = parse(SFTConfig, __doc__)

Read next: ../common/cli.py (how fields become flags), ../model/config.py, loop.py.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from common.cli import Config, NameList, flag, overrides
from common.errors import UserError
from common.flag_groups import RunFlags
from common.flag_types import (
    DTYPE_NAMES,
    NumberType,
    device_name,
    epochs,
    folder_name,
    fraction,
    fraction_below_one,
    int_at_least,
    int_between,
    max_steps,
    non_empty_text,
    non_negative_float,
    non_negative_int,
    path_string,
    positive_float,
    positive_fraction,
    positive_int,
    seed,
)
from common.packages import require_packages
from corpus.mixing import MixSpec, parse_mix
from model.config import PRESETS, ModelConfig
from model.parameters import count_parameters

TRACKERS = ("none", "wandb", "tensorboard", "swanlab")
PARALLEL_MODES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
# The fields of ModelConfig that set the size of a model.
SIZE_FIELDS = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "use_moe"}
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
LOSS_RATIO = NumberType(float, "0 (off) or a number of at least 1.5", lambda ratio: ratio == 0 or ratio >= 1.5)

_files = partial(flag, group="data and files")
_duration = partial(flag, group="duration")
_optimization = partial(flag, group="optimization")
_hardware = partial(flag, group="hardware and parallelism")
_logging = partial(flag, group="logging and validation")
_mixture = partial(flag, group="data mixture (if omitted: all data, without reweighting)")
_plan = partial(flag, group="plan (trains nothing)")


def _learning_rate_help(config: type) -> str:
    rates = ", ".join(f"{rate:g} with {optimizer}" for optimizer, rate in config.learning_rates.items())  # type: ignore[attr-defined]
    return f"peak learning rate (default: {rates})"


def _warmup_help(config: type) -> str:
    return f"steps of linear warm-up (default: {config.default_warmup_iters}, or --warmup_ratio)"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TrainConfig(RunFlags):
    """The flags of every training script. A subclass changes defaults by assigning them."""

    main_flags: ClassVar[tuple[str, ...]] = (
        "data_path", "init_from", "out_dir", "epochs", "max_steps", "max_minutes", "batch_size", "learning_rate",
        "device", "resume",
    )  # fmt: skip
    learning_rates: ClassVar[dict[str, float]] = {"muon": 8e-3, "adamw": 1e-3}  # default peak rate by optimizer
    default_warmup_iters: ClassVar[int] = 10

    data_path: str = _files("", "folder written by data_process.py", type=path_string)
    out_root: str = _files("out", "folder for the checkpoint, the log and the curves", name="out_dir", type=path_string)
    run_name: str = _files(
        "", "write to the subfolder NAME of --out_dir, beside other runs; the parent is looked for there, then in "
        "--out_dir", type=folder_name, metavar="NAME",
    )  # fmt: skip
    init_from: str = _files("", "checkpoint to start from", type=path_string)
    resume: str = _files(
        "auto", "auto: resume an interrupted run of this stage; never: start anew, and replace a finished run",
        nargs="?", const="auto", choices=("auto", "never"),
    )  # fmt: skip
    save_interval: int = _files(200, "steps between saves (a save at the end is always made)", type=positive_int)

    epochs: float = _duration(1, "passes over the data; 0.5: half of one", type=epochs)
    max_steps: int = _duration(0, "number of optimizer steps (-1 or 0: given by --epochs)", type=max_steps)
    max_minutes: float = _duration(
        0.0, "time limit in minutes; the learning rate decays to its final value by then (0: no limit)",
        type=non_negative_float,
    )  # fmt: skip

    batch_size: int = _optimization(8, "rows per process and forward pass, at most", type=positive_int)
    global_batch_size: int = _optimization(
        0, "rows per optimizer step of all processes; gradients are accumulated as often as needed (0: --batch_size of "
        "every process). A resumed run keeps its number", type=non_negative_int,
    )  # fmt: skip
    accumulation_steps: int = _optimization(1, "forward passes per optimizer step", type=positive_int, hidden=True)
    optimizer: str = _optimization(
        "muon", "muon: Muon for the matrices of the layers, AdamW for all other weights", choices=("muon", "adamw")
    )
    learning_rate: float = _optimization(0.0, _learning_rate_help, type=positive_float)
    schedule: str = _optimization("linear", "learning-rate decay after the warm-up", choices=("linear", "cosine"))
    min_lr_ratio: float = _optimization(
        0.0, "final learning rate as a fraction of the peak", type=fraction, aliases=("final_lr_share",)
    )
    warmup_iters: int | None = _optimization(None, _warmup_help, type=non_negative_int)
    warmup_ratio: float = _optimization(
        0.0, "warm-up as a fraction of the run, if --warmup_iters is not given",
        type=fraction_below_one, aliases=("warmup_share",),
    )  # fmt: skip
    weight_decay: float = _optimization(0.1, "of matrices; norms and embeddings have none", type=non_negative_float)
    grad_clip: float = _optimization(1.0, "maximum gradient norm (0: no clipping)", type=non_negative_float)
    max_loss_ratio: float = _optimization(
        3.0, "stop a diverging run: when the mean loss of the last 10 steps exceeds this multiple of the first loss "
        "(0: off). The first loss counts as at least ln(vocabulary) / 2 per token, 2 per pair", type=LOSS_RATIO,
    )  # fmt: skip
    seed: int = _optimization(42, "random seed of the weights, the order of the data and dropout", type=seed)

    device: str = _hardware("auto", "auto (cuda, mps, cpu), cpu, cuda, cuda:1, mps", type=device_name)
    dtype: str = _hardware(
        "auto", "dtype of matrix products (autocast); auto: bf16 where the hardware supports it", choices=DTYPE_NAMES
    )
    compile: str = _hardware(
        "auto", "torch.compile the loss; auto: on CUDA, and in long runs on CPUs with fast bf16 and a C++ "
        "compiler", nargs="?", const="on", choices=("auto", "on", "off"),
    )  # fmt: skip
    checkpoint_activations: bool = _hardware(
        False, "activation checkpointing: recompute layers in backward; less memory, slower"
    )
    parallel: str = _hardware(
        "ddp", "parallelism of several processes: ddp: every process holds the whole model; zero1: optimizer state is "
        "sharded; zero2: also gradients; fsdp, zero3: also weights", choices=PARALLEL_MODES,
    )  # fmt: skip
    dist_timeout: float = _hardware(
        0.0, "seconds that a process may keep the others waiting before the run ends with an error that names it "
        "(0: 300 on CPUs, 1800 on GPUs)", type=non_negative_float,
    )  # fmt: skip
    num_workers: int = _hardware(
        -1, "worker processes that load batches ahead (-1: 2 with CUDA, else 0)", type=int_between(-1, 256)
    )
    local_rank: int = _hardware(
        0, "set by the deepspeed launcher", type=int_at_least(-1), aliases=("local-rank",), hidden=True
    )

    explain: bool = _logging(
        False, "print the first batch with its trained tokens marked, the shapes in the model, its parameters and what "
        "a step costs, and stop; trains nothing",
    )  # fmt: skip
    log_interval: int = _logging(10, "steps between log rows", type=positive_int)
    eval_interval: int = _logging(
        100, "steps between validations (a validation at the end is always made)", type=positive_int
    )
    eval_tokens: int = _logging(
        16_384, "tokens per validation and language; eight times as many at the end", type=positive_int
    )
    sample_interval: int | None = _logging(
        None, "steps between answers to three held-out prompts, on the screen and in the log (if omitted: about ten "
        "times a run, in at most a thirtieth of its time; 0: none)", type=non_negative_int,
    )  # fmt: skip
    tracker: str = _logging(
        "none", "also log to wandb (offline unless WANDB_MODE is set), tensorboard (in out_dir/tensorboard) or swanlab "
        "(offline unless SWANLAB_MODE is set)", choices=TRACKERS,
    )  # fmt: skip
    use_wandb: bool = _logging(False, "the same as --tracker wandb")
    wandb_project: str = _logging(
        "mengya", "project in wandb or swanlab", type=non_empty_text, aliases=("tracker_project",)
    )
    wandb_run_name: str | None = _logging(
        None, "name of the run in wandb or swanlab", type=non_empty_text, aliases=("tracker_run_name",)
    )

    def __post_init__(self) -> None:
        if not self.learning_rate:
            object.__setattr__(self, "learning_rate", self.learning_rates[self.optimizer])
        super().__post_init__()

    @property
    def warmup(self) -> tuple[int, float]:
        """The warm-up as (steps, fraction of the run); one of them is 0. --warmup_iters overrides --warmup_ratio."""
        if self.warmup_iters is not None:
            return self.warmup_iters, 0.0
        return (0, self.warmup_ratio) if self.warmup_ratio else (self.default_warmup_iters, 0.0)

    def check(self) -> None:
        """Raise UserError for flags that DeepSpeed ZeRO does not support, and for two numbers of rows per step."""
        super().check()
        if self.global_batch_size and self.accumulation_steps > 1:
            raise UserError("--global_batch_size and --accumulation_steps both set the rows per step: leave one out")
        if not self.parallel.startswith("zero"):
            return
        if self.optimizer == "muon":
            raise UserError(
                f"--parallel {self.parallel} flattens the weights, Muon needs whole matrices: "
                "add --optimizer adamw, or use --parallel fsdp"
            )
        if self.compile == "on":
            raise UserError(f"--parallel {self.parallel} does not support --compile: leave it out, or use ddp or fsdp")
        if self.dtype == "float16":
            raise UserError(f"--parallel {self.parallel} supports bfloat16 and float32: for float16 use ddp or fsdp")
        require_packages(f"--parallel {self.parallel}", "deepspeed")


def length_flag(what: str) -> Any:
    """The field max_seq_len of stages that train on chats. `what`: what happens to longer rows."""
    return _files(None, f"tokens per row; {what}; if omitted: the model's max_seq_len", type=positive_int)


@dataclass(frozen=True)
class ModelFlags(Config):
    """--preset, and a flag for every field of ModelConfig but vocab_size (the tokenizer's) and rope_scaling."""

    preset: str | None = flag(
        None, "named model size; if omitted: small, or with --minutes auto: the size that suits the time",
        choices=(*PRESETS, "auto"), group="model (flags override the preset)",
    )  # fmt: skip
    model: dict[str, Any] = overrides(
        ModelConfig, group="model (flags override the preset)", skip=("vocab_size", "rope_scaling")
    )

    def model_config(self, vocab_size: int, preset: str | None = None) -> ModelConfig:
        """Return the config of the preset, overridden by the flags. Raises UserError for an invalid combination."""
        try:
            return ModelConfig(**{**PRESETS[preset or self.preset or "small"], **self.model, "vocab_size": vocab_size})
        except ValueError as error:
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class MixFlags(Config):
    """The data mixture of one or two stages (corpus/mixing.py)."""

    mix: MixSpec | None = _mixture(
        None, "zh=0.25,en=0.75: weights by language or source; zh=1x,en=2x: epochs; or language, source",
        action=NameList, parse=parse_mix, metavar="MIX",
    )  # fmt: skip
    mix_temperature: float = _mixture(
        1.0, "weights to the power of 1/T: T above 1 makes them more equal", type=positive_float
    )
    stage2_mix: MixSpec | None = _mixture(
        None, "mixture of stage 2, the last part of the run", action=NameList, parse=parse_mix, metavar="MIX"
    )
    stage2_at: float = _mixture(
        0.0, "start of stage 2: a fraction of the steps, as 0.7, or a step number", type=non_negative_float
    )

    @property
    def is_mixed(self) -> bool:
        return bool(self.mix or self.stage2_mix or self.stage2_at or self.mix_temperature != 1)


@dataclass(frozen=True)
class PlanConfig(TrainConfig, ModelFlags):
    """Settings of a run from scratch, and of the estimates of --plan (trainer/plan.py)."""

    tokenizer: str = _files("model/tokenizer", "folder written by train_tokenizer.py", type=path_string)
    plan: bool = _plan(False, "print parameters, tokens, memory, time and cost, and stop")
    minutes: float = _duration(
        0.0, "train for these minutes, with everything: chooses the steps and, without --preset and --dim, the size; "
        "languages are mixed by tokens ** 0.3 unless --mix is given",
        type=positive_float,
    )  # fmt: skip
    presets: str = _plan(
        "", "with --plan: print a table of these presets with their memory and GPUs instead",
        type=non_empty_text, metavar="A,B",
    )  # fmt: skip
    tokens_per_param: float = _plan(
        0.0, "training tokens per parameter; Xiangxin used 20 (0: given by --epochs; with --plan: 20)",
        type=non_negative_float,
    )  # fmt: skip
    gpu: str = _plan("h100", "the GPU of the plan's launch line", type=non_empty_text)
    gpus: int = _plan(8, "number of GPUs", type=positive_int)
    utilisation: float = _plan(
        0.4, "assumed model FLOPs utilisation (MFU), a fraction of the GPUs' peak", type=positive_fraction
    )
    price_per_hour: float = _plan(
        0.0, "price per GPU and hour in US dollars (0: the price in the plan's table)", type=non_negative_float
    )

    def steps_for_tokens(self, config: ModelConfig, rows_per_step: int) -> int:
        """Return the optimizer steps of --tokens_per_param."""
        tokens = self.tokens_per_param * count_parameters(config).total
        return max(1, math.ceil(tokens / (rows_per_step * config.max_seq_len)))

    def check(self) -> None:
        super().check()
        if self.tokens_per_param and self.max_steps:
            raise UserError("--tokens_per_param and --max_steps both set the length of the run: leave one out")
        if self.presets and not self.plan:
            raise UserError("--presets belongs to --plan")
        if self.preset == "auto" and not self.minutes:
            raise UserError("--preset auto needs --minutes: it takes the size that suits the time")
        if self.minutes:
            self.check_minutes()

    def check_minutes(self) -> None:
        """Raise UserError for flags that also set what --minutes chooses."""
        lengths = {"max_steps": 0, "max_minutes": 0, "epochs": 1, "tokens_per_param": 0}
        if given := [name for name, default in lengths.items() if getattr(self, name) != default]:
            raise UserError(f"--minutes and --{given[0]} both set the length of the run: leave one out")
        if self.init_from:
            raise UserError("--minutes trains from scratch: with --init_from use --max_minutes")
        if self.preset == "auto" and (given := sorted(self.model.keys() & SIZE_FIELDS)):
            raise UserError(f"--preset auto and --{given[0]} both set the size: leave one out")
