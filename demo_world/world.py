"""The demo world in one language: facts, documents, chats and questions, sampled with a seed.

    DemoWorld("en", seed=0).texts(rounds)        documents for pretraining
    DemoWorld("en", seed=0).chats(rounds)        chats for fine-tuning: lists of (question, answer)
    DemoWorld("en", seed=0).questions(count)     questions with held-out templates

Read next: generator.py (writes the files), facts.py and grammar.py (the data files).
"""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from demo_world.facts import LARGEST_TERM, Fact, facts_of
from demo_world.grammar import GREETINGS, Questions, fill, read_phrases, read_questions, read_templates
from evaluation.qa_data import is_correct

UNASKED_SHARE = 0.1  # fraction of the facts of each relation that pretraining states and the chats leave out
NEW_SUMS = 25  # pairs of terms that no training text adds, in no order and neither language
SUM_SHARE = 0.25  # fraction of the other sums that a round of pretraining states: they are a third of all facts
ASKED_SUM_SHARE = 0.5  # the same, for a round of the chats
RECITALS = 3  # how often the chats state each fact: else SFT would overwrite those that no chat asks about
SMALLEST_SPLIT = 10  # relations with fewer facts have no unasked facts: too few examples to learn the question
# How successive rounds of pretraining group and phrase the facts.
GROUPINGS = ("any", "observation", "dialogue", "relation", "dialogue", "observation", "dialogue", "subject")
EQUATION_SHARE = 0.8  # how often equations state each sum, as a fraction of the rounds
STORY_SHARE = 0.35  # probability of a story, for a document about one relation
# Probability of one statement per line. An English word has another token at the beginning of a line, where questions
# have it too; inside a text a space precedes it.
LINES_SHARE = {"zh": 0.2, "en": 0.6}
LEAD_SHARE = 0.15  # probability of a lead-in before a statement
FOLLOW_SHARE, GREETING_SHARE = 0.15, 0.08  # probability of a follow-up question; of a greeting at either end

Turn = tuple[str, str]  # question, answer


def terms(fact: Fact) -> tuple[int, int]:
    """The smaller and the larger term of a sum."""
    a, b = sorted((int(fact.slots["a"]), int(fact.slots["b"])))
    return a, b


def choose_new_sums(seed: int) -> set[tuple[int, int]]:
    """Pairs of terms (smaller, larger) that neither language trains: a model can only compute these sums.

    At least one term has two digits: all sums of digits are trained, the others build on them. Every combination of
    last digits loses at most one pair.
    """
    of_last_digits: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for b in range(10, LARGEST_TERM + 1):
        for a in range(1, b + 1):
            of_last_digits[tuple(sorted((a % 10, b % 10)))].append((a, b))
    rng = random.Random(f"{seed} sums")
    return {rng.choice(pairs) for pairs in rng.sample(list(of_last_digits.values()), NEW_SUMS)}


