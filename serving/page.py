"""The chat page in streamlit: draws the model list, the sidebar and the conversation.

    each user input reruns `draw_page` from top to bottom:  sidebar -> action -> turns -> streaming reply

The run that draws a streaming reply also generates it. A click meanwhile ends that run, and the next run continues the
same reply (conversation.py), unless the click was Stop. A model's text is drawn as plain text, never as HTML; as
Markdown only if the user chooses it, and then without images and links (page_markdown.py).
Called by ../web_demo.py. Read next: conversation.py, page_markdown.py, sidebar.py, page_strings.py.
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import streamlit as st

from common.device import autocast, pick_device, pick_dtype
from common.errors import UserError
from evaluation.chat_model import ChatModel, open_chat_model
from evaluation.tools import Tool, make_tools
from serving.config import PageConfig
from serving.conversation import ChatReply, ChatTurn, Conversation
from serving.copy_button import copy_button
from serving.model_list import ModelEntry, file_version, list_models, with_rope_scaling
from serving.page_markdown import block_requests, escape_markdown, safe_markdown
from serving.page_strings import EXAMPLE_PROMPTS, LANGUAGE_LABELS, STRINGS
from serving.sidebar import SidebarChoices, draw_choices, model_summary

LOGO = ":material/potted_plant:"
STYLE = """<style>
.stMainBlockContainer {padding-top: 3rem}
.stSidebar h1 {padding-top: 0}
.st-key-stop {position: sticky; bottom: 9.5rem; z-index: 10; align-self: flex-end}
/* Stop stays under the mouse while the reply grows */
</style>"""
OWN_MODEL_COMMANDS = """python train_tokenizer.py FILES…
python data_process.py pretrain FILES…
python 1-pretrain.py
python data_process.py sft CHATS…
python 3-full_sft.py"""
REDRAW_SECONDS = 0.06  # between two updates of a streaming reply
MAX_QUESTION_CHARS = 20_000
MAX_MODEL_CARDS = 4  # models described on the welcome page; the sidebar lists all


@st.cache_resource(max_entries=4, show_spinner=False)
def open_page_model(path: Path, name: str, version: tuple[int, int], config: PageConfig) -> ChatModel:
    """Load a model; cached for all sessions of the page. A new `version` of the file is loaded again."""
    chat_model = open_chat_model(path, config.device, config.dtype, config.rope, config.quantize)
    return dataclasses.replace(chat_model, name=name)


@st.cache_resource(show_spinner=False)
def page_tools(lookup_file: str) -> dict[str, Tool]:
    """The tools of the sidebar; the file is read once."""
    return make_tools(lookup_file=lookup_file)


class ChatPage:
    """One run of the page, in one language."""

    def __init__(self, config: PageConfig) -> None:
        self.config = config
        self.state = st.session_state
        self.conversation: Conversation = self.state.setdefault("conversation", Conversation())
        locale = (st.context.locale or "") if config.lang == "auto" else config.lang
        self.lang = self.state.get("lang") or ("zh" if locale.lower().startswith("zh") else "en")
        self.strings = STRINGS[self.lang]

    def draw(self) -> None:
        layout: Any = "wide" if self.state.get("second") else "centered"
        st.set_page_config(self.strings["title"], page_icon="🌱", layout=layout)
        st.html(STYLE)
        block_requests()
        files = tuple(map(Path, self.config.checkpoint))
        model_list = [with_rope_scaling(m, self.config.rope) for m in list_models(self.config.models_dir, files)]
        models = {model.name: model for model in model_list if not model.error}
        with st.sidebar:
            choices = self.draw_sidebar(models, [model for model in model_list if model.error])
        if not choices:
            self.draw_no_model()
            return
        self.run_action(choices)
        placeholder = st.empty()  # replaces the welcome page, which would stay visible while a reply streams
        if self.conversation.turns:
            self.draw_conversation(choices)
        else:
            with placeholder.container():
                self.draw_welcome(list(models.values()), choices)

    def button(self, name: str, icon: str, on_click: Any = None, *args: Any, **options: Any) -> bool:
        """Draw a button whose label is the string `name`; `on_click(*args)` is called before the next run."""
        icon = f":material/{icon}:"
        return st.button(self.strings[name], icon=icon, on_click=on_click, args=args, **{"key": name, **options})

    def draw_sidebar(self, models: dict[str, ModelEntry], unreadable: list[ModelEntry]) -> SidebarChoices | None:
        strings = self.strings
        st.title(f":primary[{LOGO}] {strings['title']}")
        st.radio(
            strings["language"],
            list(LANGUAGE_LABELS),
            list(LANGUAGE_LABELS).index(self.lang),
            key="lang",
            horizontal=True,
            format_func=lambda lang: LANGUAGE_LABELS[lang],
            label_visibility="collapsed",
        )
        choices = None
        if models:
            choices = draw_choices(models, self.lang, page_tools(self.config.lookup_file))
            has_turns = bool(self.conversation.turns)
            self.button("clear", "add", self.clear_conversation, disabled=not has_turns, width="stretch")
        if unreadable:
            with st.expander(strings["unreadable"].format(n=len(unreadable))):
                for model in unreadable:
                    st.caption(escape_markdown(model.error))
        return choices

    def clear_conversation(self) -> None:
        self.conversation.clear()
        self.state["editing"] = False

    def request_action(self, action: str, text: str = "") -> None:
        """Callback of a button: store the action for the next run of the page."""
        self.state["pending_action"] = (action, text)
        self.state["editing"] = False

    def run_action(self, choices: SidebarChoices) -> None:
        strings, models = self.strings, choices.models
        hint = strings["ask" if models[0].is_chat_model else "continue"].format(name=models[0].name)
        hint = strings["ask_both"] if len(models) > 1 else hint
        question = st.chat_input(hint, max_chars=MAX_QUESTION_CHARS, key="question")
        action, text = self.state.pop("pending_action", ("", ""))
        if question and question.strip():
            action, text = "ask", question
            self.state["editing"] = False
        if not action:
            return
        try:
            with st.spinner(strings["loading"].format(name=", ".join(escape_markdown(model.name) for model in models))):
                chat_models = [open_page_model(m.path, m.name, file_version(m.path), self.config) for m in models]
            if action == "ask":
                self.conversation.start_turn(
                    text, chat_models, choices.sampling, choices.system, options=choices.options
                )
            else:
                edited = text if action == "edit" else None
                self.conversation.answer_again(chat_models, choices.sampling, choices.system, edited, choices.options)
        except UserError as error:
            st.error(escape_markdown(str(error)))
        except OSError as error:  # the file was deleted while it was opened
            st.error(escape_markdown(f"{error.filename}: {error.strerror}"))

    def draw_no_model(self) -> None:
        strings = self.strings
        st.header(strings["none_title"])
        st.write(strings["none_text"].format(folder=str(self.config.models_dir.absolute()).replace("`", "'")))
        st.write(strings["none_demo"])
        st.code("make demo                     # python demo.py", language="bash")
        st.write(strings["none_own"])
        st.code(OWN_MODEL_COMMANDS, language="bash")
        st.write(strings["none_other"])
        st.code("python web_demo.py --out_dir DIR\npython web_demo.py --checkpoint FILE_OR_DIR…", language="bash")
        self.button("look_again", "refresh")

    def draw_welcome(self, models: list[ModelEntry], choices: SidebarChoices) -> None:
        strings, first = self.strings, choices.models[0]
        st.header(strings["welcome"])
        st.caption(strings["welcome_sub"])
        st.write(strings["starts"])
        with st.container(horizontal=True):
            for example in EXAMPLE_PROMPTS[self.lang]["chat" if first.is_chat_model else "text"]:
                st.button(example, on_click=self.request_action, args=("ask", example))
        if len(models) < 2:
            return
        st.write("")
        st.write(strings["models"])
        columns = st.columns(2)
        for i, model in enumerate(models[:MAX_MODEL_CARDS]):
            with columns[i % 2].container(border=True):
                with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
                    st.markdown(f"**{escape_markdown(model.name)}**", width="content")
                    is_chosen, choose = model.name == first.name, self.state.__setitem__
                    label = strings["chosen" if is_chosen else "choose"]
                    options: Any = {"on_click": choose, "args": ("model", model.name), "disabled": is_chosen}
                    st.button(label, key=f"choose {model.name}", type="tertiary", **options)
                st.caption(model_summary(model, self.lang))

    def draw_conversation(self, choices: SidebarChoices) -> None:
        placeholders: list[tuple[Any, Any]] = []
        for number, turn in enumerate(self.conversation.turns):
            placeholders = self.draw_turn(number, turn, choices)
        if not self.conversation.streaming:
            self.draw_last_buttons()
            return
        self.button("stop", "stop", self.conversation.stop, type="primary")
        last, redrawn_at, is_streaming = self.conversation.turns[-1], 0.0, True
        device = pick_device(self.config.device)
        with autocast(device, pick_dtype(self.config.dtype, device)):  # around the loop: weights are cast once
            while is_streaming:
                is_streaming = self.conversation.advance()
                if not is_streaming or time.monotonic() - redrawn_at > REDRAW_SECONDS:
                    for (text, footer), reply in zip(placeholders, last.replies, strict=True):
                        self.draw_reply(text, footer, reply, choices)
                    redrawn_at = time.monotonic()
        st.rerun()  # draws the buttons of a finished turn

    def draw_turn(self, number: int, turn: ChatTurn, choices: SidebarChoices) -> list[tuple[Any, Any]]:
        """Draw a turn; returns the placeholders (text, footer) of its replies."""
        with st.chat_message("user", avatar=":material/person:"):
            st.text(turn.question)
        placeholders = []
        columns = st.columns(len(turn.replies)) if len(turn.replies) > 1 else [st.container()]
        for side, reply in enumerate(turn.replies):
            with columns[side], st.chat_message("assistant", avatar=LOGO):
                text = st.empty()
                with st.container(horizontal=True, vertical_alignment="center"):
                    footer = st.empty()
                    if reply.stop_reason and reply.text:
                        copy_button(
                            reply.text, self.strings["copy"], self.strings["copied"], key=f"copy {number} {side}"
                        )
                self.draw_reply(text, footer, reply, choices)
                placeholders.append((text, footer))
        return placeholders

    def draw_reply(self, placeholder: Any, footer: Any, reply: ChatReply, choices: SidebarChoices) -> None:
        """Draw a reply's text so far and the line below it."""
        strings = self.strings
        if all(part.kind == "content" for part in reply.parts):
            self.draw_text(placeholder, reply.text, not reply.stop_reason, choices.markdown)
        else:
            with placeholder.container():
                self.draw_parts(reply, choices.markdown)
        notes = [escape_markdown(reply.model_name)]
        if reply.tokens:
            notes.append(strings["speed"].format(tokens=reply.tokens, speed=f"{reply.tokens_per_second:.0f}"))
        if reply.stop_reason in ("length", "stopped", "tool_calls"):
            notes.append(strings[f"end_{reply.stop_reason}"])
        if reply.error:
            notes.append(f":red[{escape_markdown(reply.error)}]")
        if reply.is_truncated:
            limit = next((model.max_seq_len for model in choices.models if model.name == reply.model_name), "…")
            notes.append(strings["shortened"].format(n=limit))
        footer.caption(" · ".join(notes), width="content")

    def draw_text(self, container: Any, text: str, is_streaming: bool, markdown: bool) -> None:
        """Draw an answer in a container of streamlit, which may be `st` itself."""
        if is_streaming:
            container.text(text + " ▍")
        elif text.strip() and markdown:
            container.markdown(safe_markdown(text))
        elif text.strip():
            container.text(text)
        else:
            container.caption(self.strings["no_answer"])

    def draw_parts(self, reply: ChatReply, markdown: bool) -> None:
        """Draw a reply with thoughts or calls, which are folded; those of a streaming reply are open."""
        labels = {"reasoning": "thought", "tool_call": "call", "tool_result": "result"}
        for is_answer, parts in itertools.groupby(reply.parts, lambda part: part.kind == "content"):
            if is_answer:
                self.draw_text(st, "".join(part.text for part in parts), False, markdown and bool(reply.stop_reason))
                continue
            with st.expander(self.strings["steps"], expanded=not reply.stop_reason):
                for part in parts:
                    st.caption(self.strings[labels[part.kind]])
                    st.text(part.text)
        if not reply.stop_reason:
            st.text("▍")
        elif not reply.text.strip():
            st.caption(self.strings["no_answer"])

    def draw_last_buttons(self) -> None:
        strings = self.strings
        if not self.state.get("editing"):
            with st.container(horizontal=True):
                self.button("again", "refresh", self.request_action, "again", type="tertiary")
                edit = self.state.__setitem__
                self.button("edit", "edit", edit, "editing", True, key="edit_last", type="tertiary")
            return
        with st.form("edit", border=False):
            last = self.conversation.turns[-1].question
            text = st.text_area(strings["edit_label"], last, max_chars=MAX_QUESTION_CHARS, key="edited")
            if st.form_submit_button(strings["send"], type="primary") and text.strip():
                self.request_action("edit", text)
                st.rerun()


def draw_page(config: PageConfig) -> None:
    ChatPage(config).draw()
