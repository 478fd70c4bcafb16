"""What if a model had no RMSNorm? Every norm is replaced by the identity; all other weights start equal.

    x = x + attention(x);   x = x + feed_forward(x)          instead of   x + attention(rms_norm(x)), …

Read next: ../model/transformer.py (RMSNorm, DecoderLayer).
"""

from torch import nn

from experiments.pictures import compared, draw_arm_losses, draw_points, new_picture, span
from experiments.training import SMALL_MODEL, Workspace
from model.transformer import RMSNorm
from trainer.curves import save_figure
from trainer.stage import Stage


def remove_norms(stage: Stage) -> None:
    for name, module in list(stage.model.named_modules()):
        if isinstance(module, RMSNorm):
            stage.model.set_submodule(name, nn.Identity())


def no_rmsnorm(space: Workspace) -> str:
    flags = f"{SMALL_MODEL} --max_steps 150 --max_loss_ratio 0"
    arms = space.train_all("1-pretrain.py", {"with RMSNorm": (flags, None), "without": (flags, remove_norms)})
    losses = {name: [arm.validated() for arm in group] for name, group in arms.items()}
    control, without = losses.values()
    verdict = compared(without, control)
    sentence = (
        f"Without RMSNorm the validation loss after {len(arms['without'][0].steps)} steps is {verdict}: "
        f"{span(without)} nats per token, with it {span(control)}."
    )
    figure, (left, right) = new_picture()
    draw_arm_losses(left, arms)
    draw_points(right, losses, "validation loss (nats per token)")
    save_figure(figure, space.out / "no_rmsnorm.png", "Pretraining with and without RMSNorm")
    return sentence
