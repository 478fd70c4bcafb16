"""The built-in demo world, part 4: reading the wordings, and filling a fact into one of them.

    "The capital of {s} is {o}."  +  Fact(s=France, o=Paris)  ->  "The capital of France is Paris."

Read next: generator.py (what is composed of it); the format is described in wordings_en.py.
"""

from dataclasses import dataclass, field

from demo_world.facts import Fact


@dataclass
class Wordings:
    """The wordings of one relation; the fields are the labels of demo_wordings_en."""

    topic: str
    say: list[str] = field(default_factory=list)
    cue: list[str] = field(default_factory=list)
    back_cue: list[str] = field(default_factory=list)
    ask: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)
    back_held: list[str] = field(default_factory=list)
    back_answer: list[str] = field(default_factory=list)
    follow: list[str] = field(default_factory=list)

    def taught(self) -> list[tuple[list[str], list[str]]]:
        """(questions, answers) of both directions."""
        return [(self.ask, self.answer), (self.back, self.back_answer)]


def options(text: str) -> list[str]:
    return [option.strip() for option in text.strip().split("|")]


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def read_wordings(text: str) -> dict[str, Wordings]:
    """{relation: Wordings} from the plain-text grammar."""
    relations: dict[str, Wordings] = {}
    for line in lines(text):
        if line.startswith("["):
            name, topic = line[1:].split("] ")
            current = relations[name] = Wordings(topic)
        elif line:
            label, wordings = line.split(": ", 1)
            getattr(current, label).extend(options(wordings))
    for wordings_of in relations.values():
        wordings_of.back_answer = wordings_of.back_answer or wordings_of.answer
        # What can be answered is also said, so that an answer continues as the texts taught it.
        wordings_of.say += [t for t in wordings_of.answer + wordings_of.back_answer if t not in wordings_of.say]
    return relations


def fill(template: str, fact: Fact) -> str:
    return template.format(**fact.slots)
