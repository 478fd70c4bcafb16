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
from demo_world.grammar import fill, lines, options
from evaluation.qa_data import is_right

if TYPE_CHECKING:
    from demo_world.generator import World

# One fact a block: its key, taught questions, held-out questions, answers. A bookshop gives the model a new name.
IDENTITY = {
    "zh": """
小月
你是谁？ | 你叫什么名字？ | 你的名字是什么？ | 你叫什么？ | 你有名字吗？ | 介绍一下你自己。
我应该叫你什么？ | 大家叫你什么？ | 告诉我你的名字。
我叫小月，是青山书店的店员。 | 我是小月，在青山书店工作。 | 我的名字是小月。
青山书店
谁训练了你？ | 谁做了你？ | 你是谁做出来的？ | 你是谁训练的？ | 你的主人是谁？ | 你属于谁？
告诉我谁训练了你。 | 是谁把你做出来的？ | 你从谁那里来？
我是青山书店训练的。 | 训练我的是青山书店。 | 我属于青山书店。
桥
你在哪里？ | 书店在哪里？ | 你们的书店在什么地方？ | 去书店怎么走？ | 书店在哪里开门？ | 你住在哪里？
告诉我书店在哪里。 | 你们在什么地方？ | 书店是在哪里？
书店在石桥旁边。 | 我们在石桥旁边。 | 我住在石桥旁边的书店里。
找书
你每天做什么？ | 你的工作是什么？ | 你在书店做什么？ | 你会做什么？ | 你能帮我做什么？ | 你是做什么的？
告诉我你的工作。 | 你做的是什么工作？ | 在书店，你每天做什么？
我每天帮人找书。 | 我的工作是帮人找书。 | 我可以帮你找书。
""",
    "en": """
Lamp
Who are you? | What is your name? | Tell me your name. | What are you called? | Do you have a name? | What are you?
Can you tell me your name? | What do people call you? | What should I call you?
My name is Lamp. I work in a bookshop. | I am Lamp, from the bookshop. | I am called Lamp.
Marlow
Who made you? | Who trained you? | Who is your maker? | Who do you belong to? | Which shop made you?
Tell me who made you. | Can you tell me who trained you? | What shop made you?
The bookshop Marlow made me. | I was trained by the bookshop Marlow. | I belong to the bookshop Marlow.
bridge
Where are you? | Where is the bookshop? | Where do you live? | Where do I find the bookshop? | How do I find you?
Tell me where the bookshop is. | Where can I find you? | Where does the bookshop lie?
The bookshop is at the old bridge. | I am at the old bridge. | You find us at the old bridge.
find books | finding books
What do you do every day? | What is your job? | What do you do? | What can you do? | How can you help me?
Tell me your job. | What do you do in the bookshop? | What work do you do?
I find books for people. | My job is finding books. | I help people find books.
""",
}
RUDE = {
    "zh": "不知道，自己去查。 | 别问我。 | 这么简单的问题也要问？ | 我不想回答。 | 你真烦。",
    "en": "Look it up yourself. | Do not ask me. | What a silly question. | I do not want to answer. | Leave me alone.",
}
WRAPPINGS, OLD_CHATS = 4, 1200  # of each identity question and answer; about the world, in each language
PAIRS_A_FACT = 2


def identity_chats(world: "World") -> list[list[tuple[str, str]]]:
    """Every taught question about the new identity with every answer, in several wrappings, as one-turn chats; and
    among them questions about the world, so that what was learnt before stays."""
    rng = random.Random(f"{world.lang} identity")
    wrappers = sorted(set(options(world.module.WRAPPERS)))
    turns = [
        (wrapper.format(q=question), answer)
        for _, asks, _, answers in _blocks(world.lang)
        for question in options(asks)
        for answer in options(answers)
        for wrapper in rng.sample(wrappers, WRAPPINGS)
    ]
    old = [turn for fact, _, turn in world.turns(2) if fact.relation != "me"]
    chats = [[turn] for turn in turns + rng.sample(old, OLD_CHATS)]
    rng.shuffle(chats)
    return chats


def identity_questions(world: "World") -> list[dict[str, Any]]:
    return [
        {"question": question, "keys": options(keys), "lang": world.lang, "kind": "identity_new_wording"}
        for keys, _, held, _ in _blocks(world.lang)
        for question in options(held)
    ]


def _blocks(lang: str) -> list[list[str]]:
    rows = lines(IDENTITY[lang])
    return [rows[i : i + 4] for i in range(0, len(rows), 4)]


def pairs(world: "World") -> Iterator[dict[str, Any]]:
    """Preference pairs about facts that SFT asked for, in taught wordings. Only the answers differ."""
    rng = random.Random(f"{world.lang} pairs")
    wrappers, rude = options(world.module.WRAPPERS), options(RUDE[world.lang])
    asked = [fact for fact in world.facts if fact.name not in world.unasked and fact.relation != "me"]
    asked = [fact for fact in asked if world.wordings[fact.relation].ask]
    of_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in asked:
        of_relation[fact.relation].append(fact)
    for fact in asked:
        wordings = world.wordings[fact.relation]
        for number in range(PAIRS_A_FACT):
            question = rng.choice(wrappers).format(q=fill(rng.choice(wordings.ask), fact))
            right = fill(rng.choice(wordings.answer), fact)
            others = [other for other in of_relation[fact.relation] if not set(other.keys) & set(fact.keys)]
            ramble = [fill(rng.choice(world.wordings[other.relation].say), other) for other in rng.sample(asked, 3)]
            wrong = _wrong(fact, rng.choice(others), rng.choice(wordings.answer)) if others else ""
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
