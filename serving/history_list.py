"""The sidebar's list of saved conversations: open, delete one, delete all. A second click confirms a deletion.

Called by page.py. Read next: history.py (the files).
"""

from collections.abc import Callable
from typing import Any

import streamlit as st

from common.markdown import code_span
from serving.history import ChatHistory, SavedChat
from serving.page_markdown import escape_markdown
from serving.page_strings import STRINGS

MAX_CHATS_LISTED = 20  # a button lists all
_ALL = "all"


class HistoryList:
    """Draws the list in one language. `open_chat(id)` and `delete_chats(ids)` are called before the next run."""

    def __init__(
        self,
        history: ChatHistory,
        lang: str,
        open_chat: Callable[[str], None],
        delete_chats: Callable[[list[str]], None],
    ) -> None:
        self.history, self.strings, self.state = history, STRINGS[lang], st.session_state
        self.open_chat, self.delete_chats = open_chat, delete_chats

    def draw(self, shown_id: str) -> None:
        """`shown_id`: of the conversation on the page; "" for a new one."""
        strings, chat_ids = self.strings, self.history.ids()
        if not chat_ids:
            return
        folder = code_span(str(self.history.folder.absolute()))
        st.caption(strings["history"], help=strings["history_help"].format(folder=folder))
        with st.container(key="history"):
            for chat in self.history.entries(chat_ids if self.state.get("list_all") else chat_ids[:MAX_CHATS_LISTED]):
                with st.container(horizontal=True):
                    if not self._draw_confirmation(chat.id, [chat.id]):
                        self._draw_chat(chat, chat.id == shown_id)
            if len(chat_ids) > MAX_CHATS_LISTED and not self.state.get("list_all"):
                self._button("all_chats", self.state.__setitem__, "list_all", True)
            with st.container(horizontal=True):
                if not self._draw_confirmation(_ALL, chat_ids):
                    self._button("delete_all", self._ask, _ALL)

    def _draw_chat(self, chat: SavedChat, is_shown: bool) -> None:
        st.button(
            escape_markdown(chat.title), key="open_shown" if is_shown else f"open_{chat.id}", type="tertiary",
            on_click=self.open_chat, args=(chat.id,), disabled=bool(chat.error),
            help=escape_markdown(chat.error) or None, width="stretch",
        )  # fmt: skip
        self._button("delete", self._ask, chat.id, key=f"delete_{chat.id}", icon=":material/delete:")

    def _draw_confirmation(self, name: str, chat_ids: list[str]) -> bool:
        """Draw the two buttons that confirm or cancel the deletion of `name`, if it was asked for."""
        if self.state.get("deleting") != name:
            return False
        self._button("delete_all" if name == _ALL else "delete", self._delete, chat_ids, key="confirm", type="primary")
        self._button("cancel", self._ask, "", key="keep", type="secondary")
        return True

    def _ask(self, name: str) -> None:
        self.state["deleting"] = name

    def _delete(self, chat_ids: list[str]) -> None:
        self._ask("")
        self.delete_chats(chat_ids)

    def _button(self, name: str, on_click: Callable[..., None], *args: Any, **options: Any) -> None:
        options = {"key": name, "type": "tertiary", **options}
        st.button(self.strings[name], on_click=on_click, args=args, **options)
