"""The built-in demo world, part 4: a multiple-choice exam in the layout of C-Eval.

    {dev,val,test}/<subject>_<split>.csv     id, question, A, B, C, D, answer (none in test)
    subject_mapping.json                     subject -> English name, Chinese name, category (the language)

Six subjects per language. Questions of val and test use the held-out templates, which no training text contains; dev
(the few-shot examples) uses training templates. The options are whole sentences from the answer templates of the demo's
chats. The distractors name objects of other facts of the same relation (other capitals, other colors), so that only
knowledge of the fact decides. The position of the correct option is random.

    python -m demo_world.exam --out_dir out/demo/exam --seed 0

The seed is the seed of the world. Equal arguments give byte-identical files.
Read next: generator.py (the training data), ../eval_ceval.py (scores a model on the exam).
"""

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

from common.cli import Config, flag, parse
from common.errors import fail_in_one_line
from common.files import write_text
from common.flag_types import path_string, seed
from common.locks import lock_output
from corpus.language import LANGUAGES
from demo_world.facts import Fact, Term
from demo_world.grammar import fill
from demo_world.world import DemoWorld
from evaluation.exam_data import CEVAL_LETTERS
from evaluation.qa_data import is_correct

SUBJECTS = {  # subject: (English name, Chinese name, relations of facts.py)
    "geography": ("Geography", "地理", "capital continent language currency province"),
    "nature": ("Nature", "自然", "class count sound young color symbol planet"),
    "everyday_life": ("Everyday Life", "生活", "body job tool source unit"),
    "words": ("Words", "词语", "opposite translation measure plural past"),
    "time_and_history": ("Time and History", "时间与历史", "day month month_days season dynasty founder book"),
    "arithmetic": ("Arithmetic", "算术", "sum product"),
}
CATEGORIES = {"zh": "Chinese", "en": "English"}
COUNTS = {"dev": 5, "val": 25, "test": 10}  # maximal number of questions per subject


@dataclass(frozen=True)
class DemoExamConfig(Config):
    """The demo world that the exam asks about."""

    out_dir: str = flag("out/demo/exam", "folder to write", type=path_string)
    seed: int = flag(0, "seed of the demo world", type=seed)


QuestionRow = tuple[str, ...]  # question, four options, letter of the correct option


def questions_of(world: DemoWorld, relations: list[str], rng: random.Random) -> dict[str, list[QuestionRow]]:
    """{split: questions} of one subject; each fact occurs in at most one split."""
    facts = [fact for fact in world.facts if fact.relation in relations and world.templates[fact.relation].heldout]
    rng.shuffle(facts)
    rows: dict[str, list[QuestionRow]] = {split: [] for split in COUNTS}
    for fact in facts:
        split = next((split for split, count in COUNTS.items() if len(rows[split]) < count), "")
        if not split:
            break
        row = _question(world, fact, split == "dev", rng)
        if row:
            rows[split].append(row)
    return rows


def _question(world: DemoWorld, fact: Fact, is_example: bool, rng: random.Random) -> QuestionRow | None:
    """None if there are fewer than three distractors, the question contains a key, or a dev fact is unasked."""
    templates, wrong = world.templates[fact.relation], _wrong_objects(world, fact)
    question = fill(rng.choice(templates.ask if is_example else templates.heldout), fact)
    if len(wrong) < 3 or is_correct(question, list(fact.keys)) or (is_example and fact.name in world.unasked):
        return None
    objects, answer = [fact.slots["o"], *rng.sample(wrong, 3)], rng.choice(templates.answer)
    right, *others = (answer.format(**{**fact.slots, "o": name}) for name in objects)
    options = [right, *others]
    rng.shuffle(options)
    return (question, *options, CEVAL_LETTERS[options.index(right)])


def _wrong_objects(world: DemoWorld, fact: Fact) -> list[Term]:
    """Objects of other facts of the same relation, without those that are also correct for this subject."""

    def subject(one: Fact) -> dict[str, Term]:
        return {slot: word for slot, word in one.slots.items() if slot != "o"}

    others = [other for other in world.facts if other.relation == fact.relation]
    true: set[str] = {other.slots["o"] for other in others if subject(other) == subject(fact)}
    true |= {key.removeprefix("一") for key in fact.keys}  # several measure words are correct
    return sorted({other.slots["o"] for other in others} - true)


def build_exam(config: DemoExamConfig) -> dict[str, int]:
    """Write the exam into --out_dir; returns the number of questions per split."""
    folder, seed = Path(config.out_dir), config.seed
    counts, mapping = dict.fromkeys(COUNTS, 0), {}
    for lang in LANGUAGES:
        world = DemoWorld(lang, seed)
        for name, (english, chinese, relations) in SUBJECTS.items():
            subject = f"{name}_{lang}"
            mapping[subject] = [f"{english} ({CATEGORIES[lang]})", chinese, CATEGORIES[lang]]
            rows = questions_of(world, relations.split(), random.Random(f"{seed} {subject} exam"))
            for split, asked in rows.items():
                write_text(folder / split / f"{subject}_{split}.csv", _csv(asked, split != "test"))
                counts[split] += len(asked)
    write_text(folder / "subject_mapping.json", json.dumps(mapping, ensure_ascii=False, indent=1) + "\n")
    return counts


def _csv(rows: list[QuestionRow], with_answers: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "question", *CEVAL_LETTERS, *(["answer"] if with_answers else [])])
    writer.writerows([str(number), *(row if with_answers else row[:-1])] for number, row in enumerate(rows))
    return text.getvalue()


def main() -> None:
    config = parse(DemoExamConfig, __doc__)
    with lock_output(config.out_dir):
        counts = build_exam(config)
    print(f"{config.out_dir}: " + ", ".join(f"{count} questions in {split}" for split, count in counts.items()))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
