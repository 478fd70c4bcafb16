"""Promise: for any generated text, the chat page sends requests only to its own server.

The Markdown passed to streamlit (answers, questions, system prompts, names, error messages) contains no image, link or
HTML; layout and formulas are kept. Chromium sends no request to a server that records all requests, and the content
security policy blocks requests by scripts.
"""
# ruff: noqa: E501  (a table of attacks)

import http.server
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from streamlit.testing.v1 import AppTest

from common.markdown import code_block, code_span
from common.markdown import escape_inline as inline
from export.model_card import escape_card_text
from serving.page_markdown import escape_markdown, safe_markdown
from tests.helpers import ROOT, save_scripted_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HAS_BROWSER = CHROMIUM and importlib.util.find_spec("playwright")
# Every form of Markdown, HTML, TeX and streamlit syntax with a URL. Each U becomes a different URL.
FETCHES = [
    "![a](U)", "!\\[b](U)", "\\![c](U)", "\\\\![d](U)", "\\\\\\![e](U)", "![f](<U>)", '![g](U "title")', "![h\\](U)",
    "![i][r1]\n\n[r1]: U", "![r2][]\n\n[r2]: U", "![r3]\n\n[r3]: <U> 'x'", "[![j](U)](U)", "![![k](U)](U)", "*![l](U)*",
    "# ![m](U)", "> ![n](U)", "- ![o](U)", "| a |\n|--|\n| ![p](U) |", "&#33;[q](U)", "!&#91;r](U)", "&excl;[s](U)",
    "![t]&#40;U)", "`` ` ``![u](U)", "$`$ ![v](U) `", "$![w](U)$", "$$\n![x](U)\n$$", "`$`![y](U)`$`", "~~![z](U)~~",
    "<img src=U>", "<IMG/SRC='U'>", "<svg><image href=U></svg>", "<link rel=prefetch href=U>", "<iframe src=U></iframe>",
    "<style>@import 'U'; body{background:url(U)}</style>", "<video poster=U>", "<object data=U>", "<script src=U></script>",
    '<div style="background:url(U)">', "<base href=U>", "<meta http-equiv=refresh content='0;url=U'>", "&lt;img src=U&gt;",
    "\\<img src=U>", "<!-- --><img src=U>", "```html\n<img src=U>\n```", "```mermaid\nclick a 'U'\n```", "````\n```\n![A](U)\n````",
    "$\\includegraphics{U}$", "$$\\href{U}{x}$$", "$\\url{U}$", "$\\htmlStyle{background:url(U)}{x}$", "U", "<U>", "[B](U)",
    "www.a.invalid/x", ":red[![C](U)]", ":material/![D](U):", ":blue-background[<img src=U>]", ":streamlit: ![E](U)",
    ":image[U]{src=U}", "::video{src=U}", ":::note\n![F](U)\n:::", "[^1]\n\n[^1]: ![G](U)", "![H](U =9x9)", "!\u200b[I](U)",
    "![J](javascript:fetch('U'))", "![K](//127.0.0.1:PORT/K)", "![L](http:\\\\127.0.0.1:PORT\\L)", "\t![M](U)\n![N](U)",
    "1. a\n\n   ![O](U)\n2. ```\n![P](U)", "![Q\n](U)", "[R]: U\n![R]", "![S](U)\r![T](U)\r\n![V](U)", "-\n  ![W](U)", "\\$![X](U)$",
    "`a\n\n![Y](U)`", "***![Z](U)**", "$5 and ![0](U) $", "![1](U)\\\n![2](U)", "[3](U){rel=prefetch}", "<a ping=U href=U>x</a>",
]  # fmt: skip
WORDS = ["!", "[", "]", "(", ")", "[a]", "![a]", "(http://h.invalid/x)", "http://h.invalid/y", "<http://h.invalid/z>", "\\",
         "`", "``", "```", "~~~", "$", "$$", "|", "\n", "\n\n", " ", "    ", "\t", "> ", "- ", "* ", "1. ", "# ", "*", "_",
         "**", "~~", "&#33;", "&#91;", "&#10;", "&nbsp;", "<img src=x>", "<!--", "-->", "<a href='x'>", "---", "|--|--|",
         ":", ":red[", "[r]: http://h.invalid/r", "![r]", "好", "a", "\r", "\x0b", "\u2028", "\ufeff", "\\includegraphics{x}"]  # fmt: skip
READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def fetching_tokens(markdown: str) -> list[str]:
    """The types of tokens in the Markdown that a browser could follow or load."""
    found, waiting = [], READER.parse(markdown)
    while waiting:
        token = waiting.pop()
        waiting += token.children or []
        if token.type in ("image", "link_open", "html_inline", "html_block"):
            found.append(token.type)
    return found


def attack_texts(page_url: str) -> list[str]:
    port = page_url.rsplit(":", 1)[1]
    return [text.replace("U", f"{page_url}/{i}").replace("PORT", port) for i, text in enumerate(FETCHES)]


@pytest.mark.parametrize("write", [safe_markdown, escape_markdown, inline, code_span, code_block, escape_card_text])
def test_no_image_or_html_is_left(write, record_attacks):
    texts = attack_texts("http://127.0.0.1:1")
    texts += ["\n\n".join(texts), *(f"a {text} b" for text in texts), *(f"- > {text}" for text in texts)]
    left = {text: kinds for text in texts if (kinds := fetching_tokens(write(text)))}
    assert not left
    record_attacks(f"Markdown with URLs: {write.__module__}.{write.__name__}", len(texts), left=0)


def test_no_combination_of_markup_survives(num_attacks, record_attacks):
    number = num_attacks(300, 20_000)

    @settings(max_examples=number, deadline=None, database=None)
    @given(st.lists(st.sampled_from([*WORDS, *FETCHES]), max_size=12).map("".join))
    def check_text(text):
        for write in (safe_markdown, escape_markdown, inline, code_span, code_block, escape_card_text):
            assert not fetching_tokens(write(text)), write

        assert not re.search(r"(?<![`!-~])https?://", re.sub(r"(`+).*?\1", "", escape_markdown(text), flags=re.DOTALL))

    check_text()
    record_attacks("combinations of Markdown markup", number, left=0)


def test_layout_and_formulas_are_preserved():
    text = (
        "# Title\n\nSome *text*, **strong**, `code`, $x^2$.\n\n- a\n- b\n  - c\n\n3. x\n4. y\n\n> quote\n\n"
        "```python\nprint('![x]')\n```\n\n| a | b |\n| --- | ---: |\n| 1 | `2` |\n\n---\n\n$$\n\\frac{1}{2}\n$$"
    )
    written = safe_markdown(text)
    assert READER.render(written) == READER.render(text)
    assert "print('![x]')" in written and "$x^2$" in written and "$$\n\\frac{1}{2}\n$$" in written
    assert safe_markdown("[a](http://h/x) ![b](http://h/y)") == "a (`http://h/x`) b (`http://h/y`)"
    assert safe_markdown("$5 and $6 cost 1_000") == "\\$5 and \\$6 cost 1\\_000"


def test_every_markdown_of_the_page_is_safe(tokenizer, tmp_path, monkeypatch):
    """Answers, questions, system prompts, saved conversations, names of models, of a damaged file and of folders."""
    nasty = "\n\n".join(attack_texts("http://127.0.0.1:1"))
    folder = tmp_path / "![f](http:\\\\h.invalid\\f) `![f](x)"
    save_scripted_model(
        folder / "![n](http:\\\\h.invalid\\n) www.h.invalid <img src=x>.pth", tokenizer, [nasty], max_seq_len=16_384
    )
    save_scripted_model(folder / "full_sft_64.pth", tokenizer, ["hi"])
    (folder / "![d](http:\\\\h.invalid\\d).pth").write_bytes(b"damaged")
    monkeypatch.setattr(sys, "argv", ["web_demo.py", "--lang", "en", "--device", "cpu", "--out_dir", str(folder)])
    chats = folder / "mengya" / "chats"
    chats.mkdir(parents=True)
    (chats / "20260101-000000-01234567.json").write_bytes(b"damaged")
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    monkeypatch.setattr(sys, "platform", "linux")
    page = AppTest.from_file(str(ROOT / "web_demo.py"), default_timeout=60).run()
    read = list(markdown_of(page))
    page.selectbox(key="model").set_value(page.selectbox(key="model").options[-1]).run()
    page.text_area(key="system").set_value(nasty[:2000])
    page.toggle(key="markdown").set_value(True).run()
    page.chat_input[0].set_value(nasty[:2000]).run()
    assert not page.exception
    read += markdown_of(page)
    page.button(key="new_chat").click().run()
    read += markdown_of(page)
    titles = [button for button in page.button if (button.key or "").startswith("open_")]
    assert len(titles) == 2 and any(button.help for button in titles) and any("127.0.0.1" in b.label for b in titles)
    titles[0].click().run()
    assert page.text and not page.exception
    assert sum("h\\.invalid" in text or "h.invalid" in text for text in read) >= 2
    assert any("127.0.0.1:1/0" in text for text in read), "the answer is rendered as Markdown"
    assert not {text: kinds for text in read if (kinds := fetching_tokens(text))}
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(folder / "none")])
    page = AppTest.from_file(str(ROOT / "web_demo.py"), default_timeout=60).run()
    assert not {text: kinds for text in markdown_of(page) if (kinds := fetching_tokens(text))}


