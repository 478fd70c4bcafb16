"""The flags of 2-eval.py.

Read next: ../2-eval.py (the command), ../model/sampling_presets.py (the sampling flags).
"""

from dataclasses import dataclass
from typing import Any

from common.cli import flag
from common.errors import UserError
from common.flag_groups import InferenceFlags, RunFlags
from common.flag_types import non_empty_text, non_negative_int, parse_bool, path_string, positive_int
from evaluation.tools import TOOL_NAMES
from model.rope_flags import RopeFlags
from model.sampling_presets import SamplingFlags

_MODEL: dict[str, Any] = {"group": "models", "type": path_string}
_PROMPTS: dict[str, Any] = {"group": "prompts (default: a conversation)"}
_FILE: dict[str, Any] = {**_PROMPTS, "exclusive": "prompts", "type": path_string, "metavar": "FILE"}
_TOOLS: dict[str, Any] = {"group": "tools and thoughts"}
_REPORT: dict[str, Any] = {"group": "comparison of several models"}


@dataclass(frozen=True)
class EvalConfig(InferenceFlags, SamplingFlags, RopeFlags, RunFlags):
    """Chat with a model, questions with keys, or a comparison of several models."""

    main_flags = (
        "checkpoint", "stage", "out_dir", "prompt", "prompts", "questions", "report", "system", "temperature",
        "max_new_tokens", "repetition_penalty", "tools", "device",
    )  # fmt: skip
    stage: str = flag("", "pretrain, full_sft, …: that stage's model (default: the latest)", **_MODEL)
    checkpoint: str = flag("", "a .pth file or a transformers folder, instead of --stage", **_MODEL)
    prompt: str | None = flag(None, "one prompt", exclusive="prompts", **_PROMPTS)
    prompts: str = flag("", "text file, one prompt per line; -: standard input", **_FILE)
    questions: str = flag("", "jsonl file of questions with keys: greedy answers, prints the accuracy", **_FILE)
    system: str = flag("", "system message of every conversation", metavar="TEXT", **_PROMPTS)
    history: int | None = flag(
        None, "previous turns in each prompt (default: all; 0 with --prompts)", type=non_negative_int, **_PROMPTS
    )
    tools: str = flag(
        "", f"tools that the model may call, as calculator,clock: {', '.join(TOOL_NAMES)}",
        type=non_empty_text, metavar="NAMES", **_TOOLS,
    )  # fmt: skip
    lookup_file: str = flag("", "jsonl file of facts for the tool lookup", type=path_string, metavar="FILE", **_TOOLS)
    max_tool_calls: int = flag(4, "calls that run in one reply", type=positive_int, **_TOOLS)
    enable_thinking: bool | None = flag(
        None, "false: an empty thought before each answer (default: the model decides)",
        type=parse_bool, metavar="{true,false}", **_TOOLS,
    )  # fmt: skip
    report: tuple[str, ...] | None = flag(
        None, "compare these models, files or NAME=http://HOST/v1 (default: every stage in --out_dir)",
        type=path_string, nargs="*", metavar="MODEL", **_REPORT,
    )  # fmt: skip
    report_api_key: str = flag(
        "", "API key of the servers in --report (default: the variable REPORT_API_KEY)", type=non_empty_text, **_REPORT
    )
    texts: tuple[str, ...] = flag(
        (), "held-out texts for bits per byte", type=path_string, nargs="+", metavar="NAME=FILE", **_REPORT
    )
    chats: str = flag("", "held-out chats (default: dataset/sft/val.jsonl if it exists)", type=path_string, **_REPORT)
    max_bytes: int = flag(100_000, "bytes read of each text and of the chats", type=positive_int, **_REPORT)
    judge: str = flag(
        "", "address of a model that scores the answers, as http://localhost:8000/v1", type=non_empty_text, **_REPORT
    )
    judge_model: str = flag("", "the model's name on that server", type=non_empty_text, **_REPORT)
    lang: str = flag("auto", "language of the terminal chat (auto: that of $LANG)", choices=("auto", "zh", "en"))
    json: str = flag("", "write the answers (and scores) to this file", type=path_string, metavar="OUT")

    def check(self) -> None:
        """Raises UserError for flags that cannot be combined."""
        super().check()
        for name in ("texts", "chats", "judge", "judge_model", "report_api_key"):
            if getattr(self, name) and self.report is None:
                raise UserError(f"--{name} needs --report")
        for name in ("stage", "checkpoint", "questions", "tools"):
            if getattr(self, name) and self.report is not None:
                raise UserError(f"--{name} cannot be combined with --report: list the models after --report")
        if self.lookup_file and "lookup" not in self.tools:
            raise UserError("--lookup_file needs --tools lookup")
        if bool(self.judge) != bool(self.judge_model):
            raise UserError("--judge BASE_URL and --judge_model NAME: give both or neither")
