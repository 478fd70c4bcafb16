"""The chat page: draws the shelf, the choices and the conversation with streamlit; decides nothing about models.

    every click and key runs `show` from top to bottom:  choices -> what was asked for -> the turns -> the growing reply

The reply grows in the same run that draws it. A click in the middle ends that run, and the next one goes on with the
same reply (conversation.py), unless the click was Stop. What a model wrote is drawn as text, never as HTML; as Markdown
only where the reader asks for it, and then without images and links (page_markdown.py).
Called by ../web_demo.py. Read next: conversation.py, page_markdown.py, sidebar.py, page_strings.py.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
import torch

from common.device import autocast
from common.errors import UserError
from export.hf_import import open_model
from model.rope_flags import Rope
from serving.conversation import Conversation, Reply, Speaker, Turn
from serving.copy_button import copy_button
from serving.model_list import Model, fill_shelf, scaled, stamp
from serving.page_markdown import block_requests, plain, safe_markdown
from serving.page_strings import LANGUAGES, STARTS, WORDS
from serving.sidebar import Choices, choose, facts

LOGO = ":material/potted_plant:"
STYLE = """<style>
.stMainBlockContainer {padding-top: 3rem}
.stSidebar h1 {padding-top: 0}
.st-key-stop {position: sticky; bottom: 9.5rem; z-index: 10; align-self: flex-end}
/* Stop stays under the mouse while the answer grows */
</style>"""
REDRAW_SECONDS = 0.06  # between two drawings of a growing reply
LONGEST_QUESTION = 20_000  # characters
CARDS = 4  # models explained on the first page; the list on the left has all


@dataclass(frozen=True)
class Options:
    """What web_demo.py was started with. `files` stand instead of what is in `out_dir`; `lang`: auto, zh or en; `rope`:
    --rope_scaling and --rope_factor."""

    out_dir: Path
    files: tuple[Path, ...]
    device: torch.device
    dtype: torch.dtype
    lang: str = "auto"
    rope: Rope | None = None


@st.cache_resource(max_entries=4, show_spinner=False)
def open_speaker(
    path: Path, name: str, chats: bool, version: tuple[int, int], device: torch.device, rope: Rope | None
) -> Speaker:
    """A loaded model, shared by everybody who looks at the page; a file that was replaced is loaded anew."""
    model, tokenizer, _ = open_model(path, device)
    if rope:
        model.scale_rope(*rope)
    return Speaker(name, model, tokenizer, chats)


class Page:
    """One drawing of the page in one language."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.state = st.session_state
        self.talk: Conversation = self.state.setdefault("talk", Conversation())
        locale = (st.context.locale or "") if options.lang == "auto" else options.lang
        self.lang = self.state.get("lang") or ("zh" if locale.lower().startswith("zh") else "en")
        self.words = WORDS[self.lang]

    def show(self) -> None:
        layout: Any = "wide" if self.state.get("second") else "centered"
        st.set_page_config(self.words["title"], page_icon="🌱", layout=layout)
        st.html(STYLE)
        block_requests()
        shelf = fill_shelf(self.options.out_dir, self.options.files)
        shelf = [scaled(model, self.options.rope) for model in shelf]
        models = {model.name: model for model in shelf if not model.problem}
        with st.sidebar:
            choices = self.sidebar(models, [model for model in shelf if model.problem])
        if not choices:
            self.no_model()
            return
        self.do_what_was_asked(choices)
        place = st.empty()  # what is not drawn anew stays visible while an answer grows: an empty place replaces it
        if self.talk.turns:
            self.conversation(choices)
        else:
            with place.container():
                self.welcome(list(models.values()), choices)

    def sidebar(self, models: dict[str, Model], unreadable: list[Model]) -> Choices | None:
        say = self.words
        st.title(f":primary[{LOGO}] {say['title']}")
        st.radio(
            say["language"], list(LANGUAGES), list(LANGUAGES).index(self.lang), key="lang", horizontal=True,
            format_func=lambda lang: LANGUAGES[lang], label_visibility="collapsed",
        )  # fmt: skip
        choices = None
        if models:
            choices = choose(models, self.lang)
            st.button(
                say["clear"], icon=":material/add:", on_click=self.clear, disabled=not self.talk.turns, width="stretch",
                key="clear",
            )  # fmt: skip
        if unreadable:
            with st.expander(say["unreadable"].format(n=len(unreadable))):
                for model in unreadable:
                    st.caption(plain(model.problem))
        return choices

    def clear(self) -> None:
        self.talk.clear()
        self.state["editing"] = False

    def want(self, what: str, text: str = "") -> None:
        """Called by a button, before the page is drawn: the drawing does it."""
        self.state["wanted"] = (what, text)
        self.state["editing"] = False

    def do_what_was_asked(self, choices: Choices) -> None:
        say, models = self.words, choices.models
        hint = say["ask" if models[0].chats else "continue"].format(name=models[0].name)
        hint = say["ask_both"] if len(models) > 1 else hint
        typed = st.chat_input(hint, max_chars=LONGEST_QUESTION, key="question")
        what, text = self.state.pop("wanted", ("", ""))
        if typed and typed.strip():
            what, text = "ask", typed
            self.state["editing"] = False
        if not what:
            return
        device, rope = self.options.device, self.options.rope
        try:
            with st.spinner(say["loading"].format(name=", ".join(plain(model.name) for model in models))):
                speakers = [open_speaker(m.path, m.name, m.chats, stamp(m.path), device, rope) for m in models]
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
        say, first = self.words, choices.models[0]
        st.header(say["welcome"])
        st.caption(say["welcome_sub"])
        st.write(say["starts"])
        with st.container(horizontal=True):
            for start in STARTS[self.lang]["chat" if first.chats else "text"]:
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
                    st.button(
                        say["chosen" if model.name == first.name else "choose"], key=f"choose {model.name}",
                        disabled=model.name == first.name, type="tertiary",
                        on_click=self.state.__setitem__, args=("model", model.name),
                    )  # fmt: skip
                st.caption(facts(model, self.lang))

    def conversation(self, choices: Choices) -> None:
        places: list[tuple[Any, Any]] = []
        for number, turn in enumerate(self.talk.turns):
            places = self.turn(number, turn, choices)
        if not self.talk.is_going:
            self.last_buttons()
            return
        st.button(self.words["stop"], icon=":material/stop:", on_click=self.talk.stop, key="stop", type="primary")
        last, drawn, going = self.talk.turns[-1], 0.0, True
        with autocast(self.options.device, self.options.dtype):  # around all pieces: weights are converted once
            while going:
                going = self.talk.advance()
                if not going or time.monotonic() - drawn > REDRAW_SECONDS:
                    for (text, foot), reply in zip(places, last.replies, strict=True):
                        self.reply(text, foot, reply, choices)
                    drawn = time.monotonic()
        st.rerun()  # the same page once more, with the buttons of a finished turn

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
        """Draw what a model has said so far, and the line below it."""
        say = self.words
        if not reply.end:
            place.text(reply.text + " ▍")
        elif reply.text.strip() and choices.markdown:
            place.markdown(safe_markdown(reply.text))
        elif reply.text.strip():
            place.text(reply.text)
        else:
            place.caption(say["no_answer"])
        notes = [plain(reply.speaker)]
        if reply.tokens:
            notes.append(say["speed"].format(tokens=reply.tokens, speed=f"{reply.speed:.0f}"))
        if reply.end in ("length", "stopped"):
            notes.append(say[f"end_{reply.end}"])
        if reply.problem:
            notes.append(f":red[{plain(reply.problem)}]")
        if reply.shortened:
            limit = next((model.max_seq_len for model in choices.models if model.name == reply.speaker), "…")
            notes.append(say["shortened"].format(n=limit))
        foot.caption(" · ".join(notes), width="content")

    def last_buttons(self) -> None:
        say = self.words
        if not self.state.get("editing"):
            with st.container(horizontal=True):
                st.button(say["again"], icon=":material/refresh:", on_click=self.want, args=("again",), key="again",
                          type="tertiary")  # fmt: skip
                st.button(say["edit"], icon=":material/edit:", on_click=self.state.__setitem__, args=("editing", True),
                          key="edit_last", type="tertiary")  # fmt: skip
            return
        with st.form("edit", border=False):
            last = self.talk.turns[-1].question
            text = st.text_area(say["edit_label"], last, max_chars=LONGEST_QUESTION, key="edited")
            if st.form_submit_button(say["send"], type="primary") and text.strip():
                self.want("edit", text)
                st.rerun()


def show(options: Options) -> None:
    Page(options).show()
