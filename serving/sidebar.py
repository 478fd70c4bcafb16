"""The left side of the chat page: which models, what they are, how they answer.

Called by page.py. Read next: model_list.py (where the facts come from), page_strings.py (the words).
"""

from dataclasses import dataclass
from typing import Any

import streamlit as st

from model.chat_template import FORMAT_NAMES
from model.sampling import MOST_BEAMS, Sampling
from model.sampling_presets import DEFAULTS, find_preset, merge_settings, spell
from serving.model_list import Model
from serving.page_markdown import plain
from serving.page_strings import SCORES, STAGES, WORDS


@dataclass(frozen=True)
class Choices:
    """One model or two, how they answer, what they are told first, and whether Markdown becomes layout."""

    models: list[Model]
    sampling: Sampling
    system: str
    markdown: bool


def choose(models: dict[str, Model], lang: str) -> Choices:
    """Draw the choices and return them. `models` by name, at least one."""
    say, state = WORDS[lang], st.session_state
    names = list(models)
    if state.get("model") not in models:  # the first time, or its file is gone
        state["model"] = names[0]
    first = models[st.selectbox(say["model"], names, key="model") or names[0]]
    st.caption(facts(first, lang, scores=3))
    others = ["", *(name for name in names if name != first.name)]
    if state.get("second") not in others:
        state["second"] = ""
    if len(others) > 1:
        st.selectbox(say["second"], others, key="second", format_func=lambda name: name or say["no_second"])
    second = state["second"]
    if second:
        st.caption(facts(models[second], lang, scores=3))
    chosen = [first, models[second]] if second else [first]
    answers = any(model.chats for model in chosen)
    system = st.text_area(
        say["system"], key="system", height=80, max_chars=2000, disabled=not answers,
        placeholder=say["system_hint" if answers else "no_system"],
    )  # fmt: skip
    st.caption(say["sampling"])
    sampling = controls(say, min(model.max_seq_len for model in chosen), preset_of(first, say))
    markdown = st.toggle(say["markdown"], key="markdown", help=say["markdown_help"])
    return Choices(chosen, sampling, system if answers else "", markdown)


def preset_of(model: Model, say: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Draw the switch of the chat format's preset where there is one; returns (name, settings), empty without it."""
    name = model.about["chat_format"] if model.chats else ""
    name, settings = find_preset(name if name in FORMAT_NAMES else "none", None)
    if not settings:
        return "", {}
    label, help_text = say["preset"].format(format=name), say["preset_help"].format(settings=plain(spell(settings)))
    return (name, settings) if st.toggle(label, True, key=f"preset_{name}", help=help_text) else ("", {})


def controls(say: dict[str, str], limit: int, preset: tuple[str, dict[str, Any]]) -> Sampling:
    """How the next token is drawn. `limit`: tokens that the models read. `preset`: a name and what it sets.

    Each preset has controls of its own, which begin with its settings.
    """
    name, settings = preset
    suffix = f"_{name}" if name else ""
    first = merge_settings(settings, DEFAULTS)

    def slider(name: str, low: Any, high: Any, value: Any, step: Any, key: str = "", disabled: bool = False) -> Any:
        help_text, value = say.get(f"{name}_help"), first.get(name, value)
        return st.slider(say[name], low, high, value, step, key=key or name + suffix, help=help_text, disabled=disabled)

    # Beam search draws nothing: the temperature counts only without it.
    searches = st.session_state.get(f"num_beams{suffix}", first.get("num_beams", 1)) > 1
    temperature = slider("temperature", 0.0, 2.0, 0.7, 0.05, disabled=searches)
    longest = slider("max_new_tokens", 1, max(limit, 2), min(200, limit), 1, key=f"max_new_tokens_{limit}")
    with st.expander(say["more"]):
        greedy = searches or temperature == 0  # then these sliders have no effect
        top_p = slider("top_p", 0.05, 1.0, 0.9, 0.05, disabled=greedy)
        top_k = slider("top_k", 0, 200, 0, 1, disabled=greedy)
        min_p = slider("min_p", 0.0, 0.5, 0.0, 0.01, disabled=greedy)
        penalty = slider("repetition_penalty", 1.0, 2.0, 1.0, 0.05)
        ngrams = slider("no_repeat_ngram_size", 0, 20, 0, 1)
        beams = slider("num_beams", 1, MOST_BEAMS, 1, 1)
        seed = st.number_input(
            say["seed"], 0, 2**31, None, key="seed", help=say["seed_help"], disabled=greedy, step=1
        )  # fmt: skip
    return Sampling(
        temperature=0.0 if searches else temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=penalty, no_repeat_ngram_size=ngrams, num_beams=beams, max_new_tokens=longest, seed=seed,
    )  # fmt: skip


def facts(model: Model, lang: str, scores: int = 1) -> str:
    """What a model is, in a few lines of Markdown, with at most so many scores."""
    say, about = WORDS[lang], model.about
    name, does = STAGES[lang].get(model.stage, (model.stage, ""))
    total, active = about["parameters"], about["active_parameters"]
    size = say["size" if active == total else "size_active"].format(total=short(total), active=short(active))
    lines = [f"**{plain(name)}** · {does}", f"{size} · {say['length'].format(n=model.max_seq_len)}"]
    units = [say[unit].format(n=short(about[unit])) for unit in ("tokens", "pairs") if about[unit]]
    if units:
        lines.append(say["trained"].format(units=" + ".join(units)))
    shown = model.scores[:scores]
    for what, values in shown:
        kind, _, report = what.partition(":")
        label = SCORES[lang][kind] + (f" ({plain(report)})" if len(shown) > 1 else "")
        lines.append(f"{label}: {by_language(values, kind)}")
    return "  \n".join(lines)


def short(number: float) -> str:
    """26,878,464 -> 26.9 M"""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def by_language(values: dict[str, float], kind: str) -> str:
    """`zh 93.0% · en 92.3%`, zh first; bits per byte are no shares."""
    form = "{} {:.2f}" if kind == "bits_per_byte" else "{} {:.1%}"
    return " · ".join(form.format(plain(lang), values[lang]) for lang in sorted(values, reverse=True))
