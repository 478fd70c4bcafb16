"""The built-in demo world, part 1: true facts in English and Chinese, read from data/facts.txt.

    [countries] country, capital, continent          one relation per column after the first
    France/法国, Paris/巴黎, Europe/欧洲             -> capital: s=France, o=Paris; continent: s=France, o=Europe

A cell `English/中文` holds both languages; any other cell is used in both. `-`: the column does not apply to the row. A
section or column whose name ends in ` en` or ` zh` belongs to that language only. Two columns are special: `u` fills
the slot {u} (a unit) of the relation before it; `...` allows any number of cells, all of them further correct answers.
Several sections may hold the same relation. Lines that begin with # are comments.

All files in data/ share the `[section]` lines and the comments; a malformed line raises a UserError that names file
and line. Nothing here is random; generator.py makes the random choices.

Read next: grammar.py (sentence templates), generator.py (composes the texts).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from corpus.language import LANGUAGES

DATA = Path(__file__).parent / "data"
FACTS_FILE = DATA / "facts.txt"
LARGEST_TERM = 20  # the sums are 1 + 1 to 20 + 20


@dataclass
class Section:
    """A `[name] heading` line of a data file, its line number, and the numbered lines below it."""

    path: Path
    name: str
    heading: str
    number: int
    lines: list[tuple[int, str]] = field(default_factory=list)

    def error(self, number: int, message: str) -> UserError:
        return UserError(f"{self.path}:{number}: {message}")


def read_sections(path: Path) -> list[Section]:
    """Return the sections of a data file (UTF-8), without comments and empty lines. Raises UserError if malformed."""
    sections: dict[str, Section] = {}
    current: Section | None = None
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{number}: not UTF-8: save the file as UTF-8") from None
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if line.startswith("["):
            found = re.fullmatch(r"\[(\w+(?: en| zh)?)\]\s*(.*)", line)
            if not found:
                raise UserError(f"{path}:{number}: not a section: write [name] heading")
            if found[1] in sections:
                raise UserError(f"{path}:{number}: a second section [{found[1]}]: rename or remove it")
            current = sections[found[1]] = Section(path, found[1], found[2], number)
        elif line and not line.startswith("#"):
            if current is None:
                raise UserError(f"{path}:{number}: a line before the first [section]: add a [section] line above it")
            current.lines.append((number, line))
    return list(sections.values())


class Term(str):
    """A string with English forms: {s}, {s:a} (with a or an), {s:pl} (plural); {s:C} {s:A} {s:Pl} are capitalized."""

    plural: str

    def __new__(cls, text: str) -> "Term":
        singular, _, plural = text.partition(">")  # mouse>mice: an irregular plural
        word = super().__new__(cls, singular)
        word.plural = plural or re.sub("(?<=[^aeiou])y$", "ie", singular) + (
            "es" if singular.endswith(("s", "x", "ch", "sh")) else "s"
        )
        return word

    def __format__(self, form: str) -> str:
        article = "an " if self[:1].lower() in "aeiou" else "a "
        text = {"": str(self), "c": str(self), "a": article + self, "pl": self.plural}[form.lower()]
        return text[:1].upper() + text[1:] if form[:1].isupper() else text


@dataclass(frozen=True)
class Fact:
    """One fact. `slots` fill the templates. A correct answer to a question about slot `o` contains one of `keys`."""

    relation: str
    slots: dict[str, Term]
    keys: tuple[str, ...]
    back_keys: tuple[str, ...]  # the same for a question about slot `s`

    @property
    def name(self) -> tuple[str, ...]:
        return (self.relation, *self.slots.values())


def facts_of(lang: str, path: Path = FACTS_FILE) -> list[Fact]:
    """Return the facts of one language ("en" or "zh"), in the order of the file.

    Sums, products and the name of the model follow. Raises UserError for a malformed line.
    """
    facts = [fact for section in read_sections(path) for fact in _facts_of_section(section, lang)]
    facts += _arithmetic()
    facts.append(_fact("me", "", "萌芽" if lang == "zh" else "Mengya"))
    return facts


def _fact(relation: str, s: str, o: str, keys: tuple[str, ...] = (), **more: str) -> Fact:
    slots = {name: Term(text) for name, text in {"s": s, "o": o, **more}.items()}
    return Fact(relation, slots, keys or (str(slots["o"]),), (str(slots["s"]),))


def _facts_of_section(section: Section, lang: str) -> Iterator[Fact]:
    """Yield the facts of a section in one language. Checks the rows also if the section is for the other language."""
    columns = [column.strip() for column in section.heading.split(",")]
    if len(columns) < 2 or not all(re.fullmatch(r"\w+( en| zh)?|\.\.\.", column) for column in columns[1:]):
        raise section.error(section.number, "write [name] subject, relation, ...; a relation is a word (and en or zh)")
    for number, line in section.lines:
        cells = _cells(section, number, line, columns)
        if _applies_to(section.name, lang):
            yield from _facts_of_row(columns, [_in_language(cell, lang) for cell in cells], lang)


def _cells(section: Section, number: int, line: str, columns: list[str]) -> list[str]:
    cells = [cell.strip() for cell in line.split(",")]
    fixed = len(columns) - (columns[-1] == "...")
    if len(cells) < fixed or (len(cells) > fixed and columns[-1] != "..."):
        raise section.error(number, f"{len(cells)} cells, but {fixed} columns in [{section.name}] {', '.join(columns)}")
    for cell in cells:
        if not all(cell.split("/")) or cell.count("/") > 1:
            raise section.error(number, f"invalid cell {cell!r}: write English/中文, one text for both, or -")
    return cells


def _applies_to(name: str, lang: str) -> bool:
    """Whether a section or column applies to the language: its name ends with this language or with none."""
    suffix = name.partition(" ")[2]
    return suffix == lang or suffix not in LANGUAGES


def _in_language(cell: str, lang: str) -> str:
    return (cell.split("/") * 2)[lang == "zh"]


def _facts_of_row(columns: list[str], cells: list[str], lang: str) -> Iterator[Fact]:
    subject = cells[0]
    for i, (column, cell) in enumerate(zip(columns[1:], cells[1:], strict=False), start=1):
        if column in ("u", "...") or cell == "-" or not _applies_to(column, lang):
            continue
        relation = column.partition(" ")[0]
        more = {"u": cells[i + 1]} if columns[i + 1 : i + 2] == ["u"] else {}
        others = cells[i + 1 :] if columns[i + 1 :] == ["..."] else []
        yield _fact(relation, subject, cell, _keys(relation, lang, [cell, *others]), **more)
        if relation == "opposite":
            yield _fact(relation, cell, subject, _keys(relation, lang, [subject]))


def _keys(relation: str, lang: str, objects: list[str]) -> tuple[str, ...]:
    """Return the texts of which a correct answer contains at least one."""
    if relation == "measure":  # 一本, because 本 alone occurs in many sentences
        return tuple(f"一{measure}" for measure in objects)
    if relation == "opposite" and lang == "zh":
        return (f"“{objects[0]}”", f"是{objects[0]}")
    return tuple(str(Term(text)) for text in objects)


def _arithmetic() -> Iterator[Fact]:
    for a in range(1, LARGEST_TERM + 1):
        for b in range(1, LARGEST_TERM + 1):
            yield _fact("sum", "", str(a + b), a=str(a), b=str(b))
            if 1 < a < 10 and 1 < b < 10 and a * b <= 30:
                yield _fact("product", "", str(a * b), a=str(a), b=str(b))
