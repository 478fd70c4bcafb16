"""Sidebar of the chat page: model selection, model summaries, system prompt, tools and sampling parameters.

Called by page.py. Read next: model_list.py (where the facts come from), page_strings.py (the texts).
"""

from dataclasses import dataclass
from typing import Any

import streamlit as st

from evaluation.tool_loop import NO_TOOLS, ToolOptions
from evaluation.tools import TOOLS, Tool
from model.chat_template import CHAT_FORMATS
from model.sampling import MAX_BEAMS, SamplingParams
from model.sampling_presets import DEFAULT_SAMPLING, find_preset, format_settings, merge_settings
from serving.model_list import ModelEntry
from serving.page_markdown import escape_markdown
from serving.page_strings import SCORE_LABELS, STAGE_LABELS, STRINGS

# Name of a setting -> lowest, highest and initial value, step.
SAMPLING_SLIDERS = {"top_p": (0.05, 1.0, 0.9, 0.05), "top_k": (0, 200, 0, 1), "min_p": (0.0, 0.5, 0.0, 0.01)}
OTHER_SLIDERS = {
    "repetition_penalty": (1.0, 2.0, 1.0, 0.05),
    "frequency_penalty": (0.0, 2.0, 0.0, 0.05),
    "no_repeat_ngram_size": (0, 20, 0, 1),
    "num_beams": (1, MAX_BEAMS, 1, 1),
}
SMALL_MODEL_PARAMETERS = 100e6  # see fitting_temperature


@dataclass(frozen=True)
class SidebarChoices:
    """One or two models, their sampling parameters, system prompt and tools, and whether Markdown is rendered."""

    models: list[ModelEntry]
    sampling: SamplingParams
    system: str
    options: ToolOptions
    markdown: bool


def draw_choices(models: dict[str, ModelEntry], lang: str, tools: dict[str, Tool] = TOOLS) -> SidebarChoices:
    """Draw the sidebar's widgets and return their values. `models`: by name, at least one. `tools`: to choose from."""
    strings, state = STRINGS[lang], st.session_state
    names = list(models)
    if state.get("model") not in models:  # first run, or its file was deleted
        state["model"] = names[0]
    all_scores = model_summary(models[state["model"]], lang, scores=3)
    first = models[st.selectbox(strings["model"], names, key="model", help=all_scores) or names[0]]
    st.caption(model_summary(first, lang))
    others = ["", *(name for name in names if name != first.name)]
    if state.get("second") not in others:
        state["second"] = ""
    if len(others) > 1:
        st.selectbox(strings["second"], others, key="second", format_func=lambda name: name or strings["no_second"])
    second = state["second"]
    if second:
        st.caption(model_summary(models[second], lang))
    chosen = [first, models[second]] if second else [first]
    st.caption(strings["sampling"])
    sampling = draw_sampling_controls(strings, chosen, draw_preset_toggle(first, strings))
    with st.expander(strings["instructions"]):
        has_chat_model = any(model.is_chat_model for model in chosen)
        system = st.text_area(
            strings["system"],
            key="system",
            height=80,
            max_chars=2000,
            disabled=not has_chat_model,
            placeholder=strings["system_hint" if has_chat_model else "no_system"],
        )
        options = draw_tool_controls(strings, tools, all(model.has_tools for model in chosen))
    markdown = st.toggle(strings["markdown"], key="markdown", help=strings["markdown_help"])
    return SidebarChoices(chosen, sampling, system if has_chat_model else "", options, markdown)


def draw_tool_controls(strings: dict[str, str], tools: dict[str, Tool], has_tools: bool) -> ToolOptions:
    """Draw the tool picker and the thinking switch, disabled unless all models may have tools."""
    names = st.pills(  # unlike those of a multiselect, all its texts are ours
        strings["tools"], list(tools), selection_mode="multi", key="tools", disabled=not has_tools,
        format_func=lambda name: strings[f"tool_{name}"], help=strings["tools_help" if has_tools else "no_tools"],
    )  # fmt: skip
    is_thinking = st.toggle(
        strings["thinking"], True, key="thinking", disabled=not has_tools, help=strings["thinking_help"]
    )
    if not has_tools:
        return NO_TOOLS
    return ToolOptions(tuple(tools[name] for name in names), enable_thinking=None if is_thinking else False)


