"""What if DPO had no reference model? log pi_ref is 0 for every answer.

    loss = -log sigmoid(beta * (log pi(chosen) - log pi_ref(chosen) - log pi(rejected) + log pi_ref(rejected)))

With the reference every pair starts at margin 0, so the loss is ln 2 and each pair pushes equally. Without it a pair
starts at the margin that its parent gives it. The distance from the parent is measured with the true reference.
Read next: ../5-dpo_train.py (preference_loss).
"""

import torch

from experiments.pictures import compared, draw_arm_losses, draw_points, new_picture, span
from experiments.training import Workspace
from trainer.curves import save_figure
from trainer.datasets import PreferenceDataset
from trainer.stage import Stage


def forget_reference(stage: Stage) -> None:
    """Set log pi_ref of the training pairs to 0; the validation keeps the true values."""
    assert isinstance(stage.data, PreferenceDataset)
    stage.data.reference = torch.zeros_like(stage.data.reference)


def dpo_no_reference(space: Workspace) -> str:
    flags = "--batch_size 16 --learning_rate 1e-3 --max_steps 60"
    arms = space.train_all("5-dpo_train.py", {"with reference": (flags, None), "without": (flags, forget_reference)})
    chosen = {name: [arm.validated("val_chosen_logp_delta") for arm in group] for name, group in arms.items()}
    far = {name: [arm.validated("val_kl") for arm in group] for name, group in arms.items()}
    ranked = {name: [arm.validated("val_reward_accuracy") for arm in group] for name, group in arms.items()}
    won = [arm.steps[0]["reward_accuracy"] for arm in arms["without"]]
    first = [arm.steps[0]["preference_loss"] for arm in arms["without"]]
    percent = "{:.0%}"
    sentence = (
        f"Without the reference {span(won, percent)} of the pairs of the first step count as won already "
        f"(loss {span(first)} instead of ln 2 = 0.69); after {len(arms['without'][0].steps)} steps the distance "
        f"from the parent is {compared(far['without'], far['with reference'])} (KL {span(far['without'])} against "
        f"{span(far['with reference'])} nats per token), and {span(ranked['without'], percent)} of the held-out pairs "
        f"moved the right way (with it {span(ranked['with reference'], percent)})."
    )
    figure, (left, middle, right) = new_picture(3)
    draw_arm_losses(left, arms, "pairs", 1.0)
    left.set_ylabel("loss per pair")
    draw_points(middle, far, "distance from the parent (KL, nats per token)")
    draw_points(right, chosen, "change of log p of the chosen answer (nats)")
    save_figure(figure, space.out / "dpo_no_reference.png", "DPO with and without its reference model")
    return sentence
