"""The built-in demo world, part 2: reads the sentence templates and fills facts into them.

    "The capital of {s} is {o}."  +  Fact(s=France, o=Paris)  ->  "The capital of France is Paris."

The text files in data/ come in one set per language (XX is en or zh). They contain `[section]` lines, # comments and:

    templates_XX.txt     [relation] topic      label: template | template     the labels are the fields of Templates
    small_talk_XX.txt    [name]                label: text | text             the labels are the fields of Questions
    identity_XX.txt      [name]                label: text | text             the labels are the fields of Questions
    arithmetic_XX.txt    [relation]            label: template | template     the same; {a} {b} {c}: terms, {o}: result
    phrases_XX.txt       [name]                sentence | sentence            sections and their slots: PHRASES

A label may have several lines. `(I/You) have {a}` stands for both texts, `I have {a}` and `You have {a}`; several
parentheses stand for all combinations. A malformed line raises a UserError that names file and line.

Read next: generator.py (composes the texts).
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from common.errors import UserError
from demo_world.facts import DATA, Fact, Section, Term, read_sections

PHRASES = {  # {section of phrases_XX.txt: slots that its sentences may use}
    "wrappers": "q",
    "lead_ins": "t",
    "stories": "n topic t",
    "observations": "n m c t",
    "dialogues": "n m q a",
    "repeat_requests": "w",
    "repeat_answer": "w",
    "recital_requests": "",
    "rude_answers": "",
    "names": "",
    "words": "",
}
CHINESE_ONLY = "words"
NEEDED_LABELS = {
    "small_talk": ("ask", "answer"),
    "identity": ("ask", "answer", "heldout", "keys"),
    "arithmetic": ("ask", "answer", "heldout"),
}
QUESTION_SLOTS = {"arithmetic": "a b c o"}  # numbers and result
GREETINGS = ("hello", "thanks", "goodbye")  # required sections of small_talk_XX.txt: openings and endings of chats


@dataclass
class Templates:
    """The templates of one relation. Each field except `topic` is a label of templates_XX.txt, explained there."""

    topic: str
    say: list[str] = field(default_factory=list)
    cue: list[str] = field(default_factory=list)
    back_cue: list[str] = field(default_factory=list)
    ask: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    back_ask: list[str] = field(default_factory=list)
    back_heldout: list[str] = field(default_factory=list)
    back_answer: list[str] = field(default_factory=list)
    follow_up: list[str] = field(default_factory=list)

    def train_templates(self) -> list[tuple[list[str], list[str]]]:
        """Returns (question templates, answer templates) for training: subject -> object, then object -> subject."""
        return [(self.ask, self.answer), (self.back_ask, self.back_answer)]

    def heldout_templates(self) -> list[list[str]]:
        """Returns question templates for evaluation: subject -> object, then object -> subject."""
        return [self.heldout, self.back_heldout]


@dataclass
class Questions:
    """Questions and their answers, with the slots of QUESTION_SLOTS; a correct answer contains one of `keys`."""

    ask: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def read_templates(lang: str, facts: Iterable[Fact], folder: Path = DATA) -> dict[str, Templates]:
    """Returns {relation: Templates}. A template may use only the slots of the facts of its relation.

    Raises UserError for a malformed line or a missing relation.
    """
    path = folder / f"templates_{lang}.txt"
    fact_by_relation = {fact.relation: fact for fact in facts}
    labels = [label.name for label in fields(Templates) if label.name != "topic"]
    relations: dict[str, Templates] = {}
    for section in read_sections(path):
        if section.name not in fact_by_relation:
            raise section.error(section.number, f"no fact has the relation [{section.name}]")
        if not section.heading:
            raise section.error(section.number, "write the topic of the relation after its name")
        slots = fact_by_relation[section.name].slots
        templates = Templates(section.heading, **_labelled(section, labels, slots, ("say", "answer")))
        relations[section.name] = templates
        templates.back_answer = templates.back_answer or list(templates.answer)
        # Answers are statements too: pretraining contains every sentence that SFT trains as an answer.
        templates.say += [t for t in templates.answer + templates.back_answer if t not in templates.say]
    _require(path, fact_by_relation, relations)
    return relations


def read_questions(name: str, lang: str, folder: Path = DATA) -> dict[str, Questions]:
    """Returns {section: Questions}; `name` is a key of NEEDED_LABELS. Raises UserError for a malformed line."""
    path = folder / f"{name}_{lang}.txt"
    labels, needed = [label.name for label in fields(Questions)], NEEDED_LABELS[name]
    slots = {slot: Term(slot) for slot in QUESTION_SLOTS.get(name, "").split()}
    found = {section.name: Questions(**_labelled(section, labels, slots, needed)) for section in read_sections(path)}
    _require(path, GREETINGS if name == "small_talk" else (), found)
    return found


def read_phrases(lang: str, folder: Path = DATA) -> dict[str, list[str]]:
    """Returns {section: sentences} of phrases_XX.txt. Raises UserError for a malformed line."""
    path = folder / f"phrases_{lang}.txt"
    phrases: dict[str, list[str]] = {}
    for section in read_sections(path):
        if section.name not in PHRASES or section.heading:
            raise section.error(section.number, f"unknown section [{section.name}]; write one of {', '.join(PHRASES)}")
        slots = {slot: Term(slot) for slot in PHRASES[section.name].split()}
        phrases[section.name] = [t for number, line in section.lines for t in _items(section, number, line, slots)]
        if not phrases[section.name]:
            raise section.error(section.number, f"section [{section.name}] is empty: add a sentence")
    _require(path, [name for name in PHRASES if name != CHINESE_ONLY or lang == "zh"], phrases)
    return phrases


def _labelled(
    section: Section, labels: list[str], slots: dict[str, Term], needed: tuple[str, ...]
) -> dict[str, list[str]]:
    """Returns {label: items} of the lines `label: item | item`. Raises UserError if a `needed` label is missing."""
    found: dict[str, list[str]] = {}
    for number, line in section.lines:
        label, separator, text = line.partition(": ")
        if not separator or label not in labels:
            raise section.error(number, f"{label[:20]!r} is not a label; write one of {', '.join(labels)}, then ': '")
        found.setdefault(label, []).extend(_items(section, number, text, slots))
    for label in needed:
        if label not in found:
            raise section.error(section.number, f"[{section.name}] has no line '{label}: ...': add one")
    return found


def _items(section: Section, number: int, text: str, slots: dict[str, Term]) -> Iterator[str]:
    """Yields the texts of a line, separated by |. Raises UserError for a text with an unknown slot."""
    for item in (choice.strip() for part in text.split("|") for choice in alternatives(part)):
        if "(" in item or ")" in item:
            raise section.error(number, f"a parenthesis without its other half in {item!r}")
        if not item:
            raise section.error(number, "an empty text: write something on both sides of each |")
        try:
            item.format(**slots)
        except (KeyError, ValueError, IndexError):
            names = " ".join(f"{{{slot}}}" for slot in slots) or "none"
            raise section.error(number, f"wrong slot or brace in {item!r}; slots here: {names}") from None
        yield item


def alternatives(text: str) -> list[str]:
    """Returns all texts that `(x/y)` in a text stands for: "(a/b)c(d/e)" -> acd, ace, bcd, bce."""
    parts = [part.split("/") if i % 2 else [part] for i, part in enumerate(re.split(r"\(([^()]*)\)", text))]
    return ["".join(choice) for choice in itertools.product(*parts)]


def _require(path: Path, needed: Iterable[str], found: Iterable[str]) -> None:
    missing = sorted(set(needed) - set(found))
    if missing:
        raise UserError(f"{path}: no section [{missing[0]}]: add it")


def fill(template: str, fact: Fact) -> str:
    """Returns the template with its slots replaced by the terms of the fact."""
    return template.format(**fact.slots)
