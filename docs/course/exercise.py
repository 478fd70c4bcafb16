"""What the exercises of the course share: their flags, the models of `make demo`, the picture.

Read next: README.md (the chapters), tokens.py (the first exercise).
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from common.cli import Config, flag
from common.errors import UserError
from common.flag_types import path_string
from model.checkpoint import load_model
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer


@dataclass(frozen=True)
class ExerciseConfig(Config):
    """Flags of an exercise."""

    demo: str = flag("out/demo", "folder of `make demo`", type=path_string)
    out_dir: str = flag("out/course", "folder for the picture", type=path_string)

    def file(self, name: str) -> Path:
        """Return a file or folder of the demo. Raises UserError if it is missing."""
        path = Path(self.demo) / name
        if not path.exists():
            raise UserError(f"{path} does not exist: run `make demo` first (six minutes), or give its folder as --demo")
        return path


def open_demo(config: ExerciseConfig, stage: str) -> tuple[Transformer, ChatTokenizer]:
    """Return the demo's model after a stage ("pretrain", "full_sft", "lora_sft", "dpo"), in eval mode."""
    model, tokenizer, _ = load_model(config.file(f"{stage}_256.pth"))
    return model.eval(), tokenizer


def save_picture(config: ExerciseConfig, figure: Figure, name: str) -> None:
    """Write the figure to --out_dir as NAME.png."""
    path = Path(config.out_dir) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    print(f"picture: {path}")