class DemoWorld:
    """One language of the demo world. `seed` determines every random choice."""

    def __init__(self, lang: str, seed: int) -> None:
        self.lang = lang
        self.rng = random.Random(f"{seed} {lang}")
        self.gap, self.comma = ("", "、") if lang == "zh" else (" ", ", ")
        facts, new = facts_of(lang), choose_new_sums(seed)
        self.new_sums = [fact for fact in facts if fact.relation == "sum" and terms(fact) in new]
        self.facts = [fact for fact in facts if fact.relation != "sum" or terms(fact) not in new]
        self.templates = read_templates(lang, self.facts)
        self.phrases, self.small_talk = read_phrases(lang), read_questions("small_talk", lang)
        self.unasked = self._choose_unasked()

    def _choose_unasked(self) -> set[tuple[str, ...]]:
        """Names of the facts that the chats leave out. Mirrored facts (3 + 4 and 4 + 3, opposites) stay together."""
        groups: dict[str, dict[tuple[str, ...], list[Fact]]] = defaultdict(lambda: defaultdict(list))
        for fact in self.facts:
            groups[fact.relation][tuple(sorted(fact.slots.values()))].append(fact)
        chosen: set[tuple[str, ...]] = set()
        for relation, group in groups.items():
            if len(group) >= SMALLEST_SPLIT and relation != "sum":  # sums have `new_sums` instead
                for facts in self.rng.sample(list(group.values()), round(UNASKED_SHARE * len(group))):
                    chosen.update(fact.name for fact in facts)
        return chosen

    # ---- pretraining: statements

    def texts(self, rounds: int) -> Iterator[str]:
        """Documents of 2 to 5 statements. Each round states every fact once, with its own templates and grouping."""
        first = [self.rng.randrange(100) for _ in self.facts]
        makers = {"observation": self._observation, "dialogue": self._dialogue}
        made: Counter[Any] = Counter()  # rounds of each maker: it cycles through its templates
        for number in range(rounds):
            grouping = GROUPINGS[number % len(GROUPINGS)]
            make = makers.get(grouping, self._statement)
            groups: dict[str, list[tuple[Fact, str]]] = defaultdict(list)
            for fact, offset in zip(self.facts, first, strict=True):
                if self._is_left_out(fact):
                    continue
                group = {"relation": fact.relation, "subject": fact.slots["s"] or fact.relation}.get(grouping, "")
                groups[group].append((fact, make(fact, offset + made[make])))
            made[make] += 1
            names = list(groups)
            self.rng.shuffle(names)
            for name in names:
                self.rng.shuffle(groups[name])
            yield from self._documents([pair for name in names for pair in groups[name]])
        yield from self._equations(round(EQUATION_SHARE * rounds))

    def _is_left_out(self, fact: Fact) -> bool:
        """Whether a round leaves out this fact: most of the sums, by chance."""
        return fact.relation == "sum" and self.rng.random() >= SUM_SHARE

    def _equations(self, rounds: int) -> Iterator[str]:
        """Documents of sums in one short form: a model learns to add from many sums, not from many sentences.

        Sums of two digits, a quarter of all, occur twice as often.
        """
        sums = [fact for fact in self.facts if fact.relation == "sum"]
        sums += [fact for fact in sums if terms(fact)[1] < 10]
        form = self.templates["sum"].answer[0]
        equations = [fill(form, fact) for _ in range(rounds) for fact in self.rng.sample(sums, len(sums))]
        while equations:
            length = self.rng.randint(4, 12)
            yield self.gap.join(equations[:length])
            del equations[:length]

    def _statement(self, fact: Fact, number: int) -> str:
        say = self.templates[fact.relation].say
        statement = fill(say[number % len(say)], fact)
        if self.rng.random() >= LEAD_SHARE:
            return statement
        return self.rng.choice(self.phrases["lead_ins"]).format(t=statement)

    def _observation(self, fact: Fact, number: int) -> str:
        """A noun phrase for the object, then a full sentence that states the fact.

        This trains in plain text what a question needs later: resolve the phrase, then answer in a sentence.
        """
        templates = self.templates[fact.relation]
        ways = [(cue, templates.answer) for cue in templates.cue] + [
            (cue, templates.back_answer) for cue in templates.back_cue
        ]
        if not ways:
            return self._statement(fact, number)
        cue, answers = ways[number % len(ways)]
        observation, names = self.rng.choice(self.phrases["observations"]), self.rng.sample(self.phrases["names"], 2)
        return observation.format(n=names[0], m=names[1], c=fill(cue, fact), t=fill(self.rng.choice(answers), fact))

    def _dialogue(self, fact: Fact, number: int) -> str:
        """A training question and its answer inside a text; an unasked fact becomes an observation."""
        templates = self.templates[fact.relation]
        ways = [(asks, answers) for asks, answers in templates.train_templates() if asks]
        if fact.name in self.unasked:
            return self._observation(fact, number)
        asks, answers = ways[number % len(ways)]
        dialogue, names = self.rng.choice(self.phrases["dialogues"]), self.rng.sample(self.phrases["names"], 2)
        question, answer = fill(asks[number // len(ways) % len(asks)], fact), fill(self.rng.choice(answers), fact)
        return dialogue.format(n=names[0], m=names[1], q=question, a=answer)

    def _documents(self, statements: list[tuple[Fact, str]]) -> Iterator[str]:
        """Cut (fact, statement) pairs into documents of 2 to 5 statements; those of one relation may be stories."""
        start = 0
        while start < len(statements):
            part = statements[start : start + self.rng.randint(2, 5)]
            start += len(part)
            sentences = [sentence for _, sentence in part]
            relations = {fact.relation for fact, _ in part}
            if len(relations) == 1 and self.rng.random() < STORY_SHARE:
                story = self.rng.choice(self.phrases["stories"])
                name = self.rng.choice(self.phrases["names"])
                topic = self.templates[relations.pop()].topic
                yield story.format(n=name, topic=topic, t=self.gap.join(sentences))
            else:
                gap = "\n" if self.rng.random() < LINES_SHARE[self.lang] else self.gap
                yield gap.join(sentences)

    # ---- tokenizer: text split into words

    def split_words(self, text: str) -> str:
        """The text with a line break after every word. Chinese words are the names of the facts and a list of words."""
        if self.lang == "en":
            return re.sub(r"(?<=\S)(?= )", "\n", text)
        return "\n".join(self.chinese_words.findall(text))

    @cached_property
    def chinese_words(self) -> re.Pattern[str]:
        names = {str(word) for fact in self.facts for word in fact.slots.values()} - {""}
        names.update(self.phrases["names"], self.phrases["words"])
        return re.compile("|".join(sorted(names, key=lambda name: (-len(name), name))) + "|.")

    # ---- chats: questions from the training templates

    def turns(self, rounds: int) -> list[tuple[Fact, bool, Turn]]:
        """(fact, is_forward, (question, answer)): each asked fact `rounds` times per direction, shuffled."""
        wrappers = self.phrases["wrappers"]
        found = []
        for fact in self.facts:
            if fact.name in self.unasked:
                continue
            templates = self.templates[fact.relation]
            for asks, answers in templates.train_templates():
                times = {"me": 8 * rounds, "sum": math.ceil(ASKED_SUM_SHARE * rounds)}.get(fact.relation, rounds)
                offset = self.rng.randrange(100)
                for number in range(times if asks else 0):
                    question = fill(asks[(offset + number) % len(asks)], fact)
                    question = self.rng.choice(wrappers).format(q=question)
                    found.append((fact, asks is templates.ask, (question, fill(self.rng.choice(answers), fact))))
        self.rng.shuffle(found)
        return found

    def chats(self, rounds: int) -> Iterator[list[Turn]]:
        """Conversations of 1 to 5 turns: `turns`, follow-up questions, greetings; then small talk and repetitions."""
        hello, thanks, goodbye = (self.small_talk[name] for name in GREETINGS)

        def one_of(kind: Questions) -> Turn:
            return self.rng.choice(kind.ask), self.rng.choice(kind.answer)

        asked: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            if fact.name not in self.unasked:
                asked[fact.relation].append(fact)
        queue = self.turns(rounds)
        while queue:
            chat = [one_of(hello)] if self.rng.random() < GREETING_SHARE else []
            for _ in range(min(len(queue), self.rng.choice((1, 1, 1, 2)))):
                fact, forward, turn = queue.pop()
                chat.append(turn)
            templates = self.templates[fact.relation]
            other = self.rng.choice(asked[fact.relation])
            if forward and templates.follow_up and other != fact and self.rng.random() < FOLLOW_SHARE:
                chat.append(
                    (fill(self.rng.choice(templates.follow_up), other), fill(self.rng.choice(templates.answer), other))
                )
            if self.rng.random() < GREETING_SHARE:
                chat.append(one_of(self.rng.choice((thanks, goodbye))))
            yield chat
        for kind in self.small_talk.values():
            yield from ([one_of(kind)] for _ in range(2 * rounds))
        yield from ([turn] for turn in self.repetitions())
        yield from ([turn] for turn in self.recitals())

    def recitals(self) -> Iterator[Turn]:
        """Requests to say anything, answered by 2 to 4 statements. They replay facts and ask about none."""
        for number in range(RECITALS):
            facts = [fact for fact in self.facts if not self._is_left_out(fact)]
            self.rng.shuffle(facts)
            while facts:
                part = [facts.pop() for _ in range(min(len(facts), self.rng.randint(2, 4)))]
                templates = (self.templates[fact.relation] for fact in part)
                answers = [self.rng.choice((t.answer, t.back_answer)[number % 2]) for t in templates]
                statements = (fill(answer, fact) for answer, fact in zip(answers, part, strict=True))
                yield self.rng.choice(self.phrases["recital_requests"]), self.gap.join(statements)

    def repetitions(self) -> Iterator[Turn]:
        """Requests to repeat words: each subject and object occurs once in an answer.

        Without them the chats would lower the probability of the names of unasked facts.
        """
        names = sorted({str(fact.slots[slot]) for fact in self.facts for slot in "so"} - {""})
        self.rng.shuffle(names)
        while names:
            words = self.comma.join(names.pop() for _ in range(min(len(names), self.rng.randint(1, 3))))
            request, answer = self.rng.choice(self.phrases["repeat_requests"]), self.phrases["repeat_answer"][0]
            yield request.format(w=words), answer.format(w=words)

    # ---- evaluation: questions from the held-out templates

    def questions(self, count: int) -> list[dict[str, Any]]:
        """At most `count` questions, a uniform sample of one per direction of each fact; then one per new sum."""
        rows: list[dict[str, Any]] = []
        for fact in self.facts:
            if self._is_left_out(fact):
                continue
            kind = ("unasked" if fact.name in self.unasked else "seen") + "_fact_new_wording"
            templates = self.templates[fact.relation]
            for heldout, keys in zip(templates.heldout_templates(), (fact.keys, fact.back_keys), strict=True):
                question = fill(self.rng.choice(heldout), fact) if heldout else ""
                if heldout and not is_correct(question, list(keys)):  # repeating the question must not score
                    row = {"question": question, "keys": list(keys), "lang": self.lang, "kind": kind}
                    rows.append({**row, "relation": fact.relation})
        self.rng.shuffle(rows)
        rows = rows[:count]
        for fact in self.new_sums:
            question = fill(self.rng.choice(self.templates["sum"].heldout), fact)
            rows.append({"question": question, "keys": list(fact.keys), "lang": self.lang, "kind": "new_sum"})
            rows[-1]["relation"] = "sum"
        return rows
