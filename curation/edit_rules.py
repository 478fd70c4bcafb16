"""Edit rules of `data_process.py clean`: functions str -> str, listed in cleaning.py.

    repair      ä½ å¥½      -> 你好              text decoded with the wrong code page
    characters  "ＡＢＣ\\x00" -> "ABC"             control characters, full-width forms, composed accents, line ends
    simplify    漢語         -> 汉语              off by default
    markup      "<b>a</b>"  -> "a"               tags, entities, markdown links, wiki markup; not inside ``` fences
    boilerplate removes lines with a copyright or cookie notice, and runs of navigation links
    personal    13800138000 -> [PHONE]           phone, identity card, e-mail, messenger account

A rule without a match returns its argument. The patterns have bounded repeats, so no input makes them slow.

Read next: cleaning.py (the table), drop_rules.py (the rules that drop documents).
"""

import functools
import html
import re
import unicodedata
from typing import Any

from common.errors import import_package
from common.packages import install_advice
from corpus.language import count_chinese
from curation.character_flags import flag_texts
from curation.phrases import RULE_PHRASES, scan_phrases

# UTF-8 read as Latin-1 or cp1252: an accented letter, then a continuation byte.
_WRONGLY_DECODED = re.compile("[\xc2-\xf4][\x80-\xbf\u0152-\u0178\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]")


def repair(text: str) -> str:
    """Undo a wrong decoding with ftfy (github.com/rspeer/python-ftfy). ftfy runs only if the pattern above matches."""
    if not character_flags(text) & MISREAD_FLAG or not _WRONGLY_DECODED.search(text):
        return text
    advice = install_advice("the rule `repair`", "ftfy", otherwise="--skip repair")
    fixed: str = import_package("ftfy", advice).fix_encoding(text)
    return fixed


_INVISIBLE = dict.fromkeys([*range(0x00, 0x09), 0x0B, *range(0x0E, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0),
                            0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065),
                            *range(0xE000, 0xF900), 0xFEFF, *range(0xFFF0, 0xFFFC)])  # fmt: skip
_WIDTHS = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F) if chr(wide - 0xFEE0).isalnum()}
_CHARACTER_MAP = {**_INVISIBLE, **_WIDTHS, 0x0C: "\n", 0x85: "\n", 0x2028: "\n", 0x2029: "\n\n", 0xA0: " "}
_OUTER_SPACES = re.compile(r"[ \t\u3000]+$|^\u3000+", re.M)
_BLANK_LINES = re.compile(r"\n{4,}")

# The classes of characters that the patterns of several rules need.
MISREAD_FLAG, MOJIBAKE_FLAG, NORMALISE_FLAG, FOREIGN_DIGIT_FLAG = 1, 2, 4, 8
character_flags = flag_texts({
    MISREAD_FLAG: "[\xc2-\xf4]",
    MOJIBAKE_FLAG: "[\ufffd\xc3-\xef锟烫屯]",
    NORMALISE_FLAG: "[" + "".join(f"\\u{code:04x}" for code in _CHARACTER_MAP) + "\r\u0300-\u036f]",
    FOREIGN_DIGIT_FLAG: r"[^\D0-9]|[\ud800-\udfff]",  # some of the digits are above U+FFFF
})  # fmt: skip


def characters(text: str) -> str:
    """Remove control, invisible and private-use characters; map full-width letters and digits to ASCII; NFC; LF.

    Chinese punctuation is kept: "，" does not become ",". At most two consecutive blank lines remain.
    """
    if character_flags(text) & NORMALISE_FLAG:
        text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CHARACTER_MAP)
        text = unicodedata.normalize("NFC", text)
    if "\u3000" in text or " \n" in text or "\t\n" in text:
        text = _OUTER_SPACES.sub("", text)
    return _BLANK_LINES.sub("\n\n\n", text) if "\n\n\n\n" in text else text


def simplify(text: str) -> str:
    """Traditional to simplified Chinese with OpenCC's t2s dictionary (phrases first, then characters)."""
    return _opencc_converter().convert(text)


@functools.cache
def _opencc_converter() -> Any:
    advice = install_advice("the rule `simplify`", "opencc")
    return import_package("opencc", advice).OpenCC("t2s")


