"""The left side of the chat page: which models, what they are, how they answer.

Called by page.py. Read next: shelf.py (where the facts come from), page_words.py (the words).
"""

import re
from dataclasses import dataclass
from typing import Any

import streamlit as st

from model.generate import Sampling
from serving.page_words import SCORES, STAGES, WORDS
from serving.shelf import Model


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
    sampling = controls(say, min(model.max_seq_len for model in chosen))
    markdown = st.toggle(say["markdown"], key="markdown", help=say["markdown_help"])
    return Choices(chosen, sampling, system if answers else "", markdown)


def controls(say: dict[str, str], limit: int) -> Sampling:
    """How the next token is drawn. `limit`: tokens that the models read."""

    def slider(name: str, low: Any, high: Any, value: Any, step: Any, key: str = "", disabled: bool = False) -> Any:
        help_text = say.get(f"{name}_help")
        return st.slider(say[name], low, high, value, step, key=key or name, help=help_text, disabled=disabled)

    temperature = slider("temperature", 0.0, 2.0, 0.7, 0.05)
    longest = slider("max_new_tokens", 1, max(limit, 2), min(200, limit), 1, key=f"max_new_tokens_{limit}")
    with st.expander(say["more"]):
        greedy = temperature == 0  # the likeliest token is taken, whatever these say
        top_p = slider("top_p", 0.05, 1.0, 0.9, 0.05, disabled=greedy)
        top_k = slider("top_k", 0, 200, 0, 1, disabled=greedy)
        min_p = slider("min_p", 0.0, 0.5, 0.0, 0.01, disabled=greedy)
        penalty = slider("repetition_penalty", 1.0, 2.0, 1.0, 0.05)
        seed = st.number_input(
            say["seed"], 0, 2**31, None, key="seed", help=say["seed_help"], disabled=greedy, step=1
        )  # fmt: skip
    return Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty,
        max_new_tokens=longest, seed=seed,
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


def plain(text: str) -> str:
    """Text for a place that reads Markdown, so that it shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>$~:-])", r"\\\1", text)


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