def markdown_of(page):
    for each in (*page.markdown, *page.caption, *page.error, *page.header, *page.title):
        assert not getattr(each, "allow_html", False)
        yield each.value
    for each in (*page.button, *page.toggle, *page.expander, *page.selectbox, *page.slider):
        yield each.label
        yield getattr(each, "help", "") or ""


# ---- in a browser ----------------------------------------------------------------------------------------------------
@pytest.fixture
def request_log():
    """(url, paths) of a server that records the path of every request."""
    paths = []

    class Catcher(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_HEAD = do_OPTIONS = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Catcher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


@pytest.fixture
def page_url(tokenizer, tmp_path, request_log):
    """URL of the chat page with a scripted model that generates all attack texts."""
    texts = attack_texts(request_log[0])
    name = f"![n]({request_log[0].replace('/', chr(92))}\\name.png) <img src=x>"
    save_scripted_model(tmp_path / "out" / f"{name}.pth", tokenizer, [text + "\n\n" for text in texts], max_seq_len=512)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, ROOT / "web_demo.py", "--port", str(port), "--device", "cpu", "--lang", "en"],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(tmp_path)},
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            for _ in range(240):
                assert server.poll() is None, (tmp_path / "log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.25)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(20)
            finally:
                server.kill()


@pytest.mark.skipif(not HAS_BROWSER, reason="chromium or Python's playwright is missing")
def test_chromium_fetches_nothing(page_url, request_log, record_attacks):
    from playwright.sync_api import sync_playwright

    catcher, paths = request_log
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, sent = browser.new_page(), []
        page.on("request", lambda r: r.url.startswith((page_url, "data:", "blob:")) or sent.append(r.url))
        page.goto(page_url)
        question = page.get_by_test_id("stChatInputTextArea")
        question.wait_for(timeout=60_000)
        page.get_by_text("Render Markdown").click()
        question.fill("\n\n".join(attack_texts(catcher))[:19_000])
        question.press("Enter")
        page.get_by_role("button", name="Again").wait_for(timeout=120_000)
        page.locator(".stChatMessage .stMarkdown").first.wait_for()
        time.sleep(2)
        assert page.locator(".stChatMessage code").count() > 50, "addresses are shown as code"
        pictures = page.locator(".stChatMessage .stMarkdown img").evaluate_all("all => all.map(each => each.src)")
        assert all(source.startswith((f"{page_url}/", "data:")) for source in pictures), (
            pictures
        )  # images of streamlit itself
        assert page.locator(".stChatMessage a[href^=http]").count() == 0
        assert not sent and not paths
        page.evaluate("url => { document.body.append(Object.assign(new Image(), {src: url})) }", f"{catcher}/by-script")
        time.sleep(1)
        assert not paths, "the content security policy blocks the request of a script"
        browser.close()
    urllib.request.urlopen(f"{catcher}/works").close()
    assert paths == ["/works"]
    record_attacks("URLs in an answer, rendered by Chromium", len(FETCHES), requests=len(paths) - 1)
