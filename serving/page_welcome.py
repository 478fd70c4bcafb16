"""Parts of the chat page without a conversation: the cards of the models, and the commands that train a first one.

Called by page.py. Read next: sidebar.py (the same facts of the selected model).
"""

from pathlib import Path

import streamlit as st

from serving.model_list import ModelEntry
from serving.page_markdown import escape_markdown
from serving.page_strings import STRINGS
from serving.sidebar import model_summary

OWN_MODEL_COMMANDS = """python train_tokenizer.py FILES…
python data_process.py pretrain FILES…
python 1-pretrain.py
python data_process.py sft CHATS…
python 3-full_sft.py"""
MAX_MODEL_CARDS = 4  # the sidebar lists all models


def draw_model_cards(models: list[ModelEntry], selected: ModelEntry, lang: str) -> None:
    """Draw the first models in two columns, each with a button that selects it."""
    strings = STRINGS[lang]
    st.write("")
    st.write(strings["models"])
    columns = st.columns(2)
    for i, model in enumerate(models[:MAX_MODEL_CARDS]):
        with columns[i % 2].container(border=True):
            with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
                st.markdown(f"**{escape_markdown(model.name)}**", width="content")
                is_chosen = model.name == selected.name
                st.button(
                    strings["chosen" if is_chosen else "choose"], key=f"choose {model.name}", type="tertiary",
                    on_click=st.session_state.__setitem__, args=("model", model.name), disabled=is_chosen,
                )  # fmt: skip
            st.caption(model_summary(model, lang))


def draw_no_model(folder: Path, lang: str) -> None:
    """Draw the commands that train a model into `folder`, which has none."""
    strings = STRINGS[lang]
    st.header(strings["none_title"])
    st.write(strings["none_text"].format(folder=str(folder.absolute()).replace("`", "'")))
    st.write(strings["none_demo"])
    st.code("make demo                     # python demo.py", language="bash")
    st.write(strings["none_own"])
    st.code(OWN_MODEL_COMMANDS, language="bash")
    st.write(strings["none_other"])
    st.code("python web_demo.py --out_dir DIR\npython web_demo.py --checkpoint FILE_OR_DIR…", language="bash")
    st.button(strings["look_again"], icon=":material/refresh:", key="look_again")
