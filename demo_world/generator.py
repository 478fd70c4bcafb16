"""The built-in demo world: short true texts, chats and held-out questions in two languages, generated from a seed.

    words.jsonl       {"text", "lang"}                     texts and chats with one word per line, for the tokenizer
    pretrain.jsonl    {"text", "lang"}                     states every fact with many templates, in short documents;
                                                           some contain a question and its answer
    chats.jsonl       {"messages", "lang"}                 asks about most facts with the training templates
    questions.jsonl   {"question", "keys", "lang", ...}    asks with the held-out templates
    identity.jsonl, identity_questions.jsonl, pairs.jsonl  for LoRA and DPO: finetune.py

`kind` in questions.jsonl is the distance to the training data: `seen_fact_new_wording` (the chats ask about this fact
with other templates) or `unasked_fact_new_wording` (pretraining states the fact, no chat asks about it). The questions
are a uniform sample over all facts. The evaluation is closed-book: the model answers from its weights.

Why words.jsonl: on so few sentences, BPE would merge whole phrases and cut the same name in different ways (法国 in one
sentence, 法 + 国的首都 in the next). Real text is varied enough to avoid this.

    python -m demo_world.generator --out_dir out/demo/world --seed 0      (../demo.py does this for `make demo`)

It takes a few seconds; equal arguments give byte-identical files. The facts and sentences are text files in data/.
Read next: world.py (documents, chats and questions of one language), facts.py and grammar.py (the data files),
../train_tokenizer.py (the first script that reads the output).
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

from common import cli, flag_types
from common.errors import fail_in_one_line
from common.files import write_text
from common.locks import lock_output
from corpus.language import LANGUAGES
from demo_world.finetune import identity_chats, identity_questions, pairs
from demo_world.world import DemoWorld, Turn


def as_row(chat: list[Turn], lang: str) -> dict[str, Any]:
    """The row of a jsonl file of chats."""
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for turn in chat for role, text in zip(roles, turn, strict=True)]
    return {"messages": messages, "lang": lang}


def build_world(
    folder: str | os.PathLike[str],
    seed: int = 0,
    statement_rounds: int = 60,
    chat_rounds: int = 8,
    questions: int = 300,
) -> dict[str, int]:
    """Write the files into `folder`; returns the numbers of facts, texts, chats and questions of both languages.

    `statement_rounds`: statements per fact. `chat_rounds`: training questions per asked fact and direction.
    `questions`: held-out questions per language. Raises UserError for a malformed data file.
    """
    worlds = [DemoWorld(lang, seed) for lang in LANGUAGES]
    texts = [{"text": text, "lang": world.lang} for world in worlds for text in world.texts(statement_rounds)]
    chats: list[dict[str, Any]] = []
    for world in worlds:
        distinct = {json.dumps(row): row for row in (as_row(chat, world.lang) for chat in world.chats(chat_rounds))}
        chats += distinct.values()
    heldout = [row for world in worlds for row in world.questions(questions)]
    mix = random.Random(seed)
    mix.shuffle(texts)
    mix.shuffle(chats)
    world_of = {world.lang: world for world in worlds}
    contents = [(message["content"], row["lang"]) for row in chats for message in row["messages"]]
    contents += [(row["text"], row["lang"]) for row in texts]
    words = [{"text": world_of[lang].split_words(text), "lang": lang} for text, lang in contents]
    files = {"words.jsonl": words, "pretrain.jsonl": texts, "chats.jsonl": chats, "questions.jsonl": heldout}
    files["identity.jsonl"] = [as_row(chat, world.lang) for world in worlds for chat in identity_chats(world)]
    files["identity_questions.jsonl"] = [row for world in worlds for row in identity_questions(world)]
    files["pairs.jsonl"] = [pair for world in worlds for pair in pairs(world)]
    for name, rows in files.items():
        write_text(Path(folder) / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {
        "facts": sum(len(world.facts) for world in worlds),
        "texts": len(texts),
        "chats": len(chats),
        "questions": len(heldout),
    }


def main() -> None:
    parser = cli.FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out_dir",
        type=flag_types.path_string,
        default="out/demo/world",
        help="folder to write (default: out/demo/world)",
    )
    parser.add_argument("--seed", type=flag_types.seed, default=0, help="random seed of every choice (default: 0)")
    parser.add_argument("--statement_rounds", type=flag_types.positive_int, default=60,
        help="statements per fact (default: 60)")  # fmt: skip
    parser.add_argument("--chat_rounds", type=flag_types.positive_int, default=8,
        help="training questions per asked fact and direction (default: 8)")  # fmt: skip
    parser.add_argument("--questions", type=flag_types.positive_int, default=300,
        help="held-out questions per language (default: 300)")  # fmt: skip
    args = parser.parse_args()
    with lock_output(args.out_dir):
        counts = build_world(args.out_dir, args.seed, args.statement_rounds, args.chat_rounds, args.questions)
    print(f"{args.out_dir}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
