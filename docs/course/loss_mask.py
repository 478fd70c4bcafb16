"""Exercise of chapter 4: the tokens of a chat, which of them are trained, and the loss at each.

    python -m docs.course.loss_mask
    python -m docs.course.loss_mask --question "9加8等于多少？" --answer "9+8=17。"

Compares the demo's pretrained model with its SFT model.
Read next: ../../model/tokenizer.py (render), ../../trainer/loss.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from common.cli import flag, parse
from common.errors import fail_in_one_line
from docs.course.exercise import ExerciseConfig, open_demo, save_picture
from trainer.loss import token_log_probs

STAGES = {"pretrain": "after pretraining", "full_sft": "after SFT"}


@dataclass(frozen=True)
class MaskConfig(ExerciseConfig):
    question: str = flag("What is the capital of Japan?", "the user's message")
    answer: str = flag("The capital of Japan is Tokyo.", "the assistant's answer")


@torch.no_grad()
def main() -> None:
    config = parse(MaskConfig, __doc__)
    messages = [{"role": "user", "content": config.question}, {"role": "assistant", "content": config.answer}]
    losses: dict[str, list[float]] = {}
    for stage in STAGES:
        model, tokenizer = open_demo(config, stage)
        ids, mask = tokenizer.render(messages)
        tokens = torch.tensor([ids])
        hidden, _ = model(tokens[:, :-1])
        losses[stage] = (-token_log_probs(hidden, model.lm_head.weight, tokens[:, 1:])[0]).tolist()
    pieces = [tokenizer.decode([i]).replace("\n", "\\n") or str(i) for i in ids]
    print("trained  pretrain     SFT  token")
    for piece, trained, *pair in zip(pieces[1:], mask[1:], *losses.values(), strict=True):
        print(f"{'yes' if trained else 'no':>7}  {pair[0]:8.2f} {pair[1]:7.2f}  {piece}")
    count = sum(mask[1:])
    for stage, values in losses.items():
        trained = sum(value for value, bit in zip(values, mask[1:], strict=True) if bit) / count
        print(f"{STAGES[stage]}: {trained:.2f} nats per trained token, {sum(values) / len(values):.2f} over all tokens")
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    places = np.arange(len(pieces) - 1)
    for shift, (stage, values) in zip((-0.2, 0.2), losses.items(), strict=True):
        axes.bar(places + shift, values, 0.4, label=STAGES[stage])
    for place, trained in enumerate(mask[1:]):
        if trained:
            axes.axvspan(place - 0.5, place + 0.5, color="C2", alpha=0.15, linewidth=0)
    axes.set_xticks(places, pieces[1:], rotation=90, fontsize=8)
    axes.set_ylabel("loss (nats); green: trained")
    axes.legend()
    save_picture(config, figure, "04-loss-and-mask")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
