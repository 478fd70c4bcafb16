"""Training numbers that belong together and have a name: 3-full_sft.py --recipe belle. Imports no torch.

    belle   batch 64, learning rate 3e-6, 3 epochs, weight decay 0.001, warm-up over a tenth, then linear; AdamW

A flag that is given wins over the recipe. A recipe's batch counts the rows of a step, which processes and
--accumulation_steps share. belle: the hyper-parameters on the cards of BelleGroup/BELLE-7B-0.2M to -2M
(arXiv:2303.14742); AdamW's betas stay this project's.
Read next: config.py (the flags), optim.py (what they do).
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
    parser.add_argument("--recipe", choices=RECIPES, help="numbers that have a name; other flags win over it")


def parse_with_recipe(parser: argparse.ArgumentParser, parse: Callable[..., Any], *arguments: Any) -> Any:
    """The arguments, the recipe's numbers being the defaults. Raises UserError when its batch cannot be shared."""
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
    else:  # --warmup_iters was given: it wins
        args.warmup_share = 0.0
    if args.batch_size is None:
        rows, parts = RECIPES[name]["batch"], int(os.environ.get("WORLD_SIZE", 1)) * args.accumulation_steps
        if rows % parts:
            raise UserError(
                f"--recipe {name}: {parts} processes or --accumulation_steps cannot share {rows} rows evenly"
            )
        args.batch_size = rows // parts
    return args


def describe_recipe(args: argparse.Namespace) -> str:
    """The recipe with the numbers that are used, those that a flag has changed included."""
    names = (key for key in ("batch_size", "accumulation_steps", *RECIPES[args.recipe]) if key != "batch")
    return f"recipe {args.recipe}: " + ", ".join(f"{name} {getattr(args, name)}" for name in names)
