"""The chat page in streamlit's AppTest: widgets, clicks and errors.

Promises: the page answers in several turns, with one model and with two; no click but Stop interrupts a reply; Again,
Edit, Cancel and New conversation work; conversations are listed, opened, deleted, and shown again after a reload; one
that cannot be saved is named; the temperature fits the size; the controls reach the generator; the page works in both
languages; without a model it shows the commands to run; a file that cannot be read is listed, and the other models
still answer; a model's text is never HTML; the script's errors are one line.
"""

import re
import socket
import sys
from dataclasses import replace

import pytest
import streamlit as st
from streamlit.runtime.scriptrunner import StopException
from streamlit.testing.v1 import AppTest

from evaluation.tools import TOOLS
from model.sampling import SamplingParams
from serving import page_strings
from serving.config import PageConfig
from serving.conversation import Conversation
from serving.sidebar import fitting_temperature, format_by_language, format_count
from tests.helpers import ROOT, run_here, run_process, save_scripted_model, script_answers

NASTY = "<script>window.pwned=1</script> ![x](http://example.com/x.png) **b**"


@pytest.fixture(scope="module")
def out(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    save_scripted_model(folder / "dpo_64.pth", tokenizer, ["鸟", "叫", "!"], "dpo")
    save_scripted_model(folder / "full_sft_64.pth", tokenizer, [NASTY], "full_sft", max_seq_len=256)
    save_scripted_model(
        folder / "pretrain_64.pth", tokenizer, [" and", " on"], "pretrain", trigger="o", end_of_turn=False
    )
    return folder


@pytest.fixture
def chats(monkeypatch, tmp_path):
    """The folder of saved conversations, below another folder of the user's data."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path / "user" / "mengya" / "chats"


@pytest.fixture
def open_page(monkeypatch, chats):
    def open_page(*arguments, lang="en", chat=""):
        monkeypatch.setattr(sys, "argv", ["web_demo.py", "--lang", lang, "--device", "cpu", *map(str, arguments)])
        page = AppTest.from_file(str(ROOT / "web_demo.py"), default_timeout=60)
        if chat:
            page.query_params["chat"] = chat
        page.run()
        assert not page.exception
        return page

    return open_page


def ask_question(page, text):
    page.chat_input[0].set_value(text).run()
    assert not page.exception
    return page


def shown_texts(page) -> list[str]:
    """The texts of the conversation, from top to bottom."""
    return [text.value for text in page.text]


def find_button(page, key):
    return next(each for each in page.button if each.key == key)


def press(page, label):
    next(each for each in page.button if each.label == label).click().run()
    assert not page.exception


def listed_chats(page) -> list[str]:
    """The titles of the saved conversations, from top to bottom."""
    return [each.label for each in page.button if (each.key or "").startswith("open_")]


def caption_text(page) -> str:
    return "\n".join(caption.value for caption in page.caption)


def test_the_page_answers_several_turns(open_page, out):
    page = ask_question(open_page("--out_dir", out), "hello?")
    assert shown_texts(page) == ["hello?", "鸟叫!"] and "dpo\\_64 · 3 tokens · " in caption_text(page)
    ask_question(page, "   ")
    ask_question(page, "and now?")
    assert shown_texts(page) == ["hello?", "鸟叫!", "and now?", "鸟叫!"]
    assert find_button(page, "again").label == "Again" and find_button(page, "edit_last").label == "Edit"
    assert not page.error and not page.warning


def test_every_model_is_shown_with_its_facts(open_page, out):
    page = open_page("--out_dir", out)
    assert page.selectbox(key="model").options == ["dpo_64", "full_sft_64", "pretrain_64"]
    shown = caption_text(page)
    for name, does in page_strings.STAGE_LABELS["en"].values():
        assert (f"**{name}** · {does}" in shown) == (name not in ("LoRA", "GRPO", "transformers folder"))
    assert re.search(r"\d+\.\d k parameters · context of 256 tokens  \ntrained on 1\.5 M tokens", shown)
    find_button(page, "choose pretrain_64").click().run()
    assert page.selectbox(key="model").value == "pretrain_64"
    assert page.chat_input[0].placeholder == "Begin a text; pretrain_64 continues it"
    assert page.text_area(key="system").disabled
    page.slider(key="max_new_tokens_128").set_value(4).run()
    assert shown_texts(ask_question(page, "so")) == [
        "so",
        "and on and on",
    ] and "maximum length reached" in caption_text(page)


def test_scores_and_counts_are_formatted_by_their_kind():
    english, chinese = page_strings.STRINGS["en"], page_strings.STRINGS["zh"]
    accuracy = {"en": 0.923, "zh": 0.93, "de*": 0.5}
    assert format_by_language(accuracy, "accuracy", english) == "Chinese 93.0% · English 92.3% · de\\* 50.0%"
    assert format_by_language({"zh": 2.214}, "bits_per_byte", chinese) == "中文 2.21"
    assert [format_count(n) for n in (0, 999, 1_500, 26_878_464, 2e9)] == ["0", "999", "1.5 k", "26.9 M", "2.0 G"]


def test_two_models_answer_side_by_side(open_page, out):
    page = open_page("--out_dir", out)
    page.selectbox(key="second").set_value("full_sft_64").run()
    assert page.chat_input[0].placeholder == "Ask both models"
    assert shown_texts(ask_question(page, "x")) == ["x", "鸟叫!", NASTY]
    page.selectbox(key="model").set_value("full_sft_64").run()
    assert page.selectbox(key="second").value == "", "a model is not compared with itself"
    assert shown_texts(page) == ["x", "鸟叫!", NASTY], "earlier replies stay"


def test_only_stop_interrupts_an_answer(open_page, out, monkeypatch):
    page, real, left = open_page("--out_dir", out), Conversation.advance, [2]

    def interrupted(conversation):
        left[0] -= 1
        if left[0] < 0:
            raise StopException  # raised by streamlit when the user clicks
        return real(conversation)

    monkeypatch.setattr(Conversation, "advance", interrupted)
    monkeypatch.setattr("serving.page.REDRAW_SECONDS", -1)  # redraw after every piece
    ask_question(page, "x")
    assert page.session_state["conversation"].turns[0].replies[0].text == "鸟叫"
    assert shown_texts(page) == ["x", "鸟叫 ▍"] and not any(b.key == "again" for b in page.button)
    left[0] = 9
    page.slider(key="temperature_0.3").set_value(0.3).run()
    assert shown_texts(page) == ["x", "鸟叫!"], "the reply continues after a slider has changed"

    left[0] = 1
    ask_question(page, "y")
    find_button(page, "stop").click().run()
    assert shown_texts(page)[2:] == ["y", "鸟"] and "stopped" in caption_text(page)
    assert find_button(page, "again") and not page.session_state["conversation"].streaming


def test_regenerate_edit_and_clear_change_the_conversation(open_page, out):
    page = ask_question(ask_question(open_page("--out_dir", out), "a"), "b")
    find_button(page, "again").click().run()
    assert (
        shown_texts(page) == ["a", "鸟叫!", "b", "鸟叫!"] and page.session_state["conversation"].turns[1].attempt == 1
    )
    find_button(page, "edit_last").click().run()
    assert page.text_area(key="edited").value == "b" and shown_texts(page) == ["a", "鸟叫!", "鸟叫!"]
    page.text_area(key="edited").set_value("unwanted")
    press(page, "Cancel")
    assert shown_texts(page) == ["a", "鸟叫!", "b", "鸟叫!"] and not page.session_state["conversation"].streaming
    find_button(page, "edit_last").click().run()
    assert page.text_area(key="edited").value == "b"
    page.text_area(key="edited").set_value("better")
    press(page, "Send")
    assert shown_texts(page) == ["a", "鸟叫!", "better", "鸟叫!"]
    find_button(page, "edit_last").click().run()
    assert page.text_area(key="edited").value == "better"
    find_button(page, "new_chat").click().run()
    assert shown_texts(page) == [] and page.header[0].value == "Ask a model that you trained"


def test_conversations_are_listed_and_opened_with_their_models(open_page, out, chats):
    page = open_page("--out_dir", out)
    assert listed_chats(page) == [] and not chats.exists() and find_button(page, "new_chat").disabled
    page.selectbox(key="second").set_value("full_sft_64").run()
    ask_question(page, "first\n**bold** <b>?")
    find_button(page, "new_top").click().run()
    page.selectbox(key="second").set_value("").run()
    ask_question(page, "second")
    assert listed_chats(page) == ["second", r"first \*\*bold\*\* \<b\>?"]
    assert (chats.stat().st_mode & 0o077, len(list(chats.iterdir()))) == (0, 2)
    find_button(page, listed_key(page, 1)).click().run()
    assert shown_texts(page) == ["first\n**bold** <b>?", "鸟叫!", NASTY]
    assert (page.selectbox(key="model").value, page.selectbox(key="second").value) == ("dpo_64", "full_sft_64")
    ask_question(page, "more")
    assert listed_chats(page)[0].startswith("first"), "last written first"


def listed_key(page, i: int) -> str:
    return [each.key for each in page.button if (each.key or "").startswith("open_")][i]


def test_a_reload_and_a_restart_show_the_conversation_of_the_address(open_page, out, chats):
    page = ask_question(open_page("--out_dir", out), "x")
    (path,) = chats.iterdir()
    assert page.query_params["chat"] == path.stem
    again = open_page("--out_dir", out, chat=path.stem)
    assert shown_texts(again) == ["x", "鸟叫!"] and "dpo\\_64 · 3 tokens · " in caption_text(again)
    assert shown_texts(ask_question(again, "y")) == ["x", "鸟叫!", "y", "鸟叫!"] and len(list(chats.iterdir())) == 1
    find_button(again, "new_chat").click().run()
    assert not again.query_params and shown_texts(again) == []


def test_the_address_opens_no_other_file(open_page, out, chats, tmp_path):
    ask_question(open_page("--out_dir", out), "x")
    (path,) = chats.iterdir()
    path.rename(tmp_path / path.name)
    for named in (f"../../../{path.stem}", str(tmp_path / path.stem), "20260101-000000-01234567", "*", "\x00"):
        page = open_page("--out_dir", out, chat=named)
        assert page.error and shown_texts(page) == [] and not page.query_params


def test_two_tabs_may_show_the_same_conversation(open_page, out, chats):
    first = ask_question(open_page("--out_dir", out), "x")
    (path,) = chats.iterdir()
    second = ask_question(open_page("--out_dir", out, chat=path.stem), "y")
    assert shown_texts(ask_question(first, "z")) == ["x", "鸟叫!", "y", "鸟叫!", "z", "鸟叫!"]
    find_button(second, f"delete_{path.stem}").click().run()
    find_button(second, "confirm").click().run()
    assert shown_texts(second) == [] and not list(chats.iterdir())
    first.run()
    assert shown_texts(first) == [], "deleted in the other tab"


def test_a_deletion_is_confirmed(open_page, out, chats):
    page = ask_question(open_page("--out_dir", out), "x")
    page = ask_question(open_page("--out_dir", out), "y")
    assert sum(each.key == "open_shown" for each in page.button) == 1
    other = next(each.key for each in page.button if (each.key or "").startswith("open_2")).removeprefix("open_")
    find_button(page, f"delete_{other}").click().run()
    find_button(page, "keep").click().run()
    assert listed_chats(page) == ["y", "x"]
    find_button(page, f"delete_{other}").click().run()
    find_button(page, "confirm").click().run()
    assert listed_chats(page) == ["y"] and shown_texts(page) == ["y", "鸟叫!"]
    find_button(page, "delete_all").click().run()
    find_button(page, "confirm").click().run()
    assert listed_chats(page) == [] and shown_texts(page) == [] and not list(chats.iterdir())


def test_a_long_list_is_shown_on_demand_and_deleted_as_a_whole(open_page, out, chats, monkeypatch):
    monkeypatch.setattr("serving.history_list.MAX_CHATS_LISTED", 1)
    page = ask_question(open_page("--out_dir", out), "x")
    find_button(page, "new_chat").click().run()
    ask_question(page, "y")
    assert listed_chats(page) == ["y"]
    press(page, "Show all")
    assert listed_chats(page) == ["y", "x"]
    page = open_page("--out_dir", out)
    find_button(page, "delete_all").click().run()
    find_button(page, "confirm").click().run()
    assert not list(chats.iterdir())


def test_a_damaged_file_is_listed_and_stays(open_page, out, chats):
    ask_question(open_page("--out_dir", out), "x")
    (path,) = chats.iterdir()
    damaged = path.with_name("20260101-000000-01234567.json")
    damaged.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    page = ask_question(open_page("--out_dir", out), "y")
    (entry,) = (each for each in page.button if each.label == damaged.stem.replace("-", "\\-"))
    assert entry.disabled and "is damaged" in entry.help
    assert shown_texts(page) == ["y", "鸟叫!"] and len(damaged.read_text(encoding="utf-8")) == 50
    page = open_page("--out_dir", out, chat=damaged.stem)
    assert "is damaged" in page.error[0].value and shown_texts(ask_question(page, "z")) == ["z", "鸟叫!"]


@pytest.mark.parametrize("lang", page_strings.LANGUAGE_LABELS)
def test_a_conversation_that_cannot_be_saved_is_named_and_continues(open_page, out, chats, lang):
    chats.parent.mkdir(parents=True)
    chats.write_text("a file")
    page = ask_question(ask_question(open_page("--out_dir", out, lang=lang), "x"), "y")
    start = page_strings.STRINGS[lang]["save_failed"].split("{")[0]
    assert page.warning[0].value.startswith(start) and "cannot write" in page.warning[0].value
    assert shown_texts(page) == ["x", "鸟叫!", "y", "鸟叫!"]
    chats.unlink()
    page = ask_question(page, "z")
    assert not page.warning and len(list(chats.iterdir())) == 1


def test_nothing_is_saved_where_other_machines_may_open_the_page(open_page, out, chats, tmp_path):
    for flags in (["--host", "0.0.0.0"], ["--history_dir", "none"]):
        page = ask_question(open_page("--out_dir", out, *flags), "x")
        assert page_strings.STRINGS["en"]["not_saved"] in page.caption.values and not page.query_params
    assert not chats.exists() and not (tmp_path / "none").exists()
    ask_question(open_page("--out_dir", out, "--host", "0.0.0.0", "--history_dir", tmp_path / "ours"), "x")
    assert len(list((tmp_path / "ours").iterdir())) == 1 and not chats.exists()


def test_the_folder_of_saved_conversations_is_that_of_the_system(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, "relative")  # to be ignored
    for system, folder in (
        ("linux", ".local/share"),
        ("darwin", "Library/Application Support"),
        ("win32", "AppData/Local"),
    ):
        monkeypatch.setattr(sys, "platform", system)
        assert PageConfig().history_folder == tmp_path / folder / "mengya" / "chats"
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert PageConfig().history_folder is None


def test_a_removed_model_leaves_its_conversations_readable(open_page, tokenizer, tmp_path, chats):
    path = save_scripted_model(tmp_path / "out" / "dpo_64.pth", tokenizer, ["gone"], "dpo")
    save_scripted_model(tmp_path / "out" / "full_sft_64.pth", tokenizer, ["left"])
    ask_question(open_page("--out_dir", tmp_path / "out"), "x")
    path.unlink()
    page = open_page("--out_dir", tmp_path / "out", chat=next(chats.iterdir()).stem)
    assert shown_texts(page) == ["x", "gone"] and "dpo\\_64" in caption_text(page)
    assert shown_texts(ask_question(page, "y")) == ["x", "gone", "y", "left"]


def test_a_new_conversation_saves_the_answer_so_far(open_page, out, chats, monkeypatch):
    page, real, left = open_page("--out_dir", out), Conversation.advance, [2]

    def interrupted(conversation):
        left[0] -= 1
        if left[0] < 0:
            raise StopException
        return real(conversation)

    monkeypatch.setattr(Conversation, "advance", interrupted)
    ask_question(page, "x")
    find_button(page, "new_chat").click().run()
    assert shown_texts(page) == []
    find_button(page, listed_key(page, 0)).click().run()
    assert shown_texts(page) == ["x", "鸟叫"] and "stopped" in caption_text(page)


def test_a_long_conversation_draws_its_last_turns_first(open_page, out, monkeypatch):
    monkeypatch.setattr("serving.page.MAX_TURNS_DRAWN", 2)
    page = open_page("--out_dir", out)
    for question in "abcd":
        ask_question(page, question)
    assert shown_texts(page) == ["c", "鸟叫!", "d", "鸟叫!"]
    press(page, "Show 2 earlier turns")
    assert [text for text in shown_texts(page) if text in "abcd"] == [*"abcd"]


def test_the_temperature_fits_the_size_of_the_model():
    assert [fitting_temperature(size) for size in (5e6, 99e6, 100e6, 7e9)] == [0.3, 0.3, 0.7, 0.7]


def test_an_example_prompt_is_asked_with_one_click(open_page, out):
    page = open_page("--out_dir", out)
    start = page_strings.EXAMPLE_PROMPTS["en"]["chat"][1]
    next(b for b in page.button if b.label == start).click().run()
    assert shown_texts(page) == [start, "鸟叫!"]


def test_the_controls_reach_the_generator(open_page, out, monkeypatch):
    page, seen, real = open_page("--out_dir", out), [], Conversation.start_turn

    def spy(conversation, question, page_models, settings, system="", attempt=0, options=None):
        seen.append((settings, system))
        return real(conversation, question, page_models, settings, system, attempt, options)

    monkeypatch.setattr(Conversation, "start_turn", spy)
    wanted = {"temperature": 1.2, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5}
    wanted["frequency_penalty"] = 0.4  # its window has no control
    for key, value in wanted.items():
        page.slider(key="temperature_0.3" if key == "temperature" else key).set_value(value)
    page.slider(key="max_new_tokens_128").set_value(9)
    page.number_input(key="seed").set_value(3)
    page.text_area(key="system").set_value("Be kind.")
    ask_question(page.run(), "x")
    assert seen == [(SamplingParams(**wanted, penalty_window=64, max_new_tokens=9, seed=3), "Be kind.")]
    page.slider(key="temperature_0.3").set_value(0.0).run()
    assert page.slider(key="top_p").disabled and page.number_input(key="seed").disabled, "greedy"


def test_beam_search_controls_reach_the_generator(open_page, out, monkeypatch):
    page, seen = open_page("--out_dir", out), []
    real = Conversation.start_turn
    monkeypatch.setattr(
        Conversation,
        "start_turn",
        lambda *arguments, **options: (seen.append(arguments[3]), real(*arguments, **options))[1],
    )
    page.slider(key="num_beams").set_value(4)
    page.slider(key="no_repeat_ngram_size").set_value(5)
    assert shown_texts(ask_question(page.run(), "x")) == ["x", "鸟叫!"]
    assert seen[0].num_beams == 4 and seen[0].no_repeat_ngram_size == 5 and seen[0].temperature == 0
    assert page.slider(key="temperature_0.3").disabled and page.slider(key="top_k").disabled
    page.slider(key="num_beams").set_value(1).run()
    assert not page.slider(key="temperature_0.3").disabled and page.slider(key="temperature_0.3").value == 0.3


@pytest.mark.parametrize("lang", page_strings.LANGUAGE_LABELS)
def test_a_chat_format_brings_its_sampling_preset(open_page, tokenizer, tmp_path, lang, monkeypatch):
    save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer.with_chat_format("belle"), ["hi"], trigger=":")
    page, seen = open_page("--out_dir", tmp_path, lang=lang), []
    real = Conversation.start_turn
    monkeypatch.setattr(
        Conversation,
        "start_turn",
        lambda *arguments, **options: (seen.append(arguments[3]), real(*arguments, **options))[1],
    )
    toggle = page.toggle(key="preset_belle")
    assert toggle.value and "belle" in toggle.label and "1.2" in toggle.help
    ask_question(page, "x")
    page.slider(key="temperature_0.35_belle").set_value(0.5).run()
    ask_question(page, "x")
    page.toggle(key="preset_belle").set_value(False).run()
    ask_question(page, "x")
    preset = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2}
    base = SamplingParams(max_new_tokens=128, penalty_window=64, **preset)
    assert seen == [
        base,
        replace(base, temperature=0.5),
        SamplingParams(temperature=0.3, top_p=0.9, frequency_penalty=0.2, penalty_window=64, max_new_tokens=128),
    ]


def test_model_output_is_drawn_as_text(open_page, out):
    page = open_page("--out_dir", out)
    page.selectbox(key="model").set_value("full_sft_64").run()
    assert shown_texts(ask_question(page, NASTY)) == [NASTY, NASTY]
    page.toggle(key="markdown").set_value(True).run()
    drawn = [each for each in page.markdown if "pwned" in each.value]
    assert shown_texts(page) == [NASTY] and len(drawn) == 1, "the question stays plain text"
    assert "x (`http://example.com/x.png`)" in drawn[0].value and not drawn[0].allow_html


def test_switching_the_language_keeps_controls_and_conversation(open_page, out):
    page = ask_question(open_page("--out_dir", out, lang="zh"), "你好")
    assert find_button(page, "again").label == "重新回答" and "词元" in caption_text(page)
    page.slider(key="temperature_0.3").set_value(0.25).run()
    page.radio(key="lang").set_value("en").run()
    assert not page.exception and find_button(page, "again").label == "Again"
    assert page.slider(key="temperature_0.3").value == 0.25 and shown_texts(page) == ["你好", "鸟叫!"], (
        "only the texts change"
    )


def test_both_languages_have_the_same_strings():
    for table in (
        page_strings.STRINGS,
        page_strings.STAGE_LABELS,
        page_strings.SCORE_LABELS,
        page_strings.EXAMPLE_PROMPTS,
    ):
        assert table["zh"].keys() == table["en"].keys()
    for key, english in page_strings.STRINGS["en"].items():
        assert sorted(re.findall(r"{\w*}", english)) == sorted(re.findall(r"{\w*}", page_strings.STRINGS["zh"][key])), (
            key
        )


@pytest.mark.parametrize("lang", page_strings.LANGUAGE_LABELS)
def test_without_a_model_the_page_shows_the_commands(open_page, tmp_path, tokenizer, lang):
    page = open_page("--out_dir", tmp_path / "out", lang=lang)
    shown_commands = "\n".join(code.value for code in page.code)
    for command in re.findall(r"python (\S+\.py)", shown_commands):
        assert (ROOT / command).is_file()
    assert "make demo" in shown_commands and str(tmp_path / "out") in page.markdown[0].value and not page.chat_input
    (tmp_path / "out").mkdir()
    save_scripted_model(tmp_path / "out" / "full_sft_64.pth", tokenizer, ["hi"])
    find_button(page, "look_again").click().run()
    assert shown_texts(ask_question(page, "x")) == ["x", "hi"]


def test_a_bad_file_is_listed_and_other_models_still_answer(open_page, tmp_path, tokenizer):
    save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer, ["hi"])
    (tmp_path / "dpo_64.pth").write_bytes(b"cut off")
    page = open_page("--out_dir", tmp_path)
    assert page.expander[-1].label == "Not readable (1)" and "dpo\\_64" in caption_text(page)
    assert shown_texts(ask_question(page, "x")) == ["x", "hi"]
    (tmp_path / "full_sft_64.pth").write_bytes(b"cut off")
    ask_question(page, "y")
    assert page.header[0].value == "No model yet"


def test_a_replaced_checkpoint_is_loaded_again(open_page, tokenizer, tmp_path):
    path = save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer, ["young"])
    page = ask_question(open_page("--out_dir", tmp_path), "x")
    save_scripted_model(path, tokenizer, ["grown", "up"])
    assert shown_texts(ask_question(page, "y")) == ["x", "young", "y", "grownup"]


def test_an_adapter_without_its_parent_is_a_one_line_error(open_page, tokenizer, tmp_path):
    from model.checkpoint import load_model, record_parent, save_model
    from model.lora import LoRAConfig, attach

    parent = save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer, ["hi"])
    model, own, _ = load_model(parent)
    attach(model, LoRAConfig(rank=2))
    record_parent(model, parent, tmp_path / "lora_sft_64.pth")
    save_model(tmp_path / "lora_sft_64.pth", model, "lora_sft", own, [{"stage": "lora_sft"}])
    assert shown_texts(ask_question(open_page("--out_dir", tmp_path), "x")) == ["x", "hi"]
    parent.unlink()
    st.cache_resource.clear()
    page = ask_question(open_page("--checkpoint", tmp_path / "lora_sft_64.pth"), "x")
    assert "put it beside the adapter" in page.error[0].value.replace("\\", "") and not shown_texts(page)


def test_a_question_that_is_too_long_is_an_error_with_its_length(open_page, out):
    page = ask_question(open_page("--out_dir", out), "x" * 300)
    assert "at most 128" in caption_text(page) and find_button(page, "edit_last")


def test_the_script_names_missing_files_ports_and_packages(tmp_path, monkeypatch, capsys):
    def fails(*arguments) -> str:
        result = run_here(monkeypatch, capsys, "web_demo.py", *arguments)
        assert result.returncode == 2 and not result.stdout and result.stderr.count("\n") == 1
        return result.stderr

    assert "--checkpoint nothing.pth: no such file or folder" in fails("--checkpoint", "nothing.pth")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use): try another --port" in fails("--port", taken.getsockname()[1])
    assert "argument --port: 99999 is not a whole number from 1 to 65535" in fails("--port", "99999")
    without = "import sys, runpy; sys.modules['streamlit'] = None; runpy.run_path('web_demo.py', run_name='__main__')"
    result = run_process(sys.executable, "-c", without)
    assert result.returncode == 2 and 'pip install "streamlit' in result.stderr and "Traceback" not in result.stderr


def test_out_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PageConfig().models_dir == ROOT / "out"
    (tmp_path / "out").mkdir()
    assert PageConfig().models_dir.resolve() == tmp_path / "out"
    assert str(PageConfig(out_dir="there").models_dir) == "there"


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call>'


@pytest.fixture
def tool_folder(tokenizer, tmp_path):
    save_scripted_model(tmp_path / "full_sft_64.pth", tokenizer, ["x"], max_seq_len=2048)
    save_scripted_model(tmp_path / "pretrain_64.pth", tokenizer, ["x"], "pretrain", trigger="o")
    return tmp_path


@pytest.mark.parametrize("lang", page_strings.LANGUAGE_LABELS)
def test_thoughts_and_calls_are_folded_above_the_answer(open_page, tool_folder, monkeypatch, lang):
    prompts = script_answers(monkeypatch, f"<think>\n<b>add</b>\n</think>\n\n{CALL}", "It is **5**.", CALL)
    page, strings = open_page("--out_dir", tool_folder, lang=lang), page_strings.STRINGS[lang]
    page.button_group(key="tools").set_value(["calculator", "clock"]).run()
    assert page.button_group(key="tools").options == [strings[f"tool_{name}"] for name in TOOLS]
    ask_question(page, "2+3?")
    steps = ["<b>add</b>", 'calculator {"expression": "2+3"}', "5"]
    assert shown_texts(page) == ["2+3?", *steps, "It is **5**."]
    (folded,) = (each for each in page.expander if each.label == strings["steps"])
    assert [text.value for text in folded.text] == steps and not folded.proto.expanded
    assert [caption.value for caption in folded.caption] == [strings[name] for name in ("thought", "call", "result")]
    assert '"name": "calculator"' in prompts[0] and '"name": "clock"' in prompts[0] and '"date"' not in prompts[0]

    page.toggle(key="markdown").set_value(True).run()
    assert [text.value for text in page.text] == ["2+3?", *steps], "a thought stays plain text"
    page.button_group(key="tools").set_value([]).run()
    page.toggle(key="thinking").set_value(False).run()
    ask_question(page, "more")
    assert prompts[2].endswith("assistant\n<think>\n\n</think>\n\n") and "# Tools" not in prompts[2]
    assert "<tool_response>\n5\n</tool_response>" in prompts[2]
    assert strings["no_answer"] in page.caption.values, "a call without tools is no answer"


def test_a_pretrained_model_has_no_tool_picker(open_page, tool_folder):
    page = open_page("--out_dir", tool_folder)
    assert not page.button_group(key="tools").disabled and not page.toggle(key="thinking").disabled
    page.button_group(key="tools").set_value(["clock"]).run()
    page.selectbox(key="model").set_value("pretrain_64").run()
    assert page.button_group(key="tools").disabled and page.toggle(key="thinking").disabled
    assert shown_texts(ask_question(page, "so")) == ["so", "x"]
    page.selectbox(key="model").set_value("full_sft_64").run()
    page.selectbox(key="second").set_value("pretrain_64").run()
    assert page.button_group(key="tools").disabled, "both models must have tools"


def test_an_open_thought_streams_in_an_open_expander(open_page, tool_folder, monkeypatch):
    script_answers(monkeypatch, f"<think>\nadd\n</think>\n\n{CALL}", "done")
    page, real, left = open_page("--out_dir", tool_folder), Conversation.advance, [4]

    def interrupted(conversation):
        left[0] -= 1
        if left[0] < 0:
            raise StopException
        return real(conversation)

    monkeypatch.setattr(Conversation, "advance", interrupted)
    monkeypatch.setattr("serving.page.REDRAW_SECONDS", -1)
    page.button_group(key="tools").set_value(["calculator"]).run()
    ask_question(page, "x")
    (steps,) = (each for each in page.expander if each.label == "Thoughts and calls")
    assert steps.proto.expanded and shown_texts(page) == ["x", "a", "▍"]
    left[0] = 99
    page.run()
    assert shown_texts(page) == ["x", "add", 'calculator {"expression": "2+3"}', "5", "done"]


def test_the_lookup_tool_of_the_page_reads_a_file(open_page, tool_folder, tmp_path, monkeypatch, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"subject": "France", "relation": "capital", "value": "Paris"}', encoding="utf-8")
    call = '<tool_call>{"name": "lookup", "arguments": {"subject": "France"}}</tool_call>'
    script_answers(monkeypatch, call, "Paris.")
    page = open_page("--out_dir", tool_folder, "--lookup_file", facts)
    page.button_group(key="tools").set_value(["lookup"]).run()
    assert shown_texts(ask_question(page, "?"))[-2:] == ["capital: Paris", "Paris."]
    facts.write_text("no", encoding="utf-8")
    failed = run_here(monkeypatch, capsys, "web_demo.py", "--lookup_file", facts)
    assert failed.returncode == 2 and "facts.jsonl:1: expected" in failed.stderr
