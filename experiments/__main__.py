"""Runs experiments on the demo's data: each trains its arms, draws out/experiments/NAME.png and prints a sentence.

    python demo.py --experiment no_rope      makes the data first if it does not exist
    python -m experiments no_rope            the same with existing data
    python demo.py --experiment all          `make experiments` does the same in its own environment

Read next: no_rope.py (the shortest experiment), training.py.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from common import flag_types
from common.cli import Config, flag, parse
from common.errors import fail_in_one_line
from common.files import check_writable
from common.locks import lock_output
from experiments.catalogue import chosen_experiments
from experiments.dpo_no_reference import dpo_no_reference
from experiments.lora_rank import lora_rank
from experiments.muon_adamw import muon_adamw
from experiments.no_rmsnorm import no_rmsnorm
from experiments.no_rope import no_rope
from experiments.no_warmup import no_warmup
from experiments.padding import padding
from experiments.sampling import sampling
from experiments.shifted_mask import shifted_mask
from experiments.tokenizer_size import tokenizer_size
from experiments.training import Workspace
from experiments.wrong_accumulation import wrong_accumulation

EXPERIMENTS = {
    run.__name__: run
    for run in (
        no_rmsnorm,
        no_rope,
        no_warmup,
        shifted_mask,
        padding,
        wrong_accumulation,
        muon_adamw,
        lora_rank,
        dpo_no_reference,
        sampling,
        tokenizer_size,
    )
}


@dataclass(frozen=True)
class ExperimentConfig(Config):
    """Flags of `python -m experiments`."""

    name: str = flag("", "name of the experiment, or all", positional=True)
    demo_dir: str = flag("out/demo", "folder with the data of make demo", type=flag_types.path_string)
    out_dir: str = flag("out/experiments", "folder for pictures and parents", type=flag_types.path_string)
    max_steps: int = flag(0, "quick test: stop each training after this many steps (-1 or 0: no limit)",
                          type=flag_types.max_steps)  # fmt: skip


def main() -> None:
    config = parse(ExperimentConfig, __doc__)
    names = chosen_experiments(config.name)
    check_writable(config.out_dir)
    space = Workspace(Path(config.demo_dir), Path(config.out_dir), max(config.max_steps, 0))
    for name in names:
        started = time.process_time()
        with lock_output(space.out / f"{name}.png"):
            sentence = EXPERIMENTS[name](space)
        print(f"{name}: {sentence}")
        print(f"picture: {space.out / f'{name}.png'} ({time.process_time() - started:.0f} CPU seconds)", flush=True)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
