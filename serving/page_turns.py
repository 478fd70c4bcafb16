"""Draws the turns of a conversation: question, reply, thoughts and tool calls, the line below a reply.

A model's text is drawn as plain text, never as HTML; as Markdown only if the user chooses it, and then without images
and links (page_markdown.py).
Called by page.py. Read next: conversation.py, copy_button.py.
"""

import itertools
from collections.abc import Callable
from typing import Any

import streamlit as st

from serving.conversation import ChatReply, ChatTurn
from serving.copy_button import copy_button
from serving.page_markdown import escape_markdown, safe_markdown
from serving.page_strings import STRINGS
from serving.sidebar import SidebarChoices

LOGO = ":material/potted_plant:"
MAX_QUESTION_CHARS = 20_000


class TurnPainter:
    """Draws turns in one language. `choices`: whether Markdown is rendered, and the context lengths of the models."""

    def __init__(self, lang: str, choices: SidebarChoices) -> None:
        self.strings, self.choices = STRINGS[lang], choices

    def draw_question(self, number: int, turn: ChatTurn) -> None:
        with st.container(key=f"question_{number}"), st.chat_message("user", avatar=":material/person:"):
            st.text(turn.question)

    def draw_edit_form(self, question: str, end_editing: Callable[[str], None]) -> None:
        """Draw a question as a text field. `end_editing(text)`: the new question, "" for none."""
        with st.form("edit"):
            text = st.text_area(
                self.strings["edit_label"], question, max_chars=MAX_QUESTION_CHARS, key="edited",
                label_visibility="collapsed",
            )  # fmt: skip
            with st.container(horizontal=True, horizontal_alignment="right"):
                is_cancelled = st.form_submit_button(self.strings["cancel"])
                is_sent = st.form_submit_button(self.strings["send"], type="primary") and text.strip()
        if is_cancelled or is_sent:
            end_editing("" if is_cancelled else text)
            st.rerun()

    def draw_replies(self, number: int, turn: ChatTurn) -> list[tuple[Any, Any]]:
        """Draw the replies of a turn; returns their placeholders (text, footer)."""
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
                self.draw_reply(text, footer, reply)
                placeholders.append((text, footer))
        return placeholders

    def draw_reply(self, placeholder: Any, footer: Any, reply: ChatReply) -> None:
        """Draw a reply's text so far and the line below it."""
        strings = self.strings
        if all(part.kind == "content" for part in reply.parts):
            self._draw_text(placeholder, reply.text, not reply.stop_reason, self.choices.markdown)
        else:
            with placeholder.container():
                self._draw_parts(reply)
        notes = [escape_markdown(reply.model_name)]
        if reply.tokens:
            notes.append(strings["speed"].format(tokens=reply.tokens, speed=f"{reply.tokens_per_second:.0f}"))
        if reply.stop_reason in ("length", "stopped", "tool_calls"):
            notes.append(strings[f"end_{reply.stop_reason}"])
        if reply.error:
            notes.append(f":red[{escape_markdown(reply.error)}]")
        if reply.is_truncated:
            models = self.choices.models
            limit = next((model.max_seq_len for model in models if model.name == reply.model_name), "…")
            notes.append(strings["shortened"].format(n=limit))
        footer.caption(" · ".join(notes), width="content")

    def _draw_text(self, container: Any, text: str, is_streaming: bool, markdown: bool) -> None:
        """Draw an answer in a container of streamlit, which may be `st` itself."""
        if is_streaming:
            container.text(text + " ▍")
        elif text.strip() and markdown:
            container.markdown(safe_markdown(text))
        elif text.strip():
            container.text(text)
        else:
            container.caption(self.strings["no_answer"])

    def _draw_parts(self, reply: ChatReply) -> None:
        """Draw a reply with thoughts or calls, which are folded; those of a streaming reply are open."""
        labels = {"reasoning": "thought", "tool_call": "call", "tool_result": "result"}
        for is_answer, parts in itertools.groupby(reply.parts, lambda part: part.kind == "content"):
            if is_answer:
                markdown = self.choices.markdown and bool(reply.stop_reason)
                self._draw_text(st, "".join(part.text for part in parts), False, markdown)
                continue
            with st.expander(self.strings["steps"], expanded=not reply.stop_reason):
                for part in parts:
                    st.caption(self.strings[labels[part.kind]])
                    st.text(part.text)
        if not reply.stop_reason:
            st.text("▍")
        elif not reply.text.strip():
            st.caption(self.strings["no_answer"])
