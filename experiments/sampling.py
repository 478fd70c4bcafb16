"""What if tokens that occurred already were penalised? Greedy decoding at five repetition penalties.

    logit / penalty where it is positive, logit * penalty where it is negative, of every token in prompt or answer

A penalty keeps a model that continues texts from repeating itself. It also forbids what a right answer has to repeat.
The models are those of the demo, or the small parents where it was not run.
Read next: ../model/sampling.py, ../model/repetition.py.
"""

from evaluation.qa_data import read_keyed_questions
from experiments.pictures import label_axes, new_picture
from experiments.training import ANSWER_TOKENS, Workspace, answer_all, fraction_correct
from model.checkpoint import load_model
from model.generate import generate
from model.repetition import distinct_n
from model.sampling import SamplingParams
from trainer.curves import save_figure

PENALTIES = (1.0, 1.1, 1.2, 1.5, 2.0)
_QUESTIONS, _PROMPTS, _PROMPT_TOKENS, _TEXT_TOKENS = 96, 32, 3, 100


def repeated_fraction(texts: list[list[int]]) -> float:
    """Return the mean over the texts of the fraction of sequences of three tokens that occurred in it before."""
    distinct = [distinct_n([text], 3) for text in texts]
    return sum(1 - (1.0 if each is None else each) for each in distinct) / len(distinct)


def sampling(space: Workspace) -> str:
    writer, tokenizer, _ = load_model(space.demo_model("pretrain"))
    chat, chat_tokenizer, _ = load_model(space.demo_model("full_sft"))
    rows = read_keyed_questions(str(space.demo / "world/questions.jsonl"))
    prompts = [tokenizer.encode_document(row["question"])[:_PROMPT_TOKENS] for row in rows[:: len(rows) // _PROMPTS]]
    rows = rows[:: max(1, len(rows) // _QUESTIONS)]
    repeated, correct = [], []
    for penalty in PENALTIES:
        settings = SamplingParams(max_new_tokens=_TEXT_TOKENS, repetition_penalty=penalty)
        repeated.append(repeated_fraction([text.ids for text in generate(writer, prompts, settings, tokenizer)]))
        settings = SamplingParams(max_new_tokens=ANSWER_TOKENS, repetition_penalty=penalty)
        correct.append(fraction_correct(answer_all(chat, chat_tokenizer, rows, settings), rows))
        print(f"penalty {penalty}: {repeated[-1]:.0%} of a text is repetition, {correct[-1]:.0%} of the answers are "
              "correct", flush=True)  # fmt: skip
    sentence = (
        f"Without a penalty {repeated[0]:.0%} of the sequences of three tokens in a greedy text occurred in it before, "
        f"with {PENALTIES[1]} {repeated[1]:.0%}; of the chat model's answers {correct[0]:.0%} are correct without a "
        f"penalty, {correct[1]:.0%} with {PENALTIES[1]} and {correct[-1]:.0%} with {PENALTIES[-1]}."
    )
    figure, (left, right) = new_picture()
    left.plot(PENALTIES, repeated, "o-")
    left.set_ylim(bottom=0)
    label_axes(left, "repetition penalty", "repeated sequences of three tokens in a text")
    right.plot(PENALTIES, correct, "o-", color="C2")
    right.set_ylim(0, 1)
    label_axes(right, "repetition penalty", "correct answers of the chat model")
    save_figure(figure, space.out / "sampling.png", "Greedy decoding with repetition penalties")
    return sentence
