"""The chat page: draws the shelf, the controls and the conversation with streamlit; decides nothing about models.

    every click and key runs `show` from top to bottom:  choices -> what was asked for -> the turns -> the growing reply

The reply grows in the same run that draws it. A click in the middle ends that run, and the next one goes on with the
same reply (conversation.py), unless the click was Stop. What a model wrote is drawn as text, never as HTML; as Markdown
only where the reader asks for it, and then without pictures, which would be fetched from elsewhere.
Called by ../web_demo.py. Read next: conversation.py, shelf.py, page_words.py.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
import torch

from corpus.errors import UserError
from model.checkpoint import load_model
from model.generate import Sampling
from serving.conversation import Conversation, Reply, Speaker, Turn
from serving.copy_button import copy_button
from serving.page_words import LANGUAGES, SCORES, STAGES, STARTS, WORDS
from serving.shelf import Model, explain, find_models, stamp
from trainer.runtime import autocast

LOGO = ":material/potted_plant:"
STYLE = """<style>
.stMainBlockContainer {padding-top: 3rem}
.stSidebar h1 {padding-top: 0}
.st-key-stop {position: sticky; bottom: 8rem; z-index: 10}  /* it stays under the mouse while the answer grows */
</style>"""
REDRAW_SECONDS = 0.06  # between two drawings of a growing reply
LONGEST_QUESTION = 20_000  # characters
CARDS = 4  # models explained on the empty page; the list in the sidebar has all


@dataclass(frozen=True)
class Options:
    """What web_demo.py was started with. `files` stand instead of what is in `out_dir`; `lang`: auto, zh or en."""

    out_dir: Path
    files: tuple[Path, ...]
    device: torch.device
    dtype: torch.dtype
    lang: str = "auto"


@dataclass(frozen=True)
class Choices:
    """What the sidebar says: one model or two, how they answer, and what they are told first."""

    models: list[Model]
    sampling: Sampling
    system: str
    markdown: bool


def plain(text: str) -> str:
    """Text for a place that reads Markdown, so that it shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>$~:-])", r"\\\1", text)


def without_pictures(text: str) -> str:
    """Markdown whose pictures are links: drawing the page must fetch nothing."""
    return text.replace("![", r"\![")


@st.cache_resource(max_entries=4, show_spinner=False)
def _open(path: Path, _name: str, stamp_of_file: tuple[int, int], device: torch.device) -> Speaker:
    model, tokenizer, checkpoint = load_model(path, device)
    return Speaker(_name, model, tokenizer, checkpoint["stage"])


