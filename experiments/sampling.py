"""What if tokens that occurred already were penalised? Greedy decoding at five repetition penalties.

    logit / penalty where it is positive, logit * penalty where it is negative, of every token in prompt or answer

A penalty ends loops of a model that continues texts. It also forbids what a right answer has to repeat.
Read next: ../model/sampling.py, ../model/repetition.py.
"""

import numpy as np

from evaluation.qa_data import read_keyed_questions
from experiments.pictures import label_axes, new_picture
from experiments.training import ANSWER_TOKENS, Workspace, answer_all, fraction_correct
from model.checkpoint import load_model
from model.generate import generate
from model.repetition import distinct_n, has_loop
from model.sampling import SamplingParams
from trainer.curves import save_figure

PENALTIES = (1.0, 1.1, 1.2, 1.5, 2.0)
_QUESTIONS, _PROMPTS, _PROMPT_TOKENS, _TEXT_TOKENS = 96, 32, 3, 100


def sampling(space: Workspace) -> str:
    writer, tokenizer, _ = load_model(space.parent("pretrain"))
    chat, chat_tokenizer, _ = load_model(space.parent("full_sft"))
    rows = read_keyed_questions(str(space.demo / "world/questions.jsonl"))
    prompts = [tokenizer.encode_document(row["question"])[:_PROMPT_TOKENS] for row in rows[:: len(rows) // _PROMPTS]]
    rows = rows[:: max(1, len(rows) // _QUESTIONS)]
    loops, distinct, correct = [], [], []
    for penalty in PENALTIES:
        settings = SamplingParams(max_new_tokens=_TEXT_TOKENS, repetition_penalty=penalty)
        texts = [text.ids for text in generate(writer, prompts, settings, tokenizer)]
        loops.append(sum(map(has_loop, texts)) / len(texts))
        distinct.append(distinct_n(texts, 3) or 0.0)
        settings = SamplingParams(max_new_tokens=ANSWER_TOKENS, repetition_penalty=penalty)
        correct.append(fraction_correct(answer_all(chat, chat_tokenizer, rows, settings), rows))
        print(f"penalty {penalty}: {loops[-1]:.0%} of the texts loop, {correct[-1]:.0%} of the answers are correct",
              flush=True)  # fmt: skip
    quiet = next((p for p, rate in zip(PENALTIES, loops, strict=True) if rate <= loops[0] / 4), None)
    effect = (
        f"from a penalty of {quiet} on at most a quarter of that" if quiet else "no penalty brings that to a quarter"
    )
    worst = int(np.argmin(correct))
    sentence = (
        f"Greedy, {loops[0]:.0%} of the continued texts run into a loop, {effect}; of the chat model's answers "
        f"{correct[0]:.0%} are correct without a penalty and {correct[worst]:.0%} at {PENALTIES[worst]}."
    )
    figure, (left, right) = new_picture()
    left.plot(PENALTIES, loops, "o-", label="texts that loop")
    left.plot(PENALTIES, distinct, "o-", label="distinct sequences of three tokens")
    left.legend()
    label_axes(left, "repetition penalty", "fraction")
    right.plot(PENALTIES, correct, "o-", color="C2")
    right.set_ylim(0, 1)
    label_axes(right, "repetition penalty", "correct answers of the chat model")
    save_figure(figure, space.out / "sampling.png", "Greedy decoding with repetition penalties")
    return sentence
