"""The built-in demo world, part 5: what the later stages learn from, LoRA a new identity and DPO a preference.

    identity.jsonl             {"messages", "lang"}      who am I now, who made me: taught wordings; and old questions
    identity_questions.jsonl   {"question", "keys", ...} the same in wordings that were never taught
    pairs.jsonl                {"chosen", "rejected"}    a question of the world; the right, short, polite answer,
                                                         and one that is wrong, or rambles, or is rude

Read next: generator.py (who writes them), ../4-lora_sft.py and ../5-dpo_train.py (who learns from them).
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from demo_world.facts import Fact
from demo_world.grammar import fill, read_questions
from evaluation.qa_data import is_right

if TYPE_CHECKING:
    from demo_world.generator import DemoWorld

WRAPPINGS, OLD_CHATS = 4, 1200  # of each identity question and answer; about the world, in each language
PAIRS_A_FACT = 2


def identity_chats(world: "DemoWorld") -> list[list[tuple[str, str]]]:
    """Every taught question about the new identity with every answer, in several wrappings, as one-turn chats; and
    among them questions about the world, so that what was learnt before stays."""
    rng = random.Random(f"{world.lang} identity")
    wrappers = sorted(set(world.phrases["wrappers"]))
    turns = [
        (wrapper.format(q=question), answer)
        for section in read_questions("identity", world.lang).values()
        for question in section.ask
        for answer in section.answer
        for wrapper in rng.sample(wrappers, WRAPPINGS)
    ]
    old = [turn for fact, _, turn in world.turns(2) if fact.relation != "me"]
    chats = [[turn] for turn in turns + rng.sample(old, OLD_CHATS)]
    rng.shuffle(chats)
    return chats


def identity_questions(world: "DemoWorld") -> list[dict[str, Any]]:
    return [
        {"question": question, "keys": section.keys, "lang": world.lang, "kind": "identity_new_wording"}
        for section in read_questions("identity", world.lang).values()
        for question in section.heldout
    ]


def pairs(world: "DemoWorld") -> Iterator[dict[str, Any]]:
    """Preference pairs about facts that SFT asked for, in taught templates. Only the answers differ."""
    rng = random.Random(f"{world.lang} pairs")
    wrappers, rude = world.phrases["wrappers"], world.phrases["rude_answers"]
    asked = [fact for fact in world.facts if fact.name not in world.unasked and fact.relation != "me"]
    asked = [fact for fact in asked if world.templates[fact.relation].ask]
    of_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in asked:
        of_relation[fact.relation].append(fact)
    for fact in asked:
        templates = world.templates[fact.relation]
        for number in range(PAIRS_A_FACT):
            question = rng.choice(wrappers).format(q=fill(rng.choice(templates.ask), fact))
            right = fill(rng.choice(templates.answer), fact)
            others = [other for other in of_relation[fact.relation] if not set(other.keys) & set(fact.keys)]
            ramble = [fill(rng.choice(world.templates[other.relation].say), other) for other in rng.sample(asked, 3)]
            wrong = _wrong(fact, rng.choice(others), rng.choice(templates.answer)) if others else ""
            if number == 0 and wrong and not is_right(wrong, list(fact.keys)):
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
