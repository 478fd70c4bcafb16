"""The built-in demo world: short true texts, chats and held-out questions in two languages, generated from a seed.

    words.jsonl       {"text", "lang"}                     texts and chats with one word per line, and the words
                                                           around tools (tool_chats.py), for the tokenizer
    pretrain.jsonl    {"text", "lang"}                     states every fact with many templates, in short documents;
                                                           some contain a question and its answer
    chats.jsonl       {"messages", "lang"}                 asks about most facts with the training templates
    questions.jsonl   {"question", "keys", "lang", ...}    asks with the held-out templates
    identity.jsonl, identity_questions.jsonl, pairs.jsonl  for LoRA and DPO: finetune.py
    facts.jsonl       {"subject", "relation", "value"}     all facts, for the tool lookup of 2-eval.py and the page

`kind` in questions.jsonl is the distance to the training data: `seen_fact_new_wording` (the chats ask about this fact
with other templates), `unasked_fact_new_wording` (texts and chats state the fact, no text and no chat asks about it) or
`new_sum` (no file contains this sum, in either language). The questions are a uniform sample over all facts, and all
new sums. The evaluation is closed-book: the model answers from its weights.

Why words.jsonl: on so few sentences, BPE would merge whole phrases and cut the same name in different ways (法国 in one
sentence, 法 + 国的首都 in the next). Real text is varied enough to avoid this.

    python -m demo_world.generator --out_dir out/demo/world --seed 0      (../demo.py does this for `make demo`)

It takes a few seconds; equal arguments give byte-identical files. The facts and sentences are text files in data/.
Read next: world.py (documents, chats and questions of one language), facts.py and grammar.py (the data files),
../train_tokenizer.py (the first script that reads the output).
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import Config, flag, parse
from common.errors import fail_in_one_line
from common.files import write_text
from common.flag_types import int_between, path_string, positive_int, seed
from common.locks import lock_output
from corpus.language import LANGUAGES
from demo_world.finetune import identity_chats, identity_questions, pairs
from demo_world.world import DemoWorld, Turn
from evaluation.tools import TOOLS
from model.chatml import CHAT_MARKERS, TOOLS_AFTER, TOOLS_BEFORE

# Rounds of each language, relative to the flags. English needs more for the same result: a word has several forms, at
# the beginning of a sentence too (Slow, slow).
ROUNDS = {"zh": 0.9, "en": 1.1}
CALCULATOR = TOOLS["calculator"]
TOOL_WORD_ROUNDS = 200  # enough for BPE to merge each word into one token


@dataclass(frozen=True)
class WorldConfig(Config):
    """Size and seed of the demo world."""

    out_dir: str = flag("out/demo/world", "folder to write", type=path_string)
    seed: int = flag(0, "random seed of every choice", type=seed)
    statement_rounds: int = flag(60, "statements per fact", type=int_between(1, 500))
    chat_rounds: int = flag(8, "training questions per asked fact and direction", type=int_between(1, 500))
    questions: int = flag(300, "held-out questions per language", type=positive_int)


def as_row(chat: list[Turn], lang: str) -> dict[str, Any]:
    """The row of a jsonl file of chats."""
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for turn in chat for role, text in zip(roles, turn, strict=True)]
    return {"messages": messages, "lang": lang}


def tool_words() -> str:
    """The words around the schema of the calculator and around its calls, many times: else they cost 350 tokens."""
    text = f'{TOOLS_BEFORE}\n{json.dumps(CALCULATOR.schema)}{TOOLS_AFTER}\n{{"name": "calculator", "arguments": {{"'
    for marker in CHAT_MARKERS:
        text = text.replace(marker, "\n")
    return "\n".join([re.sub(r"(?<=\S)(?= )", "\n", text)] * TOOL_WORD_ROUNDS)


def lookup_rows(world: DemoWorld) -> list[dict[str, str]]:
    """The facts with a subject, as rows of a --lookup_file."""
    separator = " " if world.lang == "en" else ""
    return [
        {
            "subject": slots["s"],
            "relation": fact.relation,
            "value": separator.join(filter(None, (slots["o"], slots.get("u")))),
        }
        for fact in world.facts
        if (slots := fact.slots)["s"]
    ]


def build_world(config: WorldConfig) -> dict[str, int]:
    """Write the files into --out_dir; returns the numbers of facts, texts, chats and questions of both languages.

    Raises UserError for a malformed data file.
    """
    worlds = [DemoWorld(lang, config.seed) for lang in LANGUAGES]
    texts = [
        {"text": text, "lang": world.lang}
        for world in worlds
        for text in world.texts(round(ROUNDS[world.lang] * config.statement_rounds))
    ]
    chats: list[dict[str, Any]] = []
    for world in worlds:
        distinct = {
            json.dumps(row): row
            for row in (
                as_row(chat, world.lang) for chat in world.chats(round(ROUNDS[world.lang] * config.chat_rounds))
            )
        }
        chats += distinct.values()
    heldout = [row for world in worlds for row in world.questions(config.questions)]
    mix = random.Random(config.seed)
    mix.shuffle(texts)
    mix.shuffle(chats)
    world_of = {world.lang: world for world in worlds}
    contents = [(message["content"], row["lang"]) for row in chats for message in row["messages"]]
    contents += [(row["text"], row["lang"]) for row in texts]
    words = [{"text": world_of[lang].split_words(text), "lang": lang} for text, lang in contents]
    words.append({"text": tool_words(), "lang": "en"})
    files = {"words.jsonl": words, "pretrain.jsonl": texts, "chats.jsonl": chats, "questions.jsonl": heldout}
    files["identity.jsonl"] = [as_row(chat, world.lang) for world in worlds for chat in identity_chats(world)]
    files["identity_questions.jsonl"] = [row for world in worlds for row in identity_questions(world)]
    files["facts.jsonl"] = [row for world in worlds for row in lookup_rows(world)]
    files["pairs.jsonl"] = [pair for world in worlds for pair in pairs(world)]
    for name, rows in files.items():
        write_text(Path(config.out_dir) / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    facts = sum(len(world.facts) for world in worlds)
    return {"facts": facts, "texts": len(texts), "chats": len(chats), "questions": len(heldout)}


def main() -> None:
    config = parse(WorldConfig, __doc__)
    with lock_output(config.out_dir):
        counts = build_world(config)
    print(f"{config.out_dir}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
