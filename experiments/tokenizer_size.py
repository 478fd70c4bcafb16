"""What if the vocabulary were smaller, or larger? Three tokenizers, one model each, the same amount of text.

    bits per byte = loss sum / ln 2 / UTF-8 bytes: comparable between tokenizers, nats per token are not

A small vocabulary splits the text into more tokens, so a step sees less of it; a large one has more weights in its
embeddings and more logits to compute.
Read next: ../train_tokenizer.py, ../corpus/tokenizer_training.py.
"""

from experiments.pictures import label_axes, new_picture, span
from experiments.training import DEMO_VOCABULARY, SMALL_MODEL, Arm, Workspace
from trainer.curves import save_figure

SIZES = (512, 1024, DEMO_VOCABULARY)


def tokenizer_size(space: Workspace) -> str:
    arms: dict[int, list[Arm]] = {size: [] for size in SIZES}
    for size in SIZES:
        data = space.text_flags(size)
        for seed in space.seeds:
            arm = space.train("1-pretrain.py", f"{SMALL_MODEL} --epochs 0.1", seed, data=data)
            arms[size].append(arm)
            print(f"{size:,} entries, seed {seed}: {arm.validated('bits_per_byte'):.3f} bits per byte "
                  f"({arm.cpu_seconds:.0f} CPU seconds)", flush=True)  # fmt: skip
    bits = {size: [arm.validated("bits_per_byte") for arm in group] for size, group in arms.items()}
    seconds = {size: sum(arm.cpu_seconds for arm in group) / len(group) for size, group in arms.items()}
    tokens = {size: group[0].steps[-1]["tokens"] for size, group in arms.items()}
    low, high = SIZES[0], SIZES[-1]
    best = min(SIZES, key=lambda size: sum(bits[size]))
    sentence = (
        f"The same text is {tokens[low] / tokens[high]:.1f} times as many tokens with {low:,} entries as with "
        f"{high:,}; the lowest bits per byte are those of {best:,} entries ({span(bits[best])}; "
        f"{low:,}: {span(bits[low])}, {high:,}: {span(bits[high])}), and training took {seconds[low]:.0f} CPU seconds "
        f"with {low:,} and {seconds[high]:.0f} with {high:,}."
    )
    figure, panels = new_picture(3)
    names = [f"{size:,}" for size in SIZES]
    for axes, values, label in (
        (panels[0], [tokens[size] / 1e3 for size in SIZES], "tokens of the same text, thousands"),
        (panels[1], [sum(bits[size]) / len(bits[size]) for size in SIZES], "validation, bits per byte"),
        (panels[2], [seconds[size] for size in SIZES], "CPU seconds of training"),
    ):
        axes.bar(names, values, color="C0", alpha=0.5)
        label_axes(axes, "entries of the vocabulary", label)
    for i, size in enumerate(SIZES):
        panels[1].plot([i] * len(bits[size]), bits[size], "o", color="C0", markersize=4)
    save_figure(figure, space.out / "tokenizer_size.png", "Vocabularies of three sizes on the same text")
    return sentence