_TAG_NAMES = (
    "abbr|article|aside|big|blockquote|body|br|canvas|center|cite|col|dd|div|dl|dt|em|embed|fieldset|figcaption|"
    "figure|font|footer|form|h[1-6]|head|header|hr|html|iframe|img|ins|kbd|li|meta|nav|noscript|ol|picture|pre|"
    "small|span|strike|strong|sub|sup|svg|table|tbody|td|textarea|tfoot|th|thead|tr|tt|ul"
)
# One letter may be a variable: "x <a and b> y" has no attribute and is no tag.
_LETTER_TAG = r"</?[abipu](?:\s[^<>=]{1,30}=[^<>]{0,2000})?\s?/?>"
# Names that manuals write in angle brackets too ("<option>"): a tag only if it is closing or has an attribute.
_AMBIGUOUS_TAG_NAMES = (
    "audio|button|code|input|label|link|main|mark|object|option|param|section|select|source|summary|time|title|video"
)
_HIDDEN_ELEMENTS = tuple(
    (re.compile(opening, re.I), re.compile(closing, re.I))
    for opening, closing in (("<!--", "-->"), (r"<script\b", r"</script\s{0,9}>"), (r"<style\b", r"</style\s{0,9}>"))
)
_TAG = re.compile(
    rf"{_LETTER_TAG}|</?(?:{_TAG_NAMES})(?:\s[^<>]{{0,2000}})?/?>|</(?:{_AMBIGUOUS_TAG_NAMES})>|<(?:{_AMBIGUOUS_TAG_NAMES})\s[^<>=]{{1,30}}=[^<>]{{0,2000}}>",
    re.I,
)
_BREAK = re.compile(r"<(?:br|/p|/div|/li|/tr|/h[1-6])\b[^<>]{0,200}>", re.I)
_ENTITY = re.compile(r"&(?:#\d{1,6}|#x[0-9a-fA-F]{1,5}|[a-zA-Z]{2,31}\d{0,2});")
_IMAGE = re.compile(r"!\[([^\[\]]{0,300})\]\([^()\s]{0,2000}(?:\s\"[^\"]{0,300}\")?\)")
_LINK = re.compile(r"(?<!!)\[([^\[\]]{1,300})\]\((?:https?:|/|#|\./|mailto:)[^()\s]{0,2000}(?:\s\"[^\"]{0,300}\")?\)")
_BBCODE = re.compile(
    r"\[(b|i|u|url|img|color|size|font|quote|center)(?:=[^\[\]]{0,300})?\]([^\[\]]{0,2000})\[/\1\]", re.I
)
# A link to a named page; not an index (x[[1]]) and not a matrix ([[1, 2]]).
_WIKI_LINK = re.compile(r"(?<![A-Za-z0-9_])\[\[(?![\s\d.,;:+-]*\])(?:[^\[\]|]{0,300}\|)?([^\[\]|]{1,300})\]\]")


def markup(text: str) -> str:
    """Replace HTML, markdown links and images, BBCode and wiki links by their visible text, outside ``` fences."""
    if not ("<" in text or "[" in text or "&" in text):
        return text
    parts = text.split("```")
    for i in range(0, len(parts), 2):
        part = parts[i]
        if "<" in part and ">" in part:
            part = _TAG.sub("", _BREAK.sub("\n", _remove_hidden_elements(part)))
        if "](" in part:
            part = _LINK.sub(r"\1", _IMAGE.sub(r"\1", part))
        if "[/" in part:
            part = _BBCODE.sub(r"\2", part)
        if "[[" in part:
            part = _WIKI_LINK.sub(r"\1", part)
        if "&" in part:
            part = _ENTITY.sub(lambda match: html.unescape(match.group()), part)
        parts[i] = part
    joined = "```".join(parts)
    return text if joined == text else joined.replace("\0", "")


def _remove_hidden_elements(text: str) -> str:
    """Remove comments, scripts and style sheets; an element without a closing tag stays."""
    for opening, closing in _HIDDEN_ELEMENTS:
        kept, start = [], 0
        while (first := opening.search(text, start)) and (last := closing.search(text, first.end())):
            kept.append(text[start : first.start()])
            start = last.end()
        text = "".join([*kept, text[start:]]) if start else text
    return text


_MAX_LINE_ZH, _MAX_LINE_EN = 30, 90  # longest line, in characters, that can be boilerplate
# Patterns of short lines that are notices. They match anywhere in a document.
_NOTICE_PATTERNS = (
    r"版权所有(?![者人权])", r"未经授权.{0,8}(?:不得|禁止|严禁|请勿).{0,3}(?:转载|复制|摘编|镜像)", r"转载请注明",
    r"责任编辑[:：\s]", r"责编[:：]", r"(?:本文|文章)来源[:：]", r"备案号[:：]", r"ICP备\s?\d", r"公网安备\s?\d",
    r"违法和不良信息举报", r"^\W*(?:当前位置|您的位置|浏览次数)[:：]",
    r"^\W*(?:©|\(c\)\s?\d{4}|copyright\s{0,2}(?:©|\(c\)|\d{4}))", r"all rights reserved\W*$",
    r"^\W*(?:please )?(?:enable|turn on|activate) javascript", r"javascript is (?:disabled|not enabled)",
    r"(?:site|page|application) requires javascript", r"^\W*(?:this|our) (?:web)?site uses cookies",
    r"^\W*we use cookies (?:to|on)\b", r"(?:subscribe to|sign up for) our (?:\w+ )?newsletter",
    r"^\W*skip to (?:main )?content\W*$",
)  # fmt: skip
_NOTICE = re.compile("|".join(_NOTICE_PATTERNS), re.I)
_MENU_ZH, _MENU_EN = "|".join(RULE_PHRASES["menu zh"]), "|".join(RULE_PHRASES["menu en"])
_BOILERPLATE_HINTS = frozenset((*RULE_PHRASES["menu zh"], *RULE_PHRASES["menu en"], *RULE_PHRASES["notice"]))
_NAVIGATION_LINE = re.compile(
    rf"(?:请|您?需要)?(?:{_MENU_ZH})[^。！？!?；;，,]{{0,25}}|[^。！？!?；;，,\d][^。！？!?；;，,]{{0,25}}(?:{_MENU_ZH})"
    rf"|(?:{_MENU_EN})\b[^.!?;]{{0,40}}",
    re.I,
)
_LINK_DECORATION = " \t\u3000>›»«‹·•|*#-–—[]【】()（）:：…"


