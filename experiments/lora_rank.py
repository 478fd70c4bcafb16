"""What if LoRA had rank 1, or 64? The same chats about a new name and job, alpha / r = 2 at every rank.

    h = W x + 2 B A x        A (r, in), B (out, r)

Read next: ../model/lora.py, ../4-lora_sft.py.
"""

from evaluation.qa_data import KeyedQuestion, read_keyed_questions
from experiments.pictures import compared, draw_arm_losses, draw_points, new_picture, span
from experiments.training import ANSWER_TOKENS, Workspace, answer_all, fraction_correct
from model.lora import adapter_state
from model.sampling import SamplingParams
from trainer.curves import save_figure

RANKS = (1, 8, 64)
_QUESTIONS = 72


def lora_rank(space: Workspace) -> str:
    flags = "--batch_size 16 --max_steps 140"
    arms = space.train_all(
        "4-lora_sft.py", {f"rank {rank}": (f"{flags} --rank {rank} --alpha {2 * rank}", None) for rank in RANKS}
    )
    new = read_keyed_questions(str(space.demo / "world/identity_questions.jsonl"))
    old = read_keyed_questions(str(space.demo / "world/questions.jsonl"))
    old = old[:: max(1, len(old) // _QUESTIONS)]
    settings = SamplingParams(max_new_tokens=ANSWER_TOKENS)

    def correct(rows: list[KeyedQuestion]) -> dict[str, list[float]]:
        return {
            name: [fraction_correct(answer_all(arm.model, arm.tokenizer, rows, settings), rows) for arm in group]
            for name, group in arms.items()
        }

    known, kept = correct(new), correct(old)
    losses = {name: [arm.validated() for arm in group] for name, group in arms.items()}
    trained = {name: sum(t.numel() for t in adapter_state(group[0].model).values()) for name, group in arms.items()}
    low, _, high = arms
    percent = "{:.0%}"
    sentence = (
        f"Rank 1 trains {trained[low]:,} parameters, rank 64 {trained[high]:,}; the validation loss of rank 1 is "
        f"{compared(losses[low], losses[high])} ({span(losses[low])} against {span(losses[high])} nats per token), "
        f"it answers {span(known[low], percent)} of the questions about the new name "
        f"(rank 64 {span(known[high], percent)}) and {span(kept[low], percent)} of the others "
        f"(rank 64 {span(kept[high], percent)})."
    )
    figure, (left, middle, right) = new_picture(3)
    draw_arm_losses(left, arms)
    draw_points(middle, known, "correct answers about the new name", percent)
    draw_points(right, kept, "correct answers to the other questions", percent)
    save_figure(figure, space.out / "lora_rank.png", "LoRA of rank 1, 8 and 64")
    return sentence