def draw_preset_toggle(model: ModelEntry, strings: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Draw the toggle of the chat format's preset, if it has one; return (name, settings), empty if off."""
    name = model.facts["chat_format"] if model.is_chat_model else ""
    name, settings = find_preset(name if name in CHAT_FORMATS else "none", None)
    if not settings:
        return "", {}
    help_text = strings["preset_help"].format(settings=escape_markdown(format_settings(settings)))
    is_on = st.toggle(strings["preset"].format(format=name), True, key=f"preset_{name}", help=help_text)
    return (name, settings) if is_on else ("", {})


def fitting_temperature(parameters: float) -> float:
    """The initial temperature of a model: small ones make fewer mistakes near the most likely tokens.

    Measured on 400 held-out questions for two models of 4.6 M parameters: 93.5 % and 91.7 % correct at 0.3, 92.0 % and
    89.2 % at 0.7, 89.0 % and 81.0 % at 1.0; greedy decoding is no better than 0.3.
    """
    return 0.3 if parameters < SMALL_MODEL_PARAMETERS else DEFAULT_SAMPLING["temperature"]


def draw_sampling_controls(
    strings: dict[str, str], models: list[ModelEntry], preset: tuple[str, dict[str, Any]]
) -> SamplingParams:
    """Draw the sampling controls and return their values. `preset`: (name, settings).

    Each preset has widgets of its own, whose initial values are its settings; so has each initial temperature.
    """
    name, settings = preset
    suffix = f"_{name}" if name else ""
    limit = min(model.max_seq_len for model in models)
    first = merge_settings(settings, DEFAULT_SAMPLING)
    if "temperature" not in settings:
        first["temperature"] = fitting_temperature(min(model.facts["parameters"] for model in models))

    def slider(name: str, low: Any, high: Any, value: Any, step: Any, **options: Any) -> Any:
        options = {"key": name + suffix, "help": strings.get(f"{name}_help"), **options}
        return st.slider(strings[name], low, high, first.get(name, value), step, **options)

    # Beam search does not sample, so the temperature has no effect.
    is_beam_search = st.session_state.get(f"num_beams{suffix}", first.get("num_beams", 1)) > 1
    key = f"temperature_{first['temperature']}{suffix}"
    temperature = slider("temperature", 0.0, 2.0, 0.7, 0.05, key=key, disabled=is_beam_search)
    longest = slider("max_new_tokens", 1, max(limit, 2), min(200, limit), 1, key=f"max_new_tokens_{limit}")
    with st.expander(strings["more"]):
        is_greedy = is_beam_search or temperature == 0  # the sampling sliders have no effect
        values = {name: slider(name, *range_, disabled=is_greedy) for name, range_ in SAMPLING_SLIDERS.items()}
        values |= {name: slider(name, *range_) for name, range_ in OTHER_SLIDERS.items()}
        seed = st.number_input(
            strings["seed"], 0, 2**31, None, key="seed", help=strings["seed_help"], disabled=is_greedy, step=1
        )
    values["penalty_window"] = first.get("penalty_window", 0)
    values |= {"temperature": 0.0 if is_beam_search else temperature, "max_new_tokens": longest, "seed": seed}
    return SamplingParams(**values)


def model_summary(model: ModelEntry, lang: str, scores: int = 1) -> str:
    """A model's stage, size, training data and up to `scores` scores, as a few lines of Markdown."""
    strings, facts = STRINGS[lang], model.facts
    name, explanation = STAGE_LABELS[lang].get(model.stage, (model.stage, ""))
    total, active = facts["parameters"], facts["active_parameters"]
    size = strings["size" if active == total else "size_active"].format(
        total=format_count(total), active=format_count(active)
    )
    lines = [
        f"**{escape_markdown(name)}** · {explanation}",
        f"{size} · {strings['length'].format(n=model.max_seq_len)}",
    ]
    units = [strings[unit].format(n=format_count(facts[unit])) for unit in ("tokens", "pairs") if facts[unit]]
    if units:
        lines.append(strings["trained"].format(units=" + ".join(units)))
    shown = model.scores[:scores]
    for what, values in shown:
        kind, _, report = what.partition(":")
        label = SCORE_LABELS[lang][kind] + (f" ({escape_markdown(report)})" if len(shown) > 1 else "")
        lines.append(f"{label}{strings['colon']}{format_by_language(values, kind, strings)}")
    return "  \n".join(lines)


def format_count(number: float) -> str:
    """26,878,464 -> 26.9 M"""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def format_by_language(values: dict[str, float], kind: str, strings: dict[str, str]) -> str:
    """`Chinese 93.0% · English 92.3%`; bits per byte are not percentages."""
    form = "{} {:.2f}" if kind == "bits_per_byte" else "{} {:.1%}"
    names = {lang: strings.get(f"in_{lang}", escape_markdown(lang)) for lang in sorted(values, reverse=True)}
    return " · ".join(form.format(name, values[lang]) for lang, name in names.items())
