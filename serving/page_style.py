"""The style sheet of the chat page and the focus of its input: what streamlit's own options cannot set.

A container or button with `key="name"` has the class `st-key-name`.
Called by page.py.
"""

import streamlit as st

STYLE = """<style>
.stMainBlockContainer {padding-top: 3.25rem; padding-bottom: 2rem}
.stBottom [data-testid=stBottomBlockContainer] {padding-top: 0.5rem; padding-bottom: 1.5rem}

/* Sidebar: no space for streamlit's logo, one line per saved conversation, the list scrolls. */
.stSidebar [data-testid=stSidebarHeader] {height: 2.75rem; margin-bottom: 0}
.stSidebar h1 {padding: 0; font-size: 1.6rem}
.stSidebar .stVerticalBlock {gap: 0.75rem}
.st-key-history {max-height: 34vh; overflow-y: auto; gap: 0.1rem !important; padding-right: 0.25rem}
.st-key-history .stHorizontalBlock {gap: 0.25rem; flex-wrap: nowrap; align-items: center}
.st-key-history button {justify-content: flex-start; min-height: 2rem; padding: 0.1rem 0.5rem}
.st-key-history [class*=st-key-open_] {flex: 1 1 0; min-width: 0}
.st-key-history [class*=st-key-open_] button > div {min-width: 0; justify-content: flex-start}
.st-key-history [class*=st-key-open_] p {white-space: nowrap; overflow: hidden; text-overflow: ellipsis}
.st-key-history [class*=st-key-delete_2] {flex: none; width: auto !important; opacity: 0.6}
.st-key-history [class*=st-key-delete_2] p {position: absolute; clip-path: inset(50%); width: 1px; overflow: hidden}
.st-key-history .st-key-delete_all {opacity: 0.6; font-size: 0.875rem}
.st-key-history .st-key-open_shown button {background: color-mix(in srgb, currentColor 9%, transparent)}

/* Streamlit's hints below text fields are in English only. */
[data-testid=InputInstructions] {display: none}

/* Questions are bubbles on the right, without an icon. */
[class*=st-key-question_] .stChatMessage {
  width: fit-content; max-width: 85%; margin-left: auto; padding: 0.6rem 1rem; border-radius: 1.2rem;
  background: color-mix(in srgb, currentColor 7%, transparent)
}
[class*=st-key-question_] .stChatMessage > [data-testid^=stChatMessageAvatar] {display: none}
.stChatMessage [data-testid=stText] {white-space: pre-wrap; overflow-wrap: anywhere}

/* Stop lies over the input's button; "New conversation" at the top where the sidebar with its button is closed. */
.st-key-stop {
  position: fixed; bottom: 2.1rem; z-index: 1000; align-self: flex-end; width: auto !important; margin-right: 0.6rem
}
.stApp:has(.st-key-stop) [data-testid=stChatInputSubmitButton] {visibility: hidden}
.st-key-new_top {display: none}
.stApp:has([data-testid=stExpandSidebarButton]) .st-key-new_top {
  display: block; position: fixed; top: 0.6rem; right: 1rem; z-index: 1000000; width: auto !important
}
</style>"""

# A touch screen would open its keyboard over the reply.
_FOCUS = """export default function () {
    if (matchMedia("(pointer: fine)").matches) {
        setTimeout(() => document.querySelector("[data-testid=stChatInputTextArea]")?.focus(), 50)
    }
}"""


def focus_input() -> None:
    """Put the cursor into the input again, which the first question moves from the welcome page to the bottom."""
    mount = st.components.v2.component("focus_input", html="<span></span>", js=_FOCUS)
    mount(key="focus_input", width="content", height="content")
