"""Detects the format of an open file from its first bytes and, if these are ambiguous, from its name.

    sniff_format(input_file) -> "jsonl" | "json" | "csv" | "parquet" | "arrow" | "txt"

    jsonl    a JSON value on each line (an object, or the messages of a chat as a list), perhaps with a trailing comma
    json     other JSON: an array, objects over several lines, one object that wraps the rows

Read next: readers.py (readers by format).
"""

import codecs
import json
import re
from typing import Any

from common.errors import UserError
from corpus.input_files import READ_CHUNK_BYTES, SUFFIX_FORMATS, InputFile
from corpus.json_reader import CHAT_LIST_KEYS, parse_loose_json
from corpus.json_stream import has_message_keys
from corpus.layouts import FIELD_KEYS

_HEADER_KEYS = {key for keys in FIELD_KEYS.values() for key in keys}
_LIST_KEYS = "|".join((*CHAT_LIST_KEYS, "dialogues")).encode()
_OBJECT = re.compile(rb'\s*\{\s*("[^"\n]*"\s*:|\})')
_WRAPPED = re.compile(  # one object that wraps the rows: {"version": 1, "data": [{"text": ...
    rb'\s*\{\s*(?:"[^"]*"\s*:\s*(?:"[^"]*"|[-+.\w]+)\s*,\s*)*"(?!(?:' + _LIST_KEYS + rb')")[^"]+"\s*:\s*[\[{]'
)


def sniff_format(input_file: InputFile) -> str:
    """Returns the name of the format. Raises UserError for a zip or tar archive or an Excel workbook."""
    head = input_file.head()
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head.startswith(b"\xd0\xcf\x11\xe0") or (
        head.startswith(b"PK\x03\x04") and input_file.suffix.startswith(".xls")
    ):
        raise UserError(f"{input_file.name} is an Excel workbook: save its sheet as CSV UTF-8 and name that file")
    if head.startswith(b"PK\x03\x04") or head[257:262] == b"ustar":
        raise UserError(f"{input_file.name} is a zip or tar archive: unpack it first")
    if head.startswith(codecs.BOM_UTF8):
        input_file.stream.readline(3)
        head = head[3:]
    named = SUFFIX_FORMATS.get(input_file.suffix, "txt")
    first, _, rest = head.lstrip().partition(b"\n")
    file_format = _sniff_json(head.lstrip(), named, len(head) < READ_CHUNK_BYTES)
    if file_format:
        return file_format
    if _OBJECT.match(first):
        return "jsonl"
    columns = [cell.strip(b'" \r').lower() for cell in re.split(rb"[,;\t|]", first)]
    if named == "csv" or (
        len(columns) > 1 and all(cell.decode("utf-8", "replace") in _HEADER_KEYS for cell in columns)
    ):
        return "csv"
    if named == "txt" and input_file.suffix not in (".txt", ".md") and any(map(_OBJECT.match, rest.split(b"\n")[:20])):
        return "jsonl"
    return "json" if named == "jsonl" and _is_damaged_json(head) else named


def _is_damaged_json(head: bytes) -> bool:
    """True if text contains JSON objects but neither begins as JSON nor has one per line: its start is damaged."""
    lines = [line for line in head.split(b"\n") if line.strip()][:21]
    if any(isinstance(_parse_or_none(line), (dict, list)) for line in lines):
        return False
    objects = sum(_OBJECT.match(line) is not None for line in lines)
    return len(re.findall(rb'\{\s{0,9}"[^"\n]{0,99}"\s{0,9}:', head)) > max(1, 2 * objects)


def _sniff_json(head: bytes, named: str, is_whole_file: bool) -> str:
    """Returns "jsonl", "json", or "" if the first bytes are ambiguous. `is_whole_file`: `head` is the whole file."""
    if not head.startswith((b"{", b"[")):
        return ""
    lines = [line for line in head.split(b"\n") if not line.isspace() and line][:21]
    first, others = lines[0], lines[1:]
    if not others and (_has_more_objects(first) or (named == "jsonl" and _is_damaged_json(head))):
        return "json"
    if not others and not is_whole_file and b"\n" not in head:  # a line longer than the head
        array = re.match(rb"\[\s*(\[\s*)?\{", head)
        return "json" if array or _WRAPPED.match(head) else ""
    value = _parse_or_none(first)
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], (dict, list))):
        return "jsonl" if others else "json"
    second = _parse_or_none(others[0]) if others else None
    if isinstance(second, dict) and not (head.startswith(b"[") and has_message_keys(second)):
        return "jsonl"
    if head.startswith(b"["):
        return "json" if re.match(rb"\[\s*\{" if named == "txt" else rb'\[\s*([\[{"\]]|$)', head) else ""
    if any(line.startswith(b"{") and isinstance(value := _parse_or_none(line), dict) and value for line in others):
        return "jsonl"
    if _WRAPPED.match(head) and _is_damaged_json(head):  # an object that wraps the rows, with an extra line feed
        return "json"
    if first.strip() == b"{":
        return "json" if named == "jsonl" or (others and re.match(rb'\s*"[^"]*"\s*:', others[0])) else ""
    return "json" if _OBJECT.match(first) and others and re.match(rb'\s+["}\]]|[}\]]', others[0]) else ""


def _has_more_objects(line: bytes) -> bool:
    """True if a line begins with an object, a comma and another object."""
    text = line.decode("utf-8", "surrogateescape")
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return re.match(r"\s*,\s*\{", text[end:]) is not None


def _parse_or_none(line: bytes) -> Any:
    try:
        return parse_loose_json(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
