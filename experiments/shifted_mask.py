"""What if the loss mask of SFT were shifted by one token?

    right       the tokens of the answer and its <|im_end|> are trained
    late        without the first token of the answer, with the token after <|im_end|>
    early       with the last token of the prompt, without <|im_end|>

The mask belongs to tokens, the labels are tokens shifted by one: code that shifts only one of both has this error.
Read next: ../trainer/datasets.py (ChatDataset.collate), ../model/tokenizer.py (the mask).
"""

from functools import partial

import numpy as np

from evaluation.qa_data import read_keyed_questions
from experiments.pictures import draw_arm_losses, draw_points, new_picture, span
from experiments.training import ANSWER_TOKENS, Workspace, answer_all, fraction_correct
from model.sampling import SamplingParams
from trainer.curves import save_figure
from trainer.datasets import Batch, ChatDataset
from trainer.stage import Stage

_QUESTIONS = 96


def shifted(mask: np.ndarray, by: int) -> np.ndarray:
    """Return a mask (tokens,) shifted to later (1) or earlier (-1) tokens; what enters is 0."""
    moved = np.zeros_like(mask)
    if by > 0:
        moved[by:] = mask[:-by]
    else:
        moved[:by] = mask[-by:]
    return moved


class ShiftedMasks(ChatDataset):
    """The rows of a ChatDataset with shifted masks."""

    def __init__(self, chats: ChatDataset, by: int) -> None:
        self.tokens, self.pad_id, self.folder, self.max_width = (
            chats.tokens,
            chats.pad_id,
            chats.folder,
            chats.max_width,
        )
        self.by = by

    def batch(self, row_ids: np.ndarray) -> Batch:
        chats = [self.tokens.read_document(int(row)) for row in row_ids]
        moved = [(ids, shifted(mask, self.by)) for ids, mask in chats if mask is not None]
        return self.collate(moved, self.pad_id, self.max_width, row_ids)


def shift_masks(stage: Stage, by: int) -> None:
    assert isinstance(stage.data, ChatDataset)
    stage.data = ShiftedMasks(stage.data, by)


def shifted_mask(space: Workspace) -> str:
    flags = "--batch_size 16 --learning_rate 4e-3 --max_steps 250"
    changes = {"right": None, "late": partial(shift_masks, by=1), "early": partial(shift_masks, by=-1)}
    arms = space.train_all("3-full_sft.py", {name: (flags, change) for name, change in changes.items()})
    rows = read_keyed_questions(str(space.demo / "world/questions.jsonl"))
    rows = rows[:: max(1, len(rows) // _QUESTIONS)]
    settings = SamplingParams(max_new_tokens=ANSWER_TOKENS)
    answers = {
        name: [answer_all(arm.model, arm.tokenizer, rows, settings) for arm in group] for name, group in arms.items()
    }
    right = {name: [fraction_correct(given, rows) for given in group] for name, group in answers.items()}
    ended = {
        name: [sum(answer.finish_reason == "stop" for answer in given) / len(given) for given in group]
        for name, group in answers.items()
    }
    percent = "{:.0%}"
    sentence = (
        f"Of the answers of the correct mask {span(ended['right'], percent)} end by themselves and "
        f"{span(right['right'], percent)} are correct; with the mask one token late {span(ended['late'], percent)} and "
        f"{span(right['late'], percent)}, one token early {span(ended['early'], percent)} and "
        f"{span(right['early'], percent)}."
    )
    figure, (left, middle, last) = new_picture(3)
    draw_arm_losses(left, arms)
    left.set_title("each arm's loss on its own mask")
    draw_points(middle, ended, "answers that end by themselves", percent)
    draw_points(last, right, "correct answers", percent)
    save_figure(figure, space.out / "shifted_mask.png", "SFT with a loss mask that is shifted by one token")
    return sentence
