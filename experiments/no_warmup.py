"""What if the learning rate started at its peak? Three peak rates, with 20 steps of warm-up and without.

    rate of step t = peak * (t + 1) / 21 for t < 20         without: peak

The size of an update of Muon does not depend on that of the gradient: only the rate limits the first steps.
Read next: ../trainer/optim.py (lr_multiplier).
"""

from experiments.pictures import draw_rates, label_axes, new_picture, rate_words, span
from experiments.training import SMALL_MODEL, Workspace
from trainer.curves import save_figure

_RATES = (0.008, 0.03, 0.1)
FIRST_STEPS = 20


def no_warmup(space: Workspace) -> str:
    flags = f"{SMALL_MODEL} --max_steps 120 --max_loss_ratio 0"
    kinds = {"with warm-up": f"--warmup_iters {FIRST_STEPS}", "without": "--warmup_iters 0"}
    arms = space.train_all("1-pretrain.py", {
        f"{kind}, rate {rate}": (f"{flags} {more} --learning_rate {rate}", None)
        for kind, more in kinds.items() for rate in _RATES
    })  # fmt: skip
    losses = {kind: {rate: [arm.validated() for arm in arms[f"{kind}, rate {rate}"]] for rate in _RATES}
              for kind in kinds}  # fmt: skip
    highest = {
        kind: span([max(row["loss"] for row in arm.steps[:FIRST_STEPS]) for arm in arms[f"{kind}, rate {_RATES[-1]}"]])
        for kind in kinds
    }
    sentence = (
        f"Without warm-up at rate {_RATES[-1]} the highest loss of the first {FIRST_STEPS} steps is "
        f"{highest['without']} nats per token, with it {highest['with warm-up']}; after "
        f"{len(arms[f'without, rate {_RATES[-1]}'][0].steps)} steps, "
        f"{rate_words(losses['without'], losses['with warm-up'])}."
    )
    figure, (left, right) = new_picture()
    for color, kind in enumerate(kinds):
        for i, arm in enumerate(arms[f"{kind}, rate {_RATES[-1]}"]):
            first = [row["loss"] for row in arm.steps[: 2 * FIRST_STEPS]]
            left.plot(range(1, len(first) + 1), first, color=f"C{color}", linewidth=1.3, label="_" * bool(i) + kind)
    left.legend()
    left.set_title(f"the first steps at peak rate {_RATES[-1]}")
    label_axes(left, "step", "training loss (nats per token)")
    draw_rates(right, losses)
    save_figure(figure, space.out / "no_warmup.png", "Pretraining with and without warm-up")
    return sentence
