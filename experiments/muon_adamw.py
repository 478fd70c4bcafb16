"""What if AdamW trained the matrices of the layers instead of Muon? Each at three learning rates, so that none is
compared at the other's.

    Muon    W = W - rate * 0.2 sqrt(max(rows, columns)) * (nearest semi-orthogonal matrix of the momentum)
    AdamW   W = W - rate * momentum / sqrt(mean of squared gradients)

Read next: ../trainer/optim.py.
"""

from experiments.pictures import compared, draw_arm_losses, draw_rates, new_picture, span
from experiments.training import SMALL_MODEL, Workspace
from trainer.curves import save_figure

_RATES = {"muon": (0.004, 0.008, 0.016), "adamw": (0.002, 0.004, 0.008)}
NAMES = {"muon": "Muon", "adamw": "AdamW"}


def muon_adamw(space: Workspace) -> str:
    flags = f"{SMALL_MODEL} --max_steps 120 --max_loss_ratio 0"
    arms = space.train_all("1-pretrain.py", {
        f"{kind}, rate {rate}": (f"{flags} --optimizer {kind} --learning_rate {rate}", None)
        for kind, rates in _RATES.items() for rate in rates
    })  # fmt: skip
    losses = {kind: {rate: [arm.validated() for arm in arms[f"{kind}, rate {rate}"]] for rate in rates}
              for kind, rates in _RATES.items()}  # fmt: skip
    best = {kind: min(group, key=lambda rate: sum(group[rate])) for kind, group in losses.items()}
    values = {kind: losses[kind][best[kind]] for kind in best}
    seconds = {kind: sum(arm.cpu_seconds for arm in arms[f"{kind}, rate {best[kind]}"]) for kind in best}
    steps = len(arms[f"muon, rate {best['muon']}"][0].steps)
    sentence = (
        f"After {steps} steps the validation loss of Muon at its best rate ({best['muon']}) is "
        f"{compared(values['muon'], values['adamw'])}: {span(values['muon'])} nats per token, of AdamW at its best "
        f"({best['adamw']}) {span(values['adamw'])}; a step of Muon takes "
        f"{seconds['muon'] / seconds['adamw']:.2f} times the CPU time."
    )
    figure, (left, right) = new_picture()
    draw_arm_losses(left, {f"{NAMES[kind]}, rate {rate}": arms[f"{kind}, rate {rate}"] for kind, rate in best.items()})
    draw_rates(right, {NAMES[kind]: group for kind, group in losses.items()})
    save_figure(figure, space.out / "muon_adamw.png", "Pretraining with Muon and with AdamW")
    return sentence
