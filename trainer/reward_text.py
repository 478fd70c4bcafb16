"""Does the text of an answer agree with a reference: numbers, letters of multiple choice, words.

    final_answer("2 + 3 = 5. #### 5") -> "5"      after the last ####, or in the last \\boxed{}; else the whole text

    reference           the answer agrees if
    ends with a number  its last number is equal: 1,234 = 1234.0 = １２３４; without digits its last Chinese one, 四十二
    one letter, A to Z  it names this letter last: "The answer is (B).", "选B", "B. Paris"
    another text        its last words are the reference, without case, spaces and punctuation

Source of ####: GSM8K (arXiv 2110.14168, appendix). Read next: rewards.py (the rewards).
"""

import re
from decimal import Decimal

FINAL_MARKER = "####"  # of GSM8K: the final answer follows
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20, 0x2212: ord("-")}

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
NUMBER = re.compile(rf"(?<![0-9A-Za-z)])-{_DIGITS}|{_DIGITS}")  # after a digit, a letter or ) a minus is an operator
_PART_OF_TERM = re.compile(r"(?:[-+*/^×÷<>_\\]\s*|[A-Za-z]|[0-9][:.,])$")  # before the 4 of 3/4, A4, 3:4
CHINESE_NUMBER = re.compile("负?[零〇一二两三四五六七八九十百千万亿]+")
_CHINESE_DIGITS = {digit: i for i, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_POWERS = {"万": 10**4, "亿": 10**8}

MAX_CHINESE_NUMERALS = 30  # of a number

_LETTER = r"[\s(\[:\"'*]{0,4}([A-Z])(?![A-Za-z])(?! [a-z])"  # "A" before a word is an article
_ONLY_LETTER = re.compile(r"[\s(\[]*([A-Z])[\s)\].。,:]*")
_NAMED_LETTER = re.compile(rf"(?:(?i:\banswer(?: is)?|\bchoose)|答案[是为选]*|选择?){_LETTER}")
_FIRST_LETTER = re.compile(rf"(?:(?i:option)|选项)?{_LETTER}")
_PUNCTUATION = re.compile(r"[\s.,;:!?\"'`()\[\]{}*_$。、“”‘’《》「」…—]+")


def agrees(answer: str, reference: str) -> bool:
    """Whether the answer agrees with the reference by the rules of the module docstring. Never raises."""
    answer, reference = final_answer(to_half_width(answer)), final_answer(to_half_width(reference))
    if (number := reference_number(reference)) is not None:
        return last_number(answer) == number
    if letter := _ONLY_LETTER.fullmatch(reference):
        return last_letter(answer) == letter[1]
    return ends_with_words(answer, reference)


def to_half_width(text: str) -> str:
    """The text with ASCII characters for their full-width forms, and "-" for the minus sign."""
    return text.translate(_FULL_WIDTH)


def final_answer(text: str) -> str:
    """What follows the last #### of a text, or stands in its last \\boxed{}; the text itself without either."""
    _, marker, end = text.rpartition(FINAL_MARKER)
    if marker:
        return end.strip()
    _, marker, end = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(end if marker else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return end[:i].strip()
    return text.strip()


def reference_number(text: str) -> Decimal | None:
    """The number at the end of a reference in half-width characters, as in "42", "3+4=7." and "It is 7."; else None."""
    found = next(reversed(list(NUMBER.finditer(text))), None)
    if not found or re.search(r"\w", text[found.end() :]) or _PART_OF_TERM.search(text[: found.start()]):
        return None
    return _decimal(found[0])


def last_number(text: str) -> Decimal | None:
    """The last number of a text in half-width characters; None without one."""
    if found := NUMBER.findall(text):
        return _decimal(found[-1])
    if found := CHINESE_NUMBER.findall(text):
        return chinese_number(found[-1])
    return None


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def chinese_number(text: str) -> Decimal | None:
    """The number of Chinese numerals, 一千零五 or 二〇二六; None if they are no number."""
    sign, text = (-1, text[1:]) if text[:1] == "负" else (1, text)
    if len(text) > 1 and all(character in _CHINESE_DIGITS for character in text):
        return sign * Decimal("".join(str(_CHINESE_DIGITS[character]) for character in text))
    if len(text) > MAX_CHINESE_NUMERALS:
        return None
    total, section, unit = 0, 0, 10**4  # after the last 万 or 亿: `section`, and its last unit
    digit = -1  # that no unit follows yet
    for character in text:
        if character in _CHINESE_DIGITS:
            if digit > 0:
                return None
            digit = _CHINESE_DIGITS[character]
        elif character in _CHINESE_UNITS:
            if _CHINESE_UNITS[character] >= unit:
                return None
            unit = _CHINESE_UNITS[character]
            section += unit * (digit if digit > 0 else 1)
            digit = -1
        else:
            total = (total + section + max(digit, 0)) * _CHINESE_POWERS[character]
            section, unit, digit = 0, 10**4, -1
    return Decimal(sign * (total + section + max(digit, 0)))


def last_letter(text: str) -> str | None:
    """The option letter that a text names last, or begins with; None without one."""
    found = _ONLY_LETTER.fullmatch(text) or _FIRST_LETTER.match(text)
    named = _NAMED_LETTER.findall(text)
    return named[-1].upper() if named else found[1] if found else None


def ends_with_words(text: str, words: str) -> bool:
    """Whether a text ends with `words`, without case, spaces and punctuation. Latin words must match as a whole."""
    text, words = (f" {_PUNCTUATION.sub(' ', part.casefold()).strip()}" for part in (text, words))
    if words == " ":
        return False
    return text.endswith(words) or (not words[1].isascii() and text.replace(" ", "").endswith(words.replace(" ", "")))
