"""Sampling settings of the command line, the server's chat route and the chat page: flags, presets, defaults.

    DEFAULT_SAMPLING  <  the preset of the model's chat format (chat_template.py)  <  the user's settings

Evaluations (questions, exams, reports) use no preset, so that results of different models are comparable.
Read next: sampling.py (the settings), chat_template.py (the presets and their sources).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from common import flag_types as types
from common.cli import Config, flag
from common.errors import UserError
from model.chat_template import CHAT_FORMATS, ChatTemplate, find_chat_template
from model.jinja_template import JinjaTemplate
from model.sampling import SamplingParams

# Small models become incoherent at temperature 1, and without the penalty one in six of their greedy answers loops.
# It does not count the prompt, so an answer may repeat the question's words. The window bounds it in long answers.
DEFAULT_SAMPLING: dict[str, Any] = {
    "temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.2, "penalty_window": 64,
}  # fmt: skip
_MAX_NEW_TOKENS = 200
PRESET_CHOICES = ("auto", "none", *CHAT_FORMATS)  # values of --sampling_preset
_GROUP: dict[str, Any] = {"group": "sampling"}


@dataclass(frozen=True)
class SamplingFlags(Config):
    """The settings of a sampled answer. None: that of the preset, else the default."""

    temperature: float | None = flag(None, "0: greedy decoding (default: 0.7)", type=types.non_negative_float, **_GROUP)
    top_k: int | None = flag(
        None, "sample from the k most probable tokens (default: 0, all)", type=types.non_negative_int, **_GROUP
    )
    top_p: float | None = flag(
        None, "sample from the top tokens that sum to p (default: 0.9)", type=types.positive_fraction, **_GROUP
    )
    min_p: float | None = flag(
        None, "drop tokens below this fraction of the highest probability (default: 0)", type=types.fraction, **_GROUP
    )
    repetition_penalty: float | None = flag(
        None, "above 1: less repetition, for example 1.1 (default: 1)", type=types.positive_float, **_GROUP
    )
    frequency_penalty: float | None = flag(
        None, "subtracted from a token's logit per occurrence in the answer; against loops (default: 0.2)",
        type=types.non_negative_float, **_GROUP,
    )  # fmt: skip
    penalty_window: int | None = flag(
        None, "the frequency penalty counts this many last tokens; 0: all (default: 64)",
        type=types.non_negative_int, **_GROUP,
    )  # fmt: skip
    no_repeat_ngram_size: int | None = flag(
        None, "N: no n-gram of N tokens twice, prompt included (default: 0, off)", type=types.non_negative_int, **_GROUP
    )
    num_beams: int | None = flag(
        None, "beam search at temperature 0, prints whole answers (default: 1)", type=types.int_between(1, 8), **_GROUP
    )
    length_penalty: float | None = flag(
        None, "beam score: log-probability / length ** this (default: 1)", type=types.non_negative_float, **_GROUP
    )
    max_new_tokens: int | None = flag(
        None, "length limit of an answer (default: 200; --questions: 48 or 24)", type=types.positive_int, **_GROUP
    )
    seed: int | None = flag(
        None, "the same seed gives the same answers (default with --report: 0)", type=types.seed, **_GROUP
    )
    sampling_preset: str = flag(
        "auto",
        "defaults of these flags: the chat format's (auto), another one's, none",
        choices=PRESET_CHOICES,
        **_GROUP,
    )

    @property
    def explicit_settings(self) -> dict[str, Any]:
        """The settings that were given, by name."""
        return {name: value for name in SAMPLING_SETTINGS if (value := getattr(self, name)) is not None}

    def settings(self, preset: dict[str, Any] | None = None, stop: tuple[str, ...] = ()) -> SamplingParams:
        """The given settings, which override `preset`, which overrides the defaults. Raises UserError."""
        merged = merge_settings(self.explicit_settings, preset or {}, DEFAULT_SAMPLING)
        try:
            return SamplingParams(**{"max_new_tokens": _MAX_NEW_TOKENS, **merged}, stop=stop)
        except ValueError as error:
            raise UserError(f"--{error}") from None


SAMPLING_SETTINGS = tuple(field.name for field in dataclasses.fields(SamplingFlags) if field.name != "sampling_preset")


def find_preset(choice: str, chat_format: ChatTemplate | JinjaTemplate | None) -> tuple[str, dict[str, Any]]:
    """(name, settings) of the preset for `choice`, one of PRESET_CHOICES; ("", {}) without a preset.

    auto selects the preset of the model's chat format; the name of a format selects that format's preset.
    """
    chosen = chat_format if choice == "auto" else None if choice == "none" else find_chat_template(choice)
    return (chosen.name, dict(chosen.sampling)) if chosen else ("", {})


def merge_settings(*layers: dict[str, Any]) -> dict[str, Any]:
    """Merge settings; earlier layers take precedence.

    num_beams > 1 and temperature > 0 exclude each other: the one from the earlier layer is kept, the other is reset. If
    one layer has both, both are kept and SamplingParams raises ValueError.
    """
    chosen: dict[str, Any] = {}
    for layer in reversed(layers):
        chosen |= layer
    if chosen.get("num_beams", 1) > 1 and chosen.get("temperature", 0) > 0:
        for layer in layers:
            if "num_beams" in layer or "temperature" in layer:
                chosen["temperature"] = layer.get("temperature", 0.0)
                chosen["num_beams"] = layer.get("num_beams", 1)
                break
    return chosen


def format_settings(settings: dict[str, Any]) -> str:
    """The settings as text: top_k 30, top_p 0.85."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())
