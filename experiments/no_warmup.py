"""What if the learning rate started at its peak? AdamW at three peak rates, with 20 steps of warm-up and without.

    rate of step t = peak * (t + 1) / 21 for t < 20         without: peak

Read next: ../trainer/optim.py (lr_multiplier).
"""

from experiments.pictures import draw_arm_losses, draw_rates, new_picture, rate_words
from experiments.training import SMALL_MODEL, Workspace
from trainer.curves import save_figure

_RATES = (0.003, 0.01, 0.03)


def no_warmup(space: Workspace) -> str:
    flags = f"{SMALL_MODEL} --optimizer adamw --max_steps 120 --max_loss_ratio 0"
    kinds = {"with warm-up": "--warmup_iters 20", "without": "--warmup_iters 0"}
    arms = space.train_all("1-pretrain.py", {
        f"{kind}, rate {rate}": (f"{flags} {more} --learning_rate {rate}", None)
        for kind, more in kinds.items() for rate in _RATES
    })  # fmt: skip
    losses = {kind: {rate: [arm.validated() for arm in arms[f"{kind}, rate {rate}"]] for rate in _RATES}
              for kind in kinds}  # fmt: skip
    sentence = f"Without warm-up, {rate_words(losses['without'], losses['with warm-up'])}."
    figure, (left, right) = new_picture()
    draw_arm_losses(left, {kind: arms[f"{kind}, rate {_RATES[-1]}"] for kind in kinds})
    left.set_title(f"peak rate {_RATES[-1]}")
    draw_rates(right, losses)
    save_figure(figure, space.out / "no_warmup.png", "Pretraining with AdamW, with and without warm-up")
    return sentence
