"""The sampling settings of a front end where the user gives none.

    DEFAULT_SAMPLING  <  the preset of the model's chat format (chat_template.py)  <  what the user names

Used by the command line, the server's chat route and the chat page. Measurements (questions, exams, reports) take no
preset, so that models stay comparable.
Read next: sampling.py (what the settings do), chat_template.py (the presets and their sources).
"""

from typing import Any

from model.chat_template import CHAT_FORMATS, ChatTemplate, find_chat_template
from model.jinja_template import JinjaTemplate

DEFAULT_SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}  # small models become incoherent at temperature 1
PRESET_CHOICES = ("auto", "none", *CHAT_FORMATS)  # of --sampling_preset


def find_preset(choice: str, chat_format: ChatTemplate | JinjaTemplate | None) -> tuple[str, dict[str, Any]]:
    """(name, settings) of the preset that `choice`, one of PRESET_CHOICES, means for a model of this chat format.

    auto: the preset of the model's own format. A format's name: its preset, for models whose files name no format.
    Without a preset the settings are {}.
    """
    chosen = chat_format if choice == "auto" else None if choice == "none" else find_chat_template(choice)
    return (chosen.name, dict(chosen.sampling)) if chosen else ("", {})


def merge_settings(*layers: dict[str, Any]) -> dict[str, Any]:
    """The settings of all layers; of a setting that several name, the first layer decides.

    Beam search draws nothing, so num_beams above 1 and a temperature above 0 exclude each other: the one from the
    earlier layer stays, and the other is switched off. Where one layer names both, both stay and Sampling refuses them.
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
