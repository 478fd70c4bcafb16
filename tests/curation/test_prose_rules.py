"""Promise: cleaning keeps sentences about accounts, formulas, code and tables; a document that is dropped without its
formulas is dropped with them."""

import itertools
import json
import lzma
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import drop_rules, edit_rules
from curation.prose_rules import DocumentView, extract_prose
from tests.curation.test_cleaning import PROSE, ZH, clean_row
from tests.helpers import SHARED_DATA

ACCOUNT_HELP_EN = """How do I change my password?
To log in, open the page and enter your name and the password that you have been sent.
Log in to the database as root and set the time zone of the server.
You can read more about the account in the manual, or leave a comment below.
Then click here to see what the terms of service say about cookies and about privacy."""
ACCOUNT_HELP_ZH = """如何修改密码？
登录后点击右上角的头像，选择修改密码。
在成功登录后，你会看到系统的主页，请尽快修改初始密码。
他人未经授权以当事人名义申请再审的，人民法院不予受理。
下一篇文章我们将讨论注册登录的流程，请继续关注。
如果遇到任何错误，请在下方发表评论。
该软件的版权所有者是谁？"""


@pytest.mark.parametrize("page", [ACCOUNT_HELP_EN, ACCOUNT_HELP_ZH], ids=["en", "zh"])
def test_sentences_about_logging_in_are_kept(page):
    kept = clean_row({"text": page})
    assert json.loads(kept.kept) == {"text": page} and kept.hits == []
    for first, last in itertools.pairwise(page.split("\n")):
        text = f"{PROSE}\n{first}\n{last}"
        assert edit_rules.boilerplate(text) == text


CHATS = [
    ("How do I log in?", "Log in to your account\nClick here\nRead more"),
    ("网站的栏目有哪些？", "- 关于我们\n- 联系我们\n- 免责声明"),
    ("Which formula is it?", "E = mc^2"),
    ("计算积分", "$\\int_0^1 x^2 dx = 1/3$"),
    ("Gauss", "$$\\int_{-\\infty}^{\\infty} e^{-x^2} \\, dx = \\sqrt{\\pi}$$"),
    ("sin(2x) = 2 sin(x) cos(x)", "\\sin(\\alpha+\\beta)=\\sin\\alpha\\cos\\beta+\\cos\\alpha\\sin\\beta"),
    ("matrix", "\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}, \\det = ad - bc"),
    ("已知 $\\vec{a}, \\vec{b}$ 夹角为 $45^{\\circ}$, 则 $|\\vec{b}|=$", "$3 \\sqrt{2}$"),
    ("燃烧", "2 H2 + O2 -> 2 H2O\nCaCO3 -> CaO + CO2↑"),
    ("code", "```python\ndef total(numbers):\n    return sum(numbers[[0]])\n```"),
    ("code", "def add(first, second):\n    if first < second:\n        return first + second\n    return first"),
    ("table", "| 1990 | 5.3 |\n| 2000 | 6.1 |"),
]


@pytest.mark.parametrize(("question", "answer"), CHATS)
def test_formulas_code_and_steps_of_a_chat_are_kept(question, answer):
    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    kept = clean_row(row)
    assert kept.kept and json.loads(kept.kept) == row and kept.hits == []


