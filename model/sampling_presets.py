"""Default sampling settings of the command line, the server's chat route and the chat page.

    DEFAULT_SAMPLING  <  the preset of the model's chat format (chat_template.py)  <  the user's settings

Evaluations (questions, exams, reports) use no preset, so that results of different models are comparable.
Read next: sampling.py (the settings), chat_template.py (the presets and their sources).
"""

from typing import Any

from model.chat_template import CHAT_FORMATS, ChatTemplate, find_chat_template
from model.jinja_template import JinjaTemplate

DEFAULT_SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}  # small models become incoherent at temperature 1
PRESET_CHOICES = ("auto", "none", *CHAT_FORMATS)  # values of --sampling_preset


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