def boilerplate(text: str) -> str:
    """Remove short lines that are a notice (copyright, cookies, JavaScript) or navigation links.

    Navigation lines are removed in runs of two or more and at the end of the text. A sentence about logging in is kept.
    C4 (Raffel et al. 2020, section 2.2) removes lines with "javascript" and similar words; the patterns are ours.
    """
    if "\n" not in text or _BOILERPLATE_HINTS.isdisjoint(scan_phrases(text).found):
        return text
    lines = text.split("\n")
    kinds = [_line_kind(line) for line in lines]
    removed: set[int] = set()
    link_lines: list[int] = []
    for i, kind in enumerate([*kinds, "text"]):
        if kind == "notice":
            removed.add(i)
        if kind in ("notice", "menu"):
            link_lines.append(i)
        elif kind == "text":
            removed.update(link_lines if len(link_lines) > 1 or i == len(lines) else ())
            link_lines = []
    return "\n".join(line for i, line in enumerate(lines) if i not in removed) if removed else text


def _line_kind(line: str) -> str:
    """The kind of a line: notice, menu, blank or text."""
    if len(line) > _MAX_LINE_EN or (len(line) > _MAX_LINE_ZH and count_chinese(line)):
        return "text"
    stripped = line.strip(_LINK_DECORATION)
    if not stripped:
        return "blank"
    if _NOTICE.search(line):
        return "notice"
    return "menu" if _NAVIGATION_LINE.fullmatch(stripped) else "text"


_EMAIL = re.compile(
    r"(?<![A-Za-z0-9_.+-])[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
_ACCOUNT = re.compile(r"((?:微信号?|薇信|wechat|QQ群?号?)[ :：]{1,3})[A-Za-z0-9_-]{5,20}", re.I)
_IDENTITY_NUMBER = re.compile(
    r"(?<![0-9A-Za-z.])[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[0-9Xx](?![0-9A-Za-z])"
)
_PHONE = re.compile(
    r"(?<![\d.-])(?:"
    r"(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # mobile, mainland China
    r"|0\d{2,3}[ -]\d{7,8}|\(0\d{2,3}\) ?\d{7,8}|400-?\d{3}-?\d{4}"  # its landlines and service numbers
    r"|(?:\+?1[ .-])?\(\d{3}\) ?\d{3}[.-]\d{4}|(?:\+?1[ .-])?\d{3}([.-])\d{3}\1\d{4}"  # North America
    r")(?![\d.]?\d|-\d)"
)
_CHECK_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_TEN_DIGITS = re.compile(rb"0(?:[ .()-]{0,2}0){9}")  # the shortest phone number, with _FOLD
_FOLD = bytes.maketrans(b"123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"000000000abcdefghijklmnopqrstuvwxyz")


def personal(text: str) -> str:
    """Mask phone numbers, identity card numbers, e-mail addresses and messenger accounts.

    An identity card number must have a date of birth and the right check digit (GB 11643-1999); most other long
    numbers are kept. Names and postal addresses are not masked.
    """
    folded = text.encode("utf-8", "surrogatepass").translate(_FOLD)
    text = _EMAIL.sub("[EMAIL]", text) if "@" in text else text
    if _TEN_DIGITS.search(folded) or character_flags(text) & FOREIGN_DIGIT_FLAG:
        text = _IDENTITY_NUMBER.sub(lambda match: "[ID]" if is_identity_number(match.group()) else match.group(), text)
        text = _PHONE.sub("[PHONE]", text)
    if "微信" in text or "薇信" in text or b"qq" in folded or b"wechat" in folded:
        text = _ACCOUNT.sub(r"\1[ACCOUNT]", text)
    return text


def is_identity_number(number: str) -> bool:
    """True if the 18th character is the check digit of the 17 before it (ISO 7064, MOD 11-2)."""
    total = sum(weight * int(digit) for weight, digit in zip(_CHECK_WEIGHTS, number[:17], strict=True))
    return number[17].upper() == "10X98765432"[total % 11]
