"""The chat page in streamlit: draws the model list, the sidebar, the saved conversations and the conversation.

    each user input reruns `draw_page` from top to bottom:  sidebar -> action -> turns -> streaming reply

The run that draws a streaming reply also generates it. A click meanwhile ends that run, and the next run continues the
same reply (conversation.py), unless the click was Stop. The conversation is saved when a question is asked, every
HISTORY_SECONDS of its reply and at its end. `?chat=ID` in the address shows a saved conversation, also after a reload.
Called by ../web_demo.py. Read next: conversation.py, history.py, page_turns.py, sidebar.py, page_strings.py.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import streamlit as st

from common.device import autocast, pick_device, pick_dtype
from common.errors import UserError
from evaluation.chat_model import ChatModel, open_chat_model
from evaluation.tools import Tool, make_tools
from serving.config import PageConfig
from serving.conversation import Conversation
from serving.history import ChatHistory
from serving.history_list import HistoryList
from serving.model_list import ModelEntry, file_version, list_models, with_rope_scaling
from serving.page_markdown import block_requests, escape_markdown
from serving.page_strings import EXAMPLE_PROMPTS, LANGUAGE_LABELS, STRINGS
from serving.page_style import STYLE, focus_input
from serving.page_turns import LOGO, MAX_QUESTION_CHARS, TurnPainter
from serving.page_welcome import draw_model_cards, draw_no_model
from serving.sidebar import SidebarChoices, draw_choices

REDRAW_SECONDS = 0.06  # between two updates of a streaming reply
HISTORY_SECONDS = 2.0  # between two writes of the file of a streaming reply, at least
MAX_TURNS_DRAWN = 30  # the last ones; a button draws all


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
        folder = config.history_folder
        self.history = ChatHistory(folder) if folder else None
        locale = (st.context.locale or "") if config.lang == "auto" else config.lang
        self.lang = self.state.get("lang") or ("zh" if locale.lower().startswith("zh") else "en")
        self.strings = STRINGS[self.lang]

    @property
    def conversation(self) -> Conversation:
        conversation: Conversation = self.state["conversation"]
        return conversation

    def draw(self) -> None:
        files = tuple(map(Path, self.config.checkpoint))
        model_list = [with_rope_scaling(m, self.config.rope) for m in list_models(self.config.models_dir, files)]
        models = {model.name: model for model in model_list if not model.error}
        self.restore_conversation(models)
        layout: Any = "wide" if self.state.get("second") else "centered"
        st.set_page_config(self.strings["title"], page_icon="🌱", layout=layout)
        st.html(STYLE)
        block_requests()
        with st.sidebar:
            saved_chats, choices = self.draw_sidebar(models, [model for model in model_list if model.error])
        welcome = st.empty()  # cleared by a conversation; its elements would stay visible while a reply streams
        if error := self.state.pop("page_error", ""):
            st.error(escape_markdown(error))
        if choices:
            self.run_action(choices)
        with saved_chats:
            self.draw_saved_chats()
        if not choices:
            draw_no_model(self.config.models_dir, self.lang)
        elif self.conversation.turns:
            self.draw_conversation(choices)
        else:
            with welcome.container():
                self.draw_welcome(list(models.values()), choices)

    def button(self, name: str, icon: str, on_click: Any = None, *args: Any, **options: Any) -> bool:
        """Draw a button whose label is the string `name`; `on_click(*args)` is called before the next run."""
        icon = f":material/{icon}:"
        return st.button(self.strings[name], icon=icon, on_click=on_click, args=args, **{"key": name, **options})

    # ---- saved conversations -----------------------------------------------------------------------------------------
    def restore_conversation(self, models: dict[str, ModelEntry]) -> None:
        """First run of a tab: open the conversation of the page's address. Later: what another tab has written."""
        if "conversation" not in self.state:
            self.state["conversation"] = Conversation()
            self.state["address"] = named = st.query_params.get("chat", "")
            if named:
                self.open_chat(named)
        elif self.history:
            self.state["conversation"] = self.history.refresh(self.conversation)
        if wanted := self.state.pop("wanted_models", []):  # those of an opened conversation, as far as they exist
            found = [name for name in dict.fromkeys(wanted) if name in models]
            self.state["model"] = (found or [self.state.get("model")])[0]
            self.state["second"] = "".join(found[1:2])
        self.show_address()

    def show_address(self) -> None:
        """Put the id of the conversation into the page's address if it has changed."""
        shown = self.conversation.saved_id
        if shown != self.state["address"]:  # not at every run: the browser's Back button would have no effect
            self.state["address"] = shown
            st.query_params.from_dict({"chat": shown} if shown else {})

    def open_chat(self, chat_id: str = "") -> None:
        """Show a saved conversation, or a new one. A streaming reply of the one before is stopped and saved."""
        if self.conversation.streaming:
            self.conversation.stop()
            self.save()
        self.state["editing"] = self.state["all_turns"] = False
        opened = Conversation()
        if chat_id and self.history:
            try:
                opened = self.history.load(chat_id)
                self.state["wanted_models"] = [reply.model_name for reply in opened.turns[-1].replies]
            except UserError as error:
                self.state["page_error"] = str(error)
        self.state["conversation"], self.state["save_error"] = opened, ""

    def delete_chats(self, chat_ids: list[str]) -> None:
        if self.history:
            try:
                self.history.delete(chat_ids)
            except UserError as error:
                self.state["page_error"] = str(error)
                return
        if self.conversation.saved_id in chat_ids:
            self.open_chat()

    def save(self) -> None:
        """Save the conversation; an error is shown below the conversation until it is saved."""
        if self.history:
            try:
                self.history.save(self.conversation)
                self.state["save_error"] = ""
            except UserError as error:
                self.state["save_error"] = str(error)

    def draw_saved_chats(self) -> None:
        """Draw the button of a new conversation and the list of the saved ones."""
        new = {"width": "stretch", "disabled": not self.conversation.turns}
        self.button("new_chat", "edit_square", self.open_chat, **new)
        if self.history:
            HistoryList(self.history, self.lang, self.open_chat, self.delete_chats).draw(self.conversation.saved_id)
        else:
            st.caption(self.strings["not_saved"])

    # ---- sidebar and actions -----------------------------------------------------------------------------------------
    def draw_sidebar(
        self, models: dict[str, ModelEntry], unreadable: list[ModelEntry]
    ) -> tuple[Any, SidebarChoices | None]:
        """Draw the sidebar; returns the container of the saved conversations, which are drawn after the action."""
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
        saved_chats = st.container(key="saved_chats")
        choices = draw_choices(models, self.lang, page_tools(self.config.lookup_file)) if models else None
        if unreadable:
            with st.expander(strings["unreadable"].format(n=len(unreadable))):
                for model in unreadable:
                    st.caption(escape_markdown(model.error))
        return saved_chats, choices

    def request_action(self, action: str, text: str = "") -> None:
        """Callback of a button: store the action for the next run of the page."""
        self.state["pending_action"] = (action, text)
        self.state["editing"] = False

    def end_editing(self, text: str = "") -> None:
        """Close the edit form; `text` is asked in place of the last question."""
        self.request_action("edit" if text else "", text)

    def submit_question(self) -> None:
        """Callback of the input; its value is stored under the widget's key."""
        self.request_action("ask", self.state["question"] or "")

    def run_action(self, choices: SidebarChoices) -> None:
        strings, models = self.strings, choices.models
        action, text = self.state.pop("pending_action", ("", ""))
        if not action or (action != "again" and not text.strip()):
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
        self.save()
        self.show_address()

    def draw_input(self, choices: SidebarChoices) -> None:
        """Draw the input: in a container, or else at the bottom, where streamlit scrolls to the last reply."""
        models = choices.models
        hint = self.strings["ask" if models[0].is_chat_model else "continue"].format(name=models[0].name)
        hint = self.strings["ask_both"] if len(models) > 1 else hint
        st.chat_input(hint, max_chars=MAX_QUESTION_CHARS, key="question", on_submit=self.submit_question)

    def draw_welcome(self, models: list[ModelEntry], choices: SidebarChoices) -> None:
        strings, first = self.strings, choices.models[0]
        st.header(strings["welcome"])
        st.caption(strings["welcome_sub"])
        with st.container(key="composer"):
            self.draw_input(choices)
        with st.container(horizontal=True, key="examples"):
            for example in EXAMPLE_PROMPTS[self.lang]["chat" if first.is_chat_model else "text"]:
                st.button(example, on_click=self.request_action, args=("ask", example))
        if len(models) > 1:
            draw_model_cards(models, first, self.lang)

    def draw_conversation(self, choices: SidebarChoices) -> None:
        painter, turns = TurnPainter(self.lang, choices), self.conversation.turns
        self.draw_input(choices)
        self.button("new_chat", "edit_square", self.open_chat, key="new_top", type="tertiary")
        first = 0 if self.state.get("all_turns") else max(0, len(turns) - MAX_TURNS_DRAWN)
        if first:
            label = self.strings["all_turns"].format(n=first)
            st.button(label, key="all_turns_button", on_click=self.state.__setitem__, args=("all_turns", True))
        placeholders: list[tuple[Any, Any]] = []
        with st.container():
            for number in range(first, len(turns)):
                if self.state.get("editing") and number == len(turns) - 1:
                    painter.draw_edit_form(turns[number].question, self.end_editing)
                else:
                    painter.draw_question(number, turns[number])
                placeholders = painter.draw_replies(number, turns[number])
        below = (
            st.empty()
        )  # replaced at once, where streamlit would show the buttons of the last run until this one ends
        if self.conversation.streaming:
            with below.container():
                self.button("stop", "stop", self.stop, type="primary")
                if len(turns) == 1:
                    focus_input()
            self.stream_replies(painter, placeholders)
        elif not self.state.get("editing"):
            with below.container(horizontal=True):
                self.button("again", "refresh", self.request_action, "again", type="tertiary")
                edit = self.state.__setitem__
                self.button("edit", "edit", edit, "editing", True, key="edit_last", type="tertiary")
        if error := self.state.get("save_error"):
            st.warning(self.strings["save_failed"].format(error=escape_markdown(error)))

    def stream_replies(self, painter: TurnPainter, placeholders: list[tuple[Any, Any]]) -> None:
        """Generate and draw the streaming replies of the last turn, then run the page again."""
        last, redrawn_at, save_at, is_streaming = (
            self.conversation.turns[-1],
            0.0,
            time.monotonic() + HISTORY_SECONDS,
            True,
        )
        device = pick_device(self.config.device)
        try:
            with autocast(device, pick_dtype(self.config.dtype, device)):  # around the loop: weights are cast once
                while is_streaming:
                    is_streaming = self.conversation.advance()
                    if not is_streaming or time.monotonic() - redrawn_at > REDRAW_SECONDS:
                        for (text, footer), reply in zip(placeholders, last.replies, strict=True):
                            painter.draw_reply(text, footer, reply)
                        redrawn_at = time.monotonic()
                    if (started := time.monotonic()) > save_at:
                        self.save()
                        seconds = time.monotonic() - started
                        save_at = started + max(
                            HISTORY_SECONDS, 20 * seconds
                        )  # a long conversation is written less often
        finally:  # also when a click, the end of the server or of the connection ends this run
            self.save()
        st.rerun()  # draws the buttons of a finished turn

    def stop(self) -> None:
        self.conversation.stop()
        self.save()


def draw_page(config: PageConfig) -> None:
    ChatPage(config).draw()
