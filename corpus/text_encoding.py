"""Detects the encoding of a text file and converts it to UTF-8: GB18030 (GBK), Big5, UTF-16, UTF-32, Windows-1252.

    encoding = detect_encoding(sample)                  of the first bytes
    next_chunk = utf8_reader(stream, encoding.codec)    reads UTF-8; malformed bytes become 0xFF, malformed in UTF-8 too

UTF-8 is preferred: a sample with few malformed bytes counts as UTF-8 with malformed rows. Otherwise the encoding is
guessed with charset-normalizer, and the guess is used only if the decoded text consists of frequent characters. If it
does not, the file is read as UTF-8, and `TextEncoding.malformed_reason` of its bad rows contains the iconv command.

Read next: input_files.py (the caller).
"""

import codecs
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from charset_normalizer import from_bytes

SAMPLE_BYTES = 64 << 10  # bytes passed to charset-normalizer
MAX_MALFORMED_FRACTION = 0.01  # of lines; up to this fraction a file counts as UTF-8
BAD_BYTE = "\udcff"  # in decoded text; 0xFF in UTF-8 bytes, where it is always malformed

ENCODING_NAMES = {
    "utf-8": "UTF-8", "gb18030": "GB18030", "cp950": "Big5", "cp1252": "Windows-1252", "utf-16": "UTF-16",
    "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32", "cp932": "Shift_JIS", "euc_jp": "EUC-JP",
    "cp949": "EUC-KR", "cp1251": "Windows-1251", "koi8_r": "KOI8-R", "cp1250": "Windows-1250",
}  # fmt: skip
_BOMS = (  # UTF-32 first: its byte-order mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_GUESSES = ["gb18030", "cp950", "cp1252", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1250"]

# The 200 most frequent Chinese characters, simplified and, if different, traditional: more than half of all characters
# of a text.
_FREQUENT = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经"
    "么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日者意无力它与长把机十第公已工使情明性知全三又关点"
    "正业外将两高间由问很最重并物手应头文体相见被什二等新己果加月话合回特代内信表化给世位次度常先通教原提立及比解水名真处走各入几口"
    "认条系气题活更别打女变四总何电数"
    "這個們來爲為國說時會對於過發後裏裡種經麼學現當沒動還進樣開從實無與長機關點業將兩間問並應頭體見話內給處幾認條氣題別變總電數"
)
# Letters and punctuation of English, French, German, Spanish, Italian and Portuguese text. Czech, Polish or Turkish
# text read as Windows-1252 has many others.
_WESTERN = frozenset("àâäáãåçéèêëíîïñóôöõœßúùûüÀÂÄÁÃÅÇÉÈÊËÍÎÏÑÓÔÖÕŒÚÙÛÜ«»¿¡“”‘’–—…•€£©®°·´ª\xa0")

codecs.register_error("bad_byte", lambda error: (BAD_BYTE, getattr(error, "end", 0)))


class TextEncoding(NamedTuple):
    codec: str = "utf-8"
    malformed_reason: str = "malformed UTF-8"  # reason for bad rows; {file} is replaced by the file name

    @property
    def name(self) -> str:
        return ENCODING_NAMES.get(self.codec, self.codec)


UTF8 = TextEncoding()


def detect_encoding(sample: bytes) -> TextEncoding:
    """Detects the encoding of a file from its first bytes, which should end at a line end."""
    for mark, codec in _BOMS:
        if sample.startswith(mark):
            return _known_encoding(codec)
    if (zeros := sample.count(0)) and zeros > len(sample) // 100:
        return next((_known_encoding(codec) for codec in ("utf-16-le", "utf-16-be") if _is_utf16(sample, codec)), UTF8)
    text = sample.decode("utf-8", "surrogateescape")
    malformed = len(re.findall("[\udc80-\udcff]", text))
    if malformed <= len(re.findall("[^\0-\x7f\udc80-\udcff]", text)):
        return UTF8
    lines = [line for line in sample.split(b"\n") if not line.isascii()]
    if sum(not _is_utf8(line) for line in lines) <= MAX_MALFORMED_FRACTION * sample.count(b"\n"):
        return UTF8
    foreign = b"\n".join(lines)[:SAMPLE_BYTES]
    guess = from_bytes(foreign, cp_isolation=_GUESSES).best()  # None if a byte is malformed in each of them
    codec = guess.encoding if guess else ""
    if codec in ("cp1252", "cp1250") and _is_western(foreign):  # the two differ little in such text
        return _known_encoding("cp1252")
    for chinese in ("gb18030", "cp950"):
        if _is_chinese(foreign, chinese):
            return _known_encoding(chinese)
    if not codec:
        return UTF8
    name = ENCODING_NAMES[codec]
    return TextEncoding("utf-8", f"malformed UTF-8, perhaps {name}: iconv -f {name} -t UTF-8 {{file}} > NEW_FILE")


def utf8_reader(stream: Any, codec: str, old_mac: bool = False) -> Callable[[], bytes | None]:
    """Returns a function that returns the next chunk of `stream` as UTF-8, None at the end.

    `old_mac`: carriage returns are line ends and become line feeds.
    """
    decode = codecs.getincrementaldecoder(codec)("bad_byte").decode

    def next_chunk() -> bytes | None:
        chunk = stream.read1(SAMPLE_BYTES)
        text = decode(chunk, not chunk)
        if old_mac:
            text = text.replace("\r", "\n")
        return text.encode("utf-8", "surrogateescape") if chunk or text else None

    return next_chunk


def _known_encoding(codec: str) -> TextEncoding:
    return TextEncoding(codec, f"malformed {ENCODING_NAMES[codec]}")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_utf16(sample: bytes, codec: str) -> bool:
    """True if nearly all decoded characters are Chinese or Western; a wrong codec gives characters of any script."""
    text = sample[: len(sample) // 2 * 2].decode(codec, "bad_byte")
    usual = len(re.findall("[\t\n\r -~\xa0-\u04ff\u2010-\u206f\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]", text))
    return len(text) > 1 and usual >= 0.95 * len(text)


def _is_western(sample: bytes) -> bool:
    """True if bytes above 0x7F are mostly isolated, and letters or punctuation of Western text."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    text = b"".join(runs).decode("cp1252", "bad_byte")
    num_single = sum(len(run) == 1 for run in runs)
    return num_single >= 0.8 * len(runs) and sum(c in _WESTERN for c in text) >= 0.9 * len(text)


def _is_chinese(sample: bytes, codec: str) -> bool:
    """True if nearly all characters are level 1 of the standard, and many are among the 200 most frequent."""
    wide = [c for c in sample.decode(codec, "bad_byte") if c > "\x7f"]
    leads = [c.encode(codec, "surrogateescape")[0] for c in wide]
    low, high = ((0xA1, 0xA3), (0xB0, 0xD7)) if codec == "gb18030" else ((0xA1, 0xA3), (0xA4, 0xC6))
    standard = sum(low[0] <= lead <= low[1] or high[0] <= lead <= high[1] for lead in leads)
    letters = [c for c in wide if "\u4e00" <= c <= "\u9fff"]
    frequent = sum(c in _FREQUENT for c in letters)
    return len(letters) >= 4 and standard >= 0.9 * len(wide) and frequent >= 0.25 * len(letters)
