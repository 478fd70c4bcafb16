"""What if a model had no RoPE? Every rotation is by the angle 0: attention does not see how far apart tokens are.

    cos = 1, sin = 0   at all positions; the causal mask is the only trace of order that is left

Read next: ../model/rope.py.
"""

from experiments.pictures import compared, draw_arm_losses, draw_points, new_picture, span
from experiments.training import SMALL_MODEL, Workspace
from trainer.curves import save_figure
from trainer.stage import Stage


def remove_rope(stage: Stage) -> None:
    stage.model.rope_cos.fill_(1)
    stage.model.rope_sin.fill_(0)


def no_rope(space: Workspace) -> str:
    flags = f"{SMALL_MODEL} --max_steps 400"
    arms = space.train_all("1-pretrain.py", {"with RoPE": (flags, None), "without": (flags, remove_rope)})
    losses = {name: [arm.validated() for arm in group] for name, group in arms.items()}
    control, without = losses.values()
    sentence = (
        f"Without RoPE the validation loss after {len(arms['without'][0].steps)} steps is "
        f"{compared(without, control)}: {span(without)} nats per token, with it {span(control)}."
    )
    figure, (left, right) = new_picture()
    draw_arm_losses(left, arms)
    draw_points(right, losses, "validation loss (nats per token)")
    save_figure(figure, space.out / "no_rope.png", "Pretraining with and without RoPE")
    return sentence
