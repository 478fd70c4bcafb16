"""Promise: each cleaning rule edits or drops only what it documents, the report counts it, and the repetition rules
agree with datatrove."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_process
from common.errors import UserError
from corpus.row_text import DEFAULT_READER
from curation import drop_rules, edit_rules
from curation.cleaning import RULE_NAMES, RULES, CleanConfig, CleaningTransform, select_rules
from curation.prose_rules import DocumentView
from curation.rule_stats import RuleStats
from curation.transform import NumberedRow
from tests.helpers import run_here, visible_names, write_rows

EDIT_RULES = [rule for rule in RULES if rule.is_edit]
PROSE = "The river that they have seen is to be found in the hills, and it is wide of course."
ZH = "河流从山里来，穿过村庄和田野，最后流进了大海，两岸的人们靠它生活。"


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("repair", "æœ€è¿‘å¤©æ°”å¾ˆå¥½", "最近天气很好"),
        ("repair", "Élodie mange à Noël.", "Élodie mange à Noël."),
        ("characters", "\ufeffＡＢＣ１２\x00\u200b，。\r\ne\u0301\u3000", "ABC12，。\n\u00e9"),
        ("characters", "a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("simplify", "漢語與電腦軟體", "汉语与电脑软体"),
        ("markup", "<p>你好<br/><b>世界</b></p><!-- x --><script>alert(1)</script>&amp;", "你好\n世界\n&"),
        ("markup", "[萌芽](https://a.cn/b_c) ![图](x.png) [[北京市|北京]]", "萌芽 图 北京"),
        (
            "markup",
            "goto [<option>] <alias>, a < b > c, vector<int>",
            "goto [<option>] <alias>, a < b > c, vector<int>",
        ),
        ("markup", "see\n```\n<b>code</b> [a](http://b)\n```\n", "see\n```\n<b>code</b> [a](http://b)\n```\n"),
        ("boilerplate", f"{ZH}\n责任编辑：小王\n上一篇：春天\n{ZH}", f"{ZH}\n{ZH}"),
        ("boilerplate", f"{PROSE}\nPlease enable JavaScript.\n{PROSE}", f"{PROSE}\n{PROSE}"),
        ("boilerplate", f"{ZH}\n首页\n\n关于我们\n联系我们\n\n网站地图\n{ZH}", f"{ZH}\n首页\n\n\n{ZH}"),
        ("boilerplate", f"{PROSE}\nRead more\nShare this\n", f"{PROSE}\n"),
        ("boilerplate", f"{PROSE}\nPrivacy policy | Terms of use\n© 2019 A. All rights reserved.", PROSE),
        ("boilerplate", f"{PROSE}\nRead more\n{PROSE}", f"{PROSE}\nRead more\n{PROSE}"),
        (
            "markup",
            "m = [[1, 2]], x[[1]] + x[[i]], if i <b and c> d",
            "m = [[1, 2]], x[[1]] + x[[i]], if i <b and c> d",
        ),
        ("markup", '<p class="a">x</p><a href="b">y</a> <i>z</i><br>w', "x\ny z\nw"),
        ("personal", "打13800138000或+86 139-1234-5678，010-12345678", "打[PHONE]或[PHONE]，[PHONE]"),
        ("personal", "身份证11010519491231002X，错的110105194912310021", "身份证[ID]，错的110105194912310021"),
        ("personal", "写信给zhang.san+a@mail.example.com。", "写信给[EMAIL]。"),
        ("personal", "微信号：abc_12345 call (555) 123-4567", "微信号：[ACCOUNT] call [PHONE]"),
        ("personal", "π=3.1415926535897932，订单20230101123456789，2019-01-02 03:04", None),
    ],
)
def test_edit_rules_give_the_expected_text(rule, before, after):
    assert getattr(edit_rules, rule)(before) == (before if after is None else after)


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("mojibake", "锟斤拷锟斤拷这是什么", ZH),
        ("too_short", "短句", ZH),
        ("too_long", "字" * 150_001, ZH),
        ("language", "これは日本語の文章です。今日はとても良い天気ですね。", ZH),
        ("language", "Ceci est une phrase en français qui parle de la pluie.", PROSE),
        ("few_letters", "1 2 3 4 5 6 7 8 9 price", PROSE),
        ("few_letters", "价格表" + "1234567890" * 5, ZH),
        ("word_length", "a b c d e f g h i j", PROSE),
        ("symbols", "#one #two #three words", PROSE),
        ("list_of_lines", "* a\n* b\n* c\n* d", f"* a\n* b\n{PROSE}"),
        ("stop_words", "buy cheap watches online", PROSE),
        ("repeated_lines", f"{ZH}\n" * 4, f"{ZH}\n{PROSE}"),
        ("repeated_ngrams", ZH * 4, ZH),
        ("repeated_ngrams", "buy this watch now " * 12, PROSE),
        ("placeholder", "Lorem ipsum dolor sit amet", PROSE),
        ("unfinished", "菜单\n首页\n登录", f"{ZH}\n{ZH}\n{ZH}"),
        ("short_lines", "首页\n登录\n注册", ZH),
        ("adverts", "加微信 abc，日赚五百，轻松赚钱，刷单兼职日结", ZH + "我加微信群了。"),
        (
            "unsafe",
            "百家乐 时时彩 娱乐城 在线真人娱乐",
            "第三百零三条 以营利为目的，聚众赌博或者开设赌场的，处五年以下有期徒刑。",
        ),
    ],
)
def test_drop_rules_drop_only_bad_text(rule, bad, good):
    function = getattr(drop_rules, rule)
    assert function(DocumentView(bad)) and not function(DocumentView(good))


def test_every_rule_has_a_test_case_a_source_and_a_unique_name():
    cases = {mark.args[1][i][0] for test in (test_edit_rules_give_the_expected_text, test_drop_rules_drop_only_bad_text)
             for mark in test.pytestmark for i in range(len(mark.args[1]))}  # fmt: skip
    assert (
        cases == set(RULE_NAMES)
        and len(RULE_NAMES) == len(RULES)
        and all(rule.source and rule.description for rule in RULES)
    )


# ---- agreement with datatrove ----------------------------------------------------------------------------------------
def test_repetition_agrees_with_datatrove(monkeypatch):
    from datatrove.data import Document
    from datatrove.pipeline.filters import gopher_repetition_filter as theirs

    monkeypatch.setattr(theirs, "split_into_words", lambda text, language: drop_rules._WORD_OR_SIGN.findall(text))
    reference = theirs.GopherRepetitionFilter()
    import random

    random.seed(1)
    words = [f"w{'x' * (i % 7)}{i}" for i in range(60)]
    decisions = []
    for i in range(500):
        pool = random.sample(words, random.randint(3, 60))
        lines = [" ".join(random.choices(pool, k=random.randint(3, 30))) for _ in range(random.randint(1, 12))]
        lines += random.choices(lines, k=random.randint(0, 3 * (i % 3)))
        text = random.choice(("\n", "\n\n")).join(lines)
        if len(text.split()) < 50:  # Gopher drops these earlier; one n-gram is a large fraction of a short text
            continue
        result = reference.filter(Document(text=text, id=str(i)))
        page = DocumentView(text)
        ours = drop_rules.repeated_lines(page) or drop_rules.repeated_ngrams(page)
        assert bool(ours) == (result is not True), (text, ours, result)
        decisions.append(bool(ours))
    assert 60 < sum(decisions) < 340


# ---- the transform ---------------------------------------------------------------------------------------------------
def clean_row(row, **options):
    text = DEFAULT_READER.read_content(row).text
    kind = "text" if isinstance(row, str) or "text" in row or "content" in row else "chat"
    return CleaningTransform(CleanConfig(("f",), **options)).apply_to_row(NumberedRow(0, "f", 1, row, text, kind))


def test_rows_keep_their_format_and_their_other_keys():
    kept = json.loads(clean_row({"content": f"<b>{ZH}</b>", "source": "<b>x</b>", "n": 3}).kept)
    assert kept == {"content": ZH, "source": "<b>x</b>", "n": 3}
    chat = {
        "conversations": [{"from": "human", "value": "我的电话13800138000"}, {"from": "gpt", "value": "好"}],
        "id": 1,
    }
    decision = clean_row(chat)
    assert json.loads(decision.kept)["conversations"][0] == {"from": "human", "value": "我的电话[PHONE]"}
    assert [mark.rule for mark in decision.hits] == ["personal"]
    assert json.loads(clean_row(ZH).kept) == {"text": ZH}
    pair = {"prompt": "电话？", "chosen": "13800138000", "rejected": [{"role": "assistant", "content": "<b>不</b>"}]}
    assert json.loads(clean_row(pair).kept)["chosen"] == "[PHONE]"
    assert clean_row({"text": "<b></b>"}).kept is None


def test_rules_are_turned_on_and_off_by_name():
    names = [rule.name for rule in select_rules(["unsafe", "repair"], ["simplify"])]
    assert "unsafe" not in names and "repair" not in names and "simplify" in names and "short_lines" not in names
    assert clean_row({"text": "短"}).kept is None and clean_row({"text": "短"}, skip=["too_short"]).kept
    with pytest.raises(UserError, match="unknown rule 'unsave': the rules are repair"):
        select_rules(["unsave"], [])


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300) | st.text("<>[]()&#;!`ab1380@.- \n\u3000锟斤拷微信", max_size=300))
def test_edit_rules_never_fail_and_leave_valid_text(text):
    for rule in EDIT_RULES:
        edited = rule.function(text)
        edited.encode("utf-8", "surrogatepass")
        if rule.name not in ("markup", "repair"):  # text inside removed tags may form a new tag
            assert rule.function(edited) == edited
    for rule in RULES:
        if not rule.is_edit and text.strip():
            assert isinstance(rule.function(DocumentView(text)), str)


def test_edit_rules_are_fast_on_hostile_text():
    import time

    start = time.process_time()
    for piece in ("<", "[a](", "<a ", "<!--", "<script ", "a@", "1", "138-", "&#", "[[", "微信 ", "锟", "0.1 ", "a."):
        for rule in EDIT_RULES:
            rule.function(piece * (60_000 // len(piece)))
    assert time.process_time() - start < 20


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_report_counts_every_row_and_shows_ten_examples(tmp_path, capsys):
    rows = [{"text": f"{ZH}第{i}段，电话1380013{8000 + i}。"} for i in range(40)] + [
        {"text": f"短{i}"} for i in range(15)
    ]
    rows += [{"text": f"{ZH}{i}"} for i in range(5)] + [{"nothing": 1}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    data_process.main(["clean", str(path), "--out_dir", str(tmp_path / "out"), "--max_bad_share", "0.1"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["read"], report["kept"]) == (60, 45)
    assert report["rules"]["personal"]["rows"] == 40 and report["rules"]["too_short"]["dropped"] == 15
    assert all(len(report["rules"][name]["examples"]) == 10 for name in ("personal", "too_short"))
    assert report["bad"]["no text key, and no chat"]["first"] == [f"{path}:61"]
    assert report["history"][0]["step"] == "clean" and "unsafe" in report["history"][0]["rules"]
    dropped = (tmp_path / "out" / "dropped.tsv").read_text().splitlines()
    assert len(dropped) == 15 and dropped[0].split("\t") == [f"{path}:41", "too_short", "1 words", "短0"]
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert markdown.count("[PHONE]") == 10 and "## unsafe" in markdown
    output = capsys.readouterr().out
    assert "kept 45 of 60 rows" in output and "MB/s" in output and "next: python data_process.py dedup" in output
    assert len(list((tmp_path / "out").glob("text_*.jsonl"))) == 1


def test_check_flag_writes_nothing(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [{"text": ZH + "打13800138000。"}])
    data_process.main(["clean", str(path), "--out_dir", str(tmp_path / "out"), "--check"])
    assert "[PHONE]" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_unsafe_words_file_adds_phrases(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("Foo\nBAR\n")
    path = write_rows(tmp_path / "a.jsonl", [{"text": PROSE}, {"text": "The foo stands beside the bar."}])
    flags = ["--out_dir", str(tmp_path / "out"), "--min_words", "3", "--skip", "stop_words", "--unsafe_words"]
    data_process.main(["clean", str(path), *flags, str(words)])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rules"]["unsafe"]["dropped"] == 1
    with pytest.raises(UserError, match=r"--unsafe_words .*cannot be read"):
        data_process.main(["clean", str(path), *flags, str(tmp_path / "none.txt")])


@pytest.mark.parametrize(
    ("modules", "flags", "words"),
    [
        (["ftfy"], [], r"^clean needs ftfy: pip install \"ftfy>=6.2,<7\", or --skip repair$"),
        (["lingua"], [], r"needs lingua: pip install \"lingua-language-detector>=2,<3\", or --skip language$"),
        (["opencc"], ["--also", "simplify"], r"needs opencc: pip install \"opencc>=1.1.7,<2\", or --skip simplify$"),
        (["lingua", "ftfy", "opencc"], [], r"needs .* and .*: pip install \"[^\"]*\" \"[^\"]*\", or --skip \w+,\w+$"),
    ],
)
def test_a_missing_package_is_one_line_and_its_rule_can_be_skipped(tmp_path, monkeypatch, modules, flags, words):
    path = write_rows(tmp_path / "a.jsonl", [{"text": ZH}])
    edit_rules._opencc_converter.cache_clear()
    drop_rules._language_detector.cache_clear()
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=words):
        data_process.main(["clean", str(path), "--out_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
    data_process.main(["clean", str(path), "--out_dir", str(tmp_path / "out"), "--skip", "repair,language"])


def test_command_lists_rules_and_reports_errors_in_one_line(tmp_path, monkeypatch, capsys):
    listing = run_here(monkeypatch, capsys, "data_process.py", "clean", "--list_rules")
    assert (
        listing.returncode == 0
        and len(listing.stdout.splitlines()) == len(RULES)
        and "arXiv 2112.11446" in listing.stdout
    )
    path = write_rows(tmp_path / "a.jsonl", [{"text": "短"}])
    for arguments, words in (
        ([path, "--out_dir", tmp_path / "out"], "clean keeps none of the 1 rows: 1 by too_short"),
        ([tmp_path / "none.jsonl"], "no such file"),
        ([path, "--out_dir", tmp_path], "is inside the output folder"),
        ([path, "--skip", "x"], "unknown rule 'x'"),
        ([path, "--workers", "0"], "--workers: 0 is not a whole number from 1 to 1024"),
    ):
        done = run_here(monkeypatch, capsys, "data_process.py", "clean", *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert visible_names(tmp_path) == ["a.jsonl"]


def test_merged_counts_of_parts_equal_the_counts_of_the_whole():
    transform = CleaningTransform(CleanConfig(("f",), skip=("language", "repair")))
    texts = [f"{ZH}{k}打1380013{8000 + k}" for k in range(30)]
    rows = [NumberedRow(i, "f", i + 1, {"text": text}, text) for i, text in enumerate(texts)]
    decisions = transform.apply(rows)
    whole, merged = RuleStats(transform.rule_names()), RuleStats()
    for start in (0, 10, 20):
        part = RuleStats(transform.rule_names())
        for row, decision in zip(rows[start : start + 10], decisions[start : start + 10], strict=True):
            part.add("f", row.line, decision)
            whole.add("f", row.line, decision)
        merged.merge(part.to_dict())
    assert merged.to_dict() == whole.to_dict()
