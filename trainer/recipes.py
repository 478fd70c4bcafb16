"""Named sets of hyper-parameters: 3-full_sft.py --recipe belle. Imports no torch.

    belle  batch 64, learning rate 3e-6, 3 epochs, weight decay 0.001, warm-up over 10 % of the run, linear decay, AdamW

Flags on the command line override the recipe. A recipe's batch is the number of rows per optimizer step: batch_size x
processes x accumulation_steps. belle: hyper-parameters on the model cards of BelleGroup/BELLE-7B-0.2M to -2M
(arXiv:2303.14742); the betas of AdamW are this project's.
Read next: config.py (the flags), optim.py (the optimizers).
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

from common.errors import UserError

RECIPES: dict[str, dict[str, Any]] = {
    "belle": {
        "batch": 64,
        "learning_rate": 3e-6,
        "epochs": 3,
        "weight_decay": 0.001,
        "warmup_share": 0.1,
        "schedule": "linear",
        "optimizer": "adamw",
    }
}


def add_recipe_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", choices=RECIPES, help="named hyper-parameters; other flags override them")


def parse_with_recipe(parser: argparse.ArgumentParser, parse: Callable[..., Any], *arguments: Any) -> Any:
    """Parse the arguments with the recipe's values as defaults.

    Raises UserError if processes x accumulation_steps do not divide the recipe's batch.
    """
    args = parse(*arguments)
    name = getattr(args, "recipe", None)
    if not name:
        return args
    warmup_iters = parser.get_default("warmup_iters")
    hyperparameters = {key: value for key, value in RECIPES[name].items() if key != "batch"}
    parser.set_defaults(**hyperparameters, batch_size=None, warmup_iters=None)
    args = parse(*arguments)
    if args.warmup_iters is None:
        args.warmup_iters = warmup_iters
    else:  # --warmup_iters on the command line overrides the recipe's warmup_share
        args.warmup_share = 0.0
    if args.batch_size is None:
        rows, parts = RECIPES[name]["batch"], int(os.environ.get("WORLD_SIZE", 1)) * args.accumulation_steps
        if rows % parts:
            raise UserError(
                f"--recipe {name}: its batch of {rows} rows cannot be split evenly over {parts} processes x "
                "--accumulation_steps"
            )
        args.batch_size = rows // parts
    return args


def describe_recipe(args: argparse.Namespace) -> str:
    """Return the recipe's name and its values, including those that flags override."""
    names = (key for key in ("batch_size", "accumulation_steps", *RECIPES[args.recipe]) if key != "batch")
    return f"recipe {args.recipe}: " + ", ".join(f"{name} {getattr(args, name)}" for name in names)
