"""The chat page in headless Chromium: behaviour that streamlit's AppTest cannot check.

Promises: the headline is visible on laptops and on a phone, and nothing is cut at the right; the answer to a question
is streamed; Stop, which lies over the input's button, stops it; the next question is answered; a reload shows the same
conversation; a model's text never becomes HTML of the page; Copy copies; the page sends requests to its own server
only; Ctrl-C ends the server, and the answer so far is saved.
Skipped without chromium or Python's playwright. Screenshots are saved in .pytest_cache/d/web.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.helpers import ROOT, save_scripted_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    not CHROMIUM or importlib.util.find_spec("playwright") is None, reason="chromium or Python's playwright is missing"
)
LEFT_STREAMING = []  # questions that are being answered when Ctrl-C ends the server
NASTY = "<script>window.pwned=1</script>\n\n<img/src=x/onerror=window.pwned=1>\n\n![x](http://example.com/x.png)"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """The folder of the user's data, in which the page saves conversations."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def address(tokenizer, tmp_path_factory, chats):
    """The page's address; started by its command line in another folder, with two models."""
    folder = tmp_path_factory.mktemp("web")
    out = folder / "out"
    save_scripted_model(
        out / "dpo_64.pth", tokenizer, ["春", "眠", "不", "觉", "晓", "\n"], "dpo", end_of_turn=False, max_seq_len=8192
    )
    save_scripted_model(out / "full_sft_64.pth", tokenizer, [NASTY], "full_sft")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    environment["XDG_DATA_HOME"] = str(chats)
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, ROOT / "web_demo.py", "--port", str(port), "--device", "cpu"],
        cwd=folder, env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "log").read_text()
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
            log.close()
    saved = [path.read_text(encoding="utf-8") for path in chats.glob("mengya/chats/*.json")]
    for question in LEFT_STREAMING:
        assert any(question in text and "春眠不觉晓" in text for text in saved), "the answer that Ctrl-C interrupted"
    log_text = (folder / "log").read_text()
    assert "models in out, cpu" in log_text and "Traceback" not in log_text, log_text


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_chromium_streams_stops_copies_and_fetches_nothing(address, browser, request):
    from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

    pictures = request.config.cache.mkdir("web")
    context = browser.new_context(locale="zh-CN", viewport={"width": 1200, "height": 860})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page = context.new_page()
    page.set_default_timeout(90_000)  # of a busy machine
    elsewhere, broken = [], []
    page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or elsewhere.append(r.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(address)
    question = page.get_by_test_id("stChatInputTextArea")
    question.wait_for(timeout=60_000)
    page.get_by_text("问问你训练的模型").wait_for()
    page.screenshot(path=pictures / "1_welcome.png")

    page.get_by_role("slider", name="最长回答").press("End")
    page.get_by_text("8192", exact=True).first.wait_for()
    time.sleep(1)  # streamlit sends the value of a slider some time after its last change
    question.fill("背一首诗？")
    question.press("Enter")
    answer = page.get_by_test_id("stChatMessage").nth(1).get_by_test_id("stText")
    page.get_by_text("春眠不觉晓").first.wait_for()
    lengths = []
    for _ in range(3):
        lengths.append(len(answer.inner_text()))
        time.sleep(0.3)
    assert lengths[0] < lengths[1] < lengths[2], "the answer is streamed"
    stop = page.get_by_role("button", name="停止")
    inner, outer = stop.bounding_box(), page.get_by_test_id("stChatInput").bounding_box()
    assert is_inside(inner, outer), "Stop lies over the input"
    for attempt in range(5):  # streamlit may replace the button between the press and the release of a slow click
        stop.click(force=True)
        try:
            page.get_by_text("已停止").wait_for(timeout=5000)
            break
        except PlaywrightTimeoutError:
            assert attempt < 4, "Stop does not stop the answer"
    assert not page.get_by_text("问问你训练的模型").count(), "the welcome page is removed"
    stopped = answer.inner_text()
    assert "▍" not in stopped and stopped.startswith("春眠不觉晓")
    for attempt in range(5):  # the label "copied" shows for 1.5 s, which a busy machine may miss
        page.get_by_role("button", name="复制", exact=True).click()
        try:
            page.get_by_role("button", name="已复制").wait_for(timeout=1500)
            break
        except PlaywrightTimeoutError:
            assert attempt < 4, "the button never says that the text is copied"
    assert page.evaluate("navigator.clipboard.readText()").strip() == stopped.strip()
    page.screenshot(path=pictures / "3_stopped.png")
    assert answer.inner_text() == stopped, "the answer stays stopped"
    page.reload()
    page.get_by_text("已停止").wait_for()
    assert answer.inner_text() == stopped, "a reload shows the same conversation"
    page.screenshot(path=pictures / "3_reloaded.png")

    page.get_by_role("combobox", name="对比模型").click()
    page.get_by_role("option", name="full_sft_64").click()
    page.get_by_placeholder("同时向两个模型提问").wait_for()
    question.fill("再来一次")
    question.press("Enter")
    page.get_by_text(NASTY).wait_for()
    with contextlib.suppress(PlaywrightTimeoutError):  # on a busy machine the answers may have ended by themselves
        page.get_by_role("button", name="停止").click(force=True, timeout=5000)
    page.get_by_role("button", name="重新回答").wait_for()
    page.get_by_text("按 Markdown 排版").click()
    page.get_by_text("window.pwned=1").first.wait_for()
    page.get_by_text("http://example.com/x.png").first.wait_for()
    assert page.get_by_role("link", name="x").count() == 0
    page.screenshot(path=pictures / "4_side_by_side.png")
    assert page.evaluate("window.pwned") is None and page.locator("img[src='x']").count() == 0
    assert not elsewhere and not broken

    page.get_by_role("button", name="新对话").first.click()
    main = page.get_by_test_id("stMainBlockContainer")
    main.get_by_text("再来一次").first.wait_for(state="hidden")  # until then the answers before are still drawn
    question = main.get_by_test_id("stChatInputTextArea")
    question.fill("最后一问")
    question.press("Enter")
    main.get_by_text("春眠不觉晓").first.wait_for()
    page.wait_for_timeout(1500)  # a page that closes within the first second may leave the question without its answer
    LEFT_STREAMING.append("最后一问")


def is_inside(inner, outer) -> bool:
    return (
        outer["x"] <= inner["x"]
        and outer["y"] <= inner["y"]
        and inner["x"] + inner["width"] <= outer["x"] + outer["width"] + 1
        and inner["y"] + inner["height"] <= outer["y"] + outer["height"] + 1
    )


def test_chromium_shows_headline_and_input_at_common_sizes(address, browser, request):
    pictures = request.config.cache.mkdir("web")
    page = browser.new_context(locale="zh-CN").new_page()  # one context: the page's scripts are loaded once
    page.set_default_timeout(90_000)

    def check_screen(headline, width, height):
        page.set_viewport_size({"width": width, "height": height})
        shown = [page.get_by_role("heading", name=headline), page.get_by_test_id("stChatInputTextArea")]
        for each in shown:
            each.wait_for()
        page.wait_for_timeout(500)
        page.screenshot(path=pictures / f"5_{width}_{headline[:3]}.png")
        for each in shown:
            assert is_inside(each.bounding_box(), {"x": 0, "y": 0, "width": width, "height": height}), each
        main = page.locator(".stMain")
        assert main.evaluate("main => main.scrollWidth <= main.clientWidth"), "nothing is cut at the right"

    for width, height in ((390, 844), (1366, 768), (1280, 800)):
        page.set_viewport_size({"width": width, "height": height})
        page.goto(address)
        check_screen("问问你训练的模型", width, height)
    page.get_by_test_id("stRadio").get_by_text("English").click()
    check_screen("Ask a model that you trained", 1280, 800)
    check_screen("Ask a model that you trained", 1366, 768)