class Page:
    """One drawing of the page in one language."""

    def __init__(self, options: Options) -> None:
        self.options = options
        state = st.session_state
        self.talk: Conversation = state.setdefault("talk", Conversation())
        locale = (st.context.locale or "") if options.lang == "auto" else options.lang
        self.lang = state.get("lang") or ("zh" if locale.lower().startswith("zh") else "en")
        self.words = WORDS[self.lang]

    def show(self) -> None:
        two = bool(st.session_state.get("second"))
        st.set_page_config(self.words["title"], page_icon="🌱", layout="wide" if two else "centered")
        st.html(STYLE)
        root = self.options.out_dir
        shelf = [explain(path, root) for path in self.options.files or find_models(root)]
        models = {model.name: model for model in shelf if not model.problem}
        with st.sidebar:
            st.title(f":primary[{LOGO}] {self.words['title']}")
            st.segmented_control(
                self.words["language"], list(LANGUAGES), format_func=LANGUAGES.get, default=self.lang, key="lang",
                label_visibility="collapsed",
            )  # fmt: skip
            choices = self.sidebar(models) if models else None
            self.unreadable([model for model in shelf if model.problem])
        if choices is None:
            return self.no_model()
        self.do_what_was_asked(choices)
        place = st.empty()  # what is not drawn anew stays visible while an answer grows: an empty place replaces it
        if self.talk.turns:
            return self.conversation(choices)
        with place.container():
            return self.welcome(list(models.values()), choices)

    # ---------------------------------------------------------------------------------------------- the sidebar
    def sidebar(self, models: dict[str, Model]) -> Choices:
        say, state = self.words, st.session_state
        names = list(models)
        if state.get("model") not in models:
            state["model"] = names[0]
        first = models[st.selectbox(say["model"], names, key="model")]
        st.caption(self.facts(first, scores=3))
        others = ["", *(name for name in names if name != first.name)]
        if state.get("second") not in others:
            state["second"] = ""
        second = ""
        if len(others) > 1:
            second = st.selectbox(say["second"], others, key="second", format_func=lambda n: n or say["no_second"])
        chosen = [first, *([models[second]] if second else [])]
        if second:
            st.caption(self.facts(models[second], scores=3))
        return self.controls(chosen)

    def controls(self, chosen: list[Model]) -> Choices:
        say = self.words
        answers = any(model.chats for model in chosen)
        system = st.text_area(
            say["system"], key="system", height=80, max_chars=2000, disabled=not answers,
            placeholder=say["system_hint"] if answers else say["no_system"],
        )  # fmt: skip
        st.caption(say["sampling"])
        warm = st.slider(say["temperature"], 0.0, 2.0, 0.7, 0.05, key="temperature", help=say["temperature_help"])
        limit = max(min(model.max_seq_len for model in chosen), 2)
        longest = st.slider(say["max_new_tokens"], 1, limit, min(200, limit), key=f"max_new_tokens_{limit}")
        with st.expander(say["more"]):
            cold = warm == 0  # the likeliest token is taken whatever these say

            def slider(name: str, *numbers: float) -> Any:
                return st.slider(say[name], *numbers, key=name, help=say[f"{name}_help"], disabled=cold)

            top_p = slider("top_p", 0.05, 1.0, 0.9, 0.05)
            top_k = slider("top_k", 0, 200, 0, 1)
            min_p = slider("min_p", 0.0, 0.5, 0.0, 0.01)
            penalty = st.slider(
                say["repetition_penalty"], 1.0, 2.0, 1.0, 0.05, key="repetition_penalty",
                help=say["repetition_penalty_help"],
            )  # fmt: skip
            seed = st.number_input(
                say["seed"], 0, 2**31, None, key="seed", help=say["seed_help"], disabled=cold, step=1
            )
            markdown = st.toggle(say["markdown"], key="markdown", help=say["markdown_help"])
        st.button(
            say["clear"], icon=":material/add:", on_click=self.clear, disabled=not self.talk.turns, width="stretch",
            key="clear",
        )  # fmt: skip
        sampling = Sampling(
            temperature=warm, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty,
            max_new_tokens=longest, seed=seed,
        )  # fmt: skip
        return Choices(chosen, sampling, system if answers else "", markdown)

    def facts(self, model: Model, scores: int = 1) -> str:
        """What a model is, in a few lines of Markdown."""
        say, about = self.words, model.about
        name, does = STAGES[self.lang].get(model.stage, (model.stage, ""))
        total, active = about["parameters"], about["active_parameters"]
        size = say["size"].format(total=short(total))
        if active != total:
            size = say["size_active"].format(total=short(total), active=short(active))
        lines = [f"**{plain(name)}** · {does}", f"{size} · {say['length'].format(n=model.max_seq_len)}"]
        units = [say[unit].format(n=short(about[unit])) for unit in ("tokens", "pairs") if about[unit]]
        if units:
            lines.append(say["trained"].format(units=" + ".join(units)))
        for what, values in model.scores[:scores]:
            kind, _, report = what.partition(":")
            label = SCORES[self.lang][kind] + (f" ({plain(report)})" if min(scores, len(model.scores)) > 1 else "")
            lines.append(f"{label}: {languages(values, kind)}")
        return "  \n".join(lines)

    def unreadable(self, models: list[Model]) -> None:
        if models:
            with st.expander(self.words["unreadable"].format(n=len(models))):
                for model in models:
                    st.caption(plain(model.problem))

    # ---------------------------------------------------------------------------------------------- what is asked
    def clear(self) -> None:
        self.talk.clear()
        st.session_state["editing"] = False

    def want(self, what: str, text: str = "") -> None:
        """Called by a button, before the page is drawn: the drawing does it."""
        st.session_state["wanted"] = (what, text)
        st.session_state["editing"] = False

    def do_what_was_asked(self, choices: Choices) -> None:
        say, first = self.words, choices.models[0]
        hint = say["ask" if first.chats else "continue"].format(name=first.name)
        hint = say["ask_both"] if len(choices.models) > 1 else hint
        typed = st.chat_input(hint, max_chars=LONGEST_QUESTION, key="question")
        what, text = st.session_state.pop("wanted", ("", ""))
        if typed and typed.strip():
            what, text = "ask", typed
            st.session_state["editing"] = False
        if not what:
            return
        try:
            with st.spinner(say["loading"].format(name=", ".join(plain(model.name) for model in choices.models))):
                speakers = [
                    _open(model.path, model.name, stamp(model.path), self.options.device) for model in choices.models
                ]
            with autocast(self.options.device, self.options.dtype):
                if what == "again":
                    self.talk.answer_again(speakers, choices.sampling, choices.system)
                elif what == "edit":
                    self.talk.edit_last(text, speakers, choices.sampling, choices.system)
                else:
                    self.talk.ask(text, speakers, choices.sampling, choices.system)
        except UserError as error:
            st.error(plain(str(error)))
        except OSError as error:  # the file went away while it was opened
            st.error(plain(f"{error.filename}: {error.strerror}"))

    # ---------------------------------------------------------------------------------------------- the middle
    def no_model(self) -> None:
        say = self.words
        st.header(say["none_title"])
        st.write(say["none_text"].format(folder=str(self.options.out_dir.absolute()).replace("`", "'")))
        st.write(say["none_demo"])
        st.code("make demo                     # python demo.py", language="bash")
        st.write(say["none_own"])
        lines = ("python train_tokenizer.py FILES…", "python data_process.py pretrain FILES…", "python 1-pretrain.py",
                 "python data_process.py sft CHATS…", "python 3-full_sft.py")  # fmt: skip
        st.code("\n".join(lines), language="bash")
        st.write(say["none_other"])
        st.code("python web_demo.py --out_dir DIR\npython web_demo.py --checkpoint FILE_OR_DIR…", language="bash")
        st.button(say["look_again"], icon=":material/refresh:", key="look_again")

    def welcome(self, models: list[Model], choices: Choices) -> None:
        say = self.words
        st.header(say["welcome"])
        st.caption(say["welcome_sub"])
        st.write(say["starts"])
        with st.container(horizontal=True):
            for start in STARTS[self.lang][choices.models[0].chats]:
                st.button(start, on_click=self.want, args=("ask", start))
        if len(models) < 2:
            return
        st.write("")
        st.write(say["models"])
        columns = st.columns(2)
        for i, model in enumerate(models[:CARDS]):
            with columns[i % 2].container(border=True):
                with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
                    st.markdown(f"**{plain(model.name)}**", width="content")
                    is_chosen = model.name == choices.models[0].name
                    st.button(
                        say["chosen" if is_chosen else "choose"], key=f"choose {model.name}", disabled=is_chosen,
                        on_click=st.session_state.__setitem__, args=("model", model.name), type="tertiary",
                    )  # fmt: skip
                st.caption(self.facts(model))

    def conversation(self, choices: Choices) -> None:
        places: list[tuple[Any, Any]] = []
        for i, turn in enumerate(self.talk.turns):
            places = self.turn(i, turn, choices)
        if not self.talk.is_going:
            return self.last_buttons()
        st.button(self.words["stop"], icon=":material/stop:", on_click=self.talk.stop, key="stop", type="primary")
        last, drawn = self.talk.turns[-1], 0.0
        with autocast(self.options.device, self.options.dtype):
            going = True
            while going:
                going = self.talk.advance()
                if not going or time.monotonic() - drawn > REDRAW_SECONDS:
                    for (text, foot), reply in zip(places, last.replies, strict=True):
                        self.reply(text, foot, reply, choices)
                    drawn = time.monotonic()
        return st.rerun()  # the same page once more, with the buttons of a finished turn

    def turn(self, number: int, turn: Turn, choices: Choices) -> list[tuple[Any, Any]]:
        """Draw a turn; returns the places where its replies go on growing."""
        with st.chat_message("user", avatar=":material/person:"):
            st.text(turn.question)
        places = []
        sides = st.columns(len(turn.replies)) if len(turn.replies) > 1 else [st.container()]
        for side, reply in enumerate(turn.replies):
            with sides[side], st.chat_message("assistant", avatar=LOGO):
                text = st.empty()
                with st.container(horizontal=True, vertical_alignment="center"):
                    foot = st.empty()
                    if reply.end and reply.text:
                        copy_button(reply.text, self.words["copy"], self.words["copied"], key=f"copy {number} {side}")
                self.reply(text, foot, reply, choices)
                places.append((text, foot))
        return places

    def reply(self, place: Any, foot: Any, reply: Reply, choices: Choices) -> None:
        say = self.words
        if reply.problem:
            place.warning(plain(reply.problem))
        elif not reply.end:
            place.text(reply.text + " ▍")
        elif not reply.text.strip():
            place.caption(say["no_answer"])
        elif choices.markdown:
            place.markdown(without_pictures(reply.text))
        else:
            place.text(reply.text)
        notes = [plain(reply.speaker)]
        if reply.tokens:
            notes.append(say["speed"].format(tokens=reply.tokens, speed=f"{reply.speed:.0f}"))
        if reply.end in ("length", "stopped"):
            notes.append(say[f"end_{reply.end}"])
        if reply.shortened:
            limit = next((model.max_seq_len for model in choices.models if model.name == reply.speaker), "…")
            notes.append(say["shortened"].format(n=limit))
        foot.caption(" · ".join(notes), width="content")

    def last_buttons(self) -> None:
        say, state = self.words, st.session_state
        if state.get("editing"):
            with st.form("edit", border=False):
                text = st.text_area(
                    say["edit_label"], self.talk.turns[-1].question, max_chars=LONGEST_QUESTION, key="edited"
                )
                if st.form_submit_button(say["send"], type="primary") and text.strip():
                    self.want("edit", text)
                    st.rerun()
            return
        with st.container(horizontal=True):
            st.button(say["again"], icon=":material/refresh:", on_click=self.want, args=("again",), key="again", type="tertiary")
            st.button(
                say["edit"], icon=":material/edit:", on_click=state.__setitem__, args=("editing", True),
                key="edit_last", type="tertiary",
            )  # fmt: skip


def short(number: int) -> str:
    """26,878,464 -> 26.9 M"""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def languages(values: dict[str, float], what: str) -> str:
    """`zh 93.0 % · en 92.3 %`; bits per byte are no shares."""
    form = "{} {:.2f}" if what == "bits_per_byte" else "{} {:.1%}"
    return " · ".join(form.format(plain(lang), value) for lang, value in values.items())


def show(options: Options) -> None:
    Page(options).show()