FORMULAS = [
    "Solve 2x + 3 = 7. Subtract 3 from both sides: 2x = 4. Divide by 2: x = 2.",
    "a^2 + b^2 = c^2\nE = m c^2\nsin^2(x) + cos^2(x) = 1\n(a + b)^2 = a^2 + 2ab + b^2",
    "Let $f(x) = x^2$. Then $f'(x) = 2x$, so $f'(3) = 6$ and $f''(x) = 2$.",
    "解：由 $\\frac{a}{b}=\\frac{c}{d}$ 得 $ad=bc$，代入 $a=2,b=3,c=4$，得 $d=\\frac{bc}{a}=6$。",
    "化学方程式：2H2 + O2 → 2H2O，C + O2 → CO2，CaCO3 → CaO + CO2↑，2Na + 2H2O → 2NaOH + H2↑",
    "1 × 1 = 1\n1 × 2 = 2\n1 × 3 = 3\n1 × 4 = 4\n1 × 5 = 5\n1 × 6 = 6",
    f"{PROSE}\n| year | m | ft |\n|---|---|---|\n| 1990 | 3.5 | 11.5 |\n| 2000 | 4.1 | 13.5 |\n| 2010 | 4.9 | 16.1 |",
    f"{PROSE}\n1990 120 3.5\n2000 150 4.1\n2010 190 4.9\n2020 210 5.6\n2021 212 5.7\n2022 214 5.9",
    f"{ZH}\n1990 120 3.5 2000 150 4.1\n2010 190 4.9 2020 210 5.6\n2021 212 5.7 2022 214 5.9\n2023 216 6.1",
    f"{PROSE}\n```\n#include <a.h>\n#define B 1\n#define C 2\nx[0] = {{ 1, 2, 3 }};\nx[1] = {{ 4, 5, 6 }};\n```",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_and_tables_of_a_document_are_kept(text):
    kept = clean_row({"text": text})
    assert kept.kept and json.loads(kept.kept) == {"text": text} and kept.hits == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("few_letters", "= = = = + + + + | | 1 2 3 4 5 6 price"),
        ("few_letters", "12 34 56\n78 90 12\n34 56 78\n90 12 34"),
        ("stop_words", "buy cheap watches = 5 dollars, cheap phones, cheap shoes, cheap bags, cheap hats, " * 8),
        ("few_letters", "价格 = 5，" + "1234567890" * 20 + "元，" * 60),
        ("language", "Ceci est une phrase en français, qui dit que x = 2 et que $y = 3$ pour la pluie."),
        ("symbols", "The #one #two #three words are = to x " * 9),
    ],
)
def test_a_bad_document_is_dropped_with_its_formulas_and_tables(rule, text):
    """A document that a rule drops without its formulas and tables is dropped with them too."""
    assert getattr(drop_rules, rule)(DocumentView(text))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.text("$\\{}^_=+<->ab1 |.\n#`()是", max_size=200))
def test_prose_is_part_of_the_text_and_the_recheck_drops_no_more_documents(text):
    prose = extract_prose(text)
    letters = iter(text)
    assert all(letter in letters for letter in prose.text if letter not in " \n"), "in the same order"
    if prose.text == text:
        assert not prose.has_formulas
    for name in ("few_letters", "word_length", "stop_words", "symbols", "repeated_ngrams"):
        rule = getattr(drop_rules, name)
        assert not rule(DocumentView(text)) or rule.__wrapped__(DocumentView(text))


def test_prose_extraction_is_fast_on_hostile_text():
    start = time.process_time()
    for piece in (
        "$",
        "$=",
        "$ \n=",
        "\\[",
        "\\(",
        "\\begin{a}",
        "\\a{",
        "`",
        "a=",
        "a-",
        "a - ",
        "(",
        "1 ",
        "1|",
        "x^",
        "a.",
        "|",
    ):
        extract_prose(piece * (60_000 // len(piece)))
        extract_prose((piece * 30 + "\n") * (60_000 // (30 * len(piece))))
    assert time.process_time() - start < 20


@pytest.mark.real
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the real data in ../shared/data")
def test_real_exercises_and_instructions_are_kept():
    """Every Chinese chat with a LaTeX fraction is kept unchanged, and no chat loses a line as boilerplate."""
    exercises = 0
    for name, hints in (("sft_zh", ("\\frac", "登录", "密码", "下一页")), ("sft_en", ("\\frac", "log in", "password"))):
        with lzma.open(SHARED_DATA / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in itertools.islice(lines, 20_000):
                text = json.dumps(json.loads(line), ensure_ascii=False).replace("\\\\", "\\")
                if not any(hint in text for hint in hints):
                    continue
                decision = clean_row(json.loads(line), skip=["personal", "markup", "characters"])
                assert "boilerplate" not in {mark.rule for mark in decision.hits}
                if "\\frac" in text and name == "sft_zh":
                    exercises += 1
                    assert decision.kept, (line, decision.hits)
    assert exercises > 100
