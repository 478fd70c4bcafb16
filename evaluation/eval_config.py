"""The flags of 2-eval.py.

Read next: ../2-eval.py (the command), ../model/sampling_presets.py (the sampling flags).
"""

from dataclasses import dataclass

from common.cli import flag
from common.errors import UserError
from common.flag_groups import DeviceFlags
from common.flag_types import non_empty_text, non_negative_int, path_string, positive_int
from model.rope_flags import RopeFlags
from model.sampling_presets import SamplingFlags

_PROMPTS, _REPORT = "prompts (default: a conversation)", "comparison of several models"


@dataclass(frozen=True)
class EvalConfig(DeviceFlags, SamplingFlags, RopeFlags):
    """Chat with a model, questions with keys, or a comparison of several models."""

    stage: str = flag(
        "",
        "pretrain, full_sft, …: the model of that stage in --out_dir (default: the latest stage)",
        type=non_empty_text,
        group="which model",
    )
    checkpoint: str = flag(
        "", "a .pth file or a transformers folder, instead of --stage", type=path_string, group="which model"
    )
    out_dir: str = flag("out", "folder of the models", type=path_string, group="which model")
    prompt: str | None = flag(None, "one prompt", group=_PROMPTS, exclusive="prompts")
    prompts: str = flag(
        "", "text file, one prompt per line", type=path_string, metavar="FILE", group=_PROMPTS, exclusive="prompts"
    )
    questions: str = flag(
        "",
        "jsonl file of questions with keys: prints the accuracy",
        type=path_string,
        metavar="FILE",
        group=_PROMPTS,
        exclusive="prompts",
    )
    system: str = flag("", "system message of every conversation", metavar="TEXT", group=_PROMPTS)
    history: int | None = flag(
        None,
        "previous turns in each prompt (default: all; 0 with --prompts)",
        type=non_negative_int,
        metavar="N",
        group=_PROMPTS,
    )
    report: tuple[str, ...] | None = flag(
        None,
        "compare these models, files or NAME=http://HOST/v1 (default: every stage in --out_dir)",
        nargs="*",
        type=path_string,
        metavar="MODEL",
        group=_REPORT,
    )
    report_api_key: str = flag(
        "",
        "API key of the servers in --report (default: the variable REPORT_API_KEY)",
        type=non_empty_text,
        metavar="KEY",
        group=_REPORT,
    )
    texts: tuple[str, ...] = flag(
        (),
        "held-out texts for bits per byte, for example zh=FILE",
        nargs="+",
        type=path_string,
        metavar="NAME=FILE",
        group=_REPORT,
    )
    chats: str = flag(
        "",
        "held-out chats (default: dataset/sft/val.jsonl if it exists)",
        type=path_string,
        metavar="FILE",
        group=_REPORT,
    )
    max_bytes: int = flag(100_000, "bytes read of each text and of the chats", type=positive_int, group=_REPORT)
    judge: str = flag(
        "",
        "server of a model that scores and ranks the answers, as http://localhost:8000/v1",
        type=non_empty_text,
        metavar="BASE_URL",
        group=_REPORT,
    )
    judge_model: str = flag("", "the model's name on that server", type=non_empty_text, metavar="NAME", group=_REPORT)
    json: str = flag("", "write the answers (and scores) to this file", type=path_string, metavar="OUT")

    def check(self) -> None:
        """Raises UserError for flags that cannot be combined."""
        super().check()
        for name in ("texts", "chats", "judge", "judge_model", "report_api_key"):
            if getattr(self, name) and self.report is None:
                raise UserError(f"--{name} needs --report")
        for name in ("stage", "checkpoint", "questions"):
            if getattr(self, name) and self.report is not None:
                raise UserError(f"--{name} cannot be combined with --report: list the models after --report")
        if bool(self.judge) != bool(self.judge_model):
            raise UserError("--judge BASE_URL and --judge_model NAME: give both or neither")
