"""A button that copies a reply to the clipboard.

The text is passed as data and is never part of the page's HTML. Browsers hide navigator.clipboard from pages that are
served over plain http by another machine; the button then copies from a selected text field.
Called by page.py.
"""

import streamlit as st

_HTML = '<button type="button"></button>'
_CSS = """
button { border: 0; background: none; padding: 0; cursor: pointer; color: var(--st-text-color); opacity: 0.55;
         font: inherit; font-size: 0.875rem; line-height: 1.5; }
button:hover, button:focus-visible { opacity: 1; color: var(--st-primary-color); }
"""
_JAVASCRIPT = """
export default function ({ parentElement, data }) {
    const button = parentElement.querySelector("button")
    button.textContent = data.label
    button.onclick = async () => {
        if (navigator.clipboard) {
            await navigator.clipboard.writeText(data.text)
        } else {
            const field = document.createElement("textarea")
            field.value = data.text
            document.body.append(field)
            field.select()
            document.execCommand("copy")
            field.remove()
        }
        button.textContent = data.done
        setTimeout(() => { button.textContent = data.label }, 1500)
    }
}
"""


def copy_button(text: str, label: str, done: str, key: str) -> None:
    """Draw the button. Its label changes to `done` for 1.5 s after a click."""
    mount = st.components.v2.component("copy_button", html=_HTML, css=_CSS, js=_JAVASCRIPT)
    mount(data={"text": text, "label": label, "done": done}, key=key, width="content", height="content")
