"""The built-in demo world, part 3: data for LoRA (a new identity) and DPO (a preference).

    identity.jsonl             {"messages", "lang"}      training questions about the new identity, mixed with questions
                                                         about the world
    identity_questions.jsonl   {"question", "keys", ...} held-out questions about the new identity
    pairs.jsonl                {"chosen", "rejected"}    a training question; chosen: the correct, short answer;
                                                         rejected: a wrong, rambling or rude answer

The identity is data/identity_XX.txt (XX is en or zh).
Read next: generator.py (writes the files), ../4-lora_sft.py and ../5-dpo_train.py (train on them).
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from demo_world.facts import Fact
from demo_world.grammar import fill, read_questions
from demo_world.world import SUM_SHARE, DemoWorld
from evaluation.qa_data import is_correct

WRAPPINGS = 6  # wrappers per identity question and answer
REPLAY_CHATS = 700  # chats about the world per language
PAIRED_FACTS, PAIRS_PER_FACT = 300, 2  # per language


def identity_chats(world: DemoWorld) -> list[list[tuple[str, str]]]:
    """One-turn chats: each training question about the new identity with each answer, in several wrappers.

    Questions about the world are mixed in (replay), so that the model keeps the facts of the SFT stage.
    """
    rng = random.Random(f"{world.lang} identity")
    wrappers = sorted(set(world.phrases["wrappers"]))
    turns = [
        (wrapper.format(q=question), answer)
        for section in read_questions("identity", world.lang).values()
        for question in section.ask
        for answer in section.answer
        for wrapper in rng.sample(wrappers, WRAPPINGS)
    ]
    replay = [turn for fact, _, turn in world.turns(2) if fact.relation != "me"]
    chats = [[turn] for turn in turns + rng.sample(replay, REPLAY_CHATS)]
    rng.shuffle(chats)
    return chats


def identity_questions(world: DemoWorld) -> list[dict[str, Any]]:
    """Rows of identity_questions.jsonl: every held-out question about the new identity."""
    return [
        {"question": question, "keys": section.keys, "lang": world.lang, "kind": "identity_new_wording"}
        for section in read_questions("identity", world.lang).values()
        for question in section.heldout
    ]


def pairs(world: DemoWorld) -> Iterator[dict[str, Any]]:
    """Preference pairs: training questions about asked facts. Chosen and rejected differ in the answer only."""
    rng = random.Random(f"{world.lang} pairs")
    wrappers, rude = world.phrases["wrappers"], world.phrases["rude_answers"]
    asked = [fact for fact in world.facts if fact.name not in world.unasked and fact.relation != "me"]
    asked = [fact for fact in asked if world.templates[fact.relation].ask]
    asked = [fact for fact in asked if fact.relation != "sum" or rng.random() < SUM_SHARE]
    of_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in asked:
        of_relation[fact.relation].append(fact)
    for fact in rng.sample(asked, PAIRED_FACTS):
        templates = world.templates[fact.relation]
        for number in range(PAIRS_PER_FACT):
            question = rng.choice(wrappers).format(q=fill(rng.choice(templates.ask), fact))
            right = fill(rng.choice(templates.answer), fact)
            others = [other for other in of_relation[fact.relation] if not set(other.keys) & set(fact.keys)]
            ramble = [fill(rng.choice(world.templates[other.relation].say), other) for other in rng.sample(asked, 3)]
            wrong = _wrong(fact, rng.choice(others), rng.choice(templates.answer)) if others else ""
            if number == 0 and wrong and not is_correct(wrong, list(fact.keys)):
                rejected = wrong
            else:
                rejected = rng.choice((world.gap.join([right, *ramble]), rng.choice(rude)))
            ask = {"role": "user", "content": question}
            yield {
                "chosen": [ask, {"role": "assistant", "content": right}],
                "rejected": [ask, {"role": "assistant", "content": rejected}],
                "lang": world.lang,
            }


def _wrong(fact: Fact, other: Fact, answer: str) -> str:
    """The answer to the question about `fact`, with the object of another fact."""
    return answer.format(**{**fact.slots, "o": other.slots["o"]})
