"""Data mixture: parses --mix and computes the weight of each language or source.

    --mix zh=0.25,en=0.75      of every hundred rows, 25 are Chinese (weights are divided by their sum)
    --mix laws=2x,tales=1x     twice as many epochs of `laws` as of `tales`
    --mix language             each language in proportion to its size; --mix source: each source

    weight_k = w_k^(1/T) / sum_j w_j^(1/T)       --mix_temperature T: 1 keeps the weights, larger T evens them out

T above 1 upsamples small languages (Lample & Conneau, arXiv:1901.07291, section 3.1, with 1/T = 0.5). Languages and
sources that --mix does not name are not trained on; the training script prints how many tokens that leaves out.

The labels of the training shards are in meta.json (data_process.py pretrain --source_key).
Read next: ../trainer/mixing.py (weights -> rows), shard_reader.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError, escape_controls

MIX_LABELS = ("language", "source")
MIN_MIX_WEIGHT = 0.0001  # the sampler lays out a mixture in rounds of 10,000 rows

SourceLabel = tuple[str, str]  # language, source


@dataclass(frozen=True)
class MixSpec:
    """A parsed --mix: `weights` by name, as fractions or, with `passes`, as epochs; or one of MIX_LABELS by size."""

    weights: dict[str, float]
    passes: bool = False
    kind: str = ""


@dataclass(frozen=True)
class MixComponent:
    """A named part of the training data and its weight: the fraction of rows that are sampled from it."""

    name: str
    labels: frozenset[SourceLabel]
    tokens: int
    weight: float
    passes: float = 0.0  # requested epochs; 0 if --mix gives fractions

    def contains(self, shard: dict[str, Any]) -> bool:
        """Whether the shard with this meta.json entry belongs to the component."""
        return (shard["language"], shard["source"]) in self.labels


def parse_mix(text: str) -> MixSpec:
    """Parse the value of --mix. Raises UserError with the usage if it is malformed."""
    if text in MIX_LABELS:
        return MixSpec({}, kind=text)
    usage = "write --mix zh=0.25,en=0.75 (fractions), zh=1x,en=2x (epochs), language or source"
    weights: dict[str, float] = {}
    passes, shown = set(), escape_controls(text)[:80]
    for piece in text.split(","):
        found = re.fullmatch(r"\s*([^=\s]+)\s*=\s*([0-9.]+(?:[eE]-?\d+)?)(x?)\s*", piece)
        try:
            name, number = (found[1], float(found[2])) if found else ("", 0.0)
        except ValueError:
            name, number = "", 0.0
        if not found or not 0 < number < 1e9:
            raise UserError(f"--mix {shown}: {piece.strip()[:80]!r} is not name=number above 0: {usage}")
        if name in weights:
            raise UserError(f"--mix {shown}: {name} is named twice: {usage}")
        weights[name] = number
        passes.add(bool(found[3]))
    if len(passes) > 1:
        raise UserError(f"--mix {shown}: give either fractions only or epochs only: {usage}")
    return MixSpec(weights, passes.pop())


def mix_components(shards: Sequence[dict[str, Any]], spec: MixSpec, temperature: float = 1.0) -> list[MixComponent]:
    """The components of a mixture of labelled training shards, in the order of --mix.

    Raises UserError if a name is not in the data, if two names overlap, or if a weight is below MIN_MIX_WEIGHT.
    """
    if not temperature > 0:
        raise UserError(f"--mix_temperature {temperature:g}: give a number above 0 (1 keeps the weights)")
    tokens = count_tokens_by_label(shards)
    weights = spec.weights or dict.fromkeys(sorted({_label_part(label, spec.kind) for label in tokens}), 0.0)
    labels = {name: frozenset(label for label in tokens if name in label) for name in weights}
    for name, component_labels in labels.items():
        if not component_labels or not name:
            available = ", ".join(sorted({part for label in tokens for part in label if part}))
            hint = "" if name else " there are no labelled sources (data_process.py pretrain --source_key labels them);"
            raise UserError(f"--mix {name or 'source'}:{hint or ' is not in the data:'} there are {available}")
        for other in list(labels)[: list(labels).index(name)]:
            if component_labels & labels[other]:
                raise UserError(f"--mix: {other} and {name} share data: name languages or sources that do not overlap")
    sizes = {name: sum(tokens[label] for label in component_labels) for name, component_labels in labels.items()}
    weighted_tokens = {
        name: (weight * sizes[name] if spec.passes else weight) or sizes[name] for name, weight in weights.items()
    }
    tempered = {name: weight ** (1 / temperature) for name, weight in weighted_tokens.items()}
    normalized = {name: weight / sum(tempered.values()) for name, weight in tempered.items()}
    if small := [name for name, share in normalized.items() if share < MIN_MIX_WEIGHT]:
        raise UserError(f"--mix: the weight of {small[0]} is below {MIN_MIX_WEIGHT:g}: raise it, or leave the name out")
    return [
        MixComponent(
            name,
            labels[name],
            sizes[name],
            normalized[name],
            weights[name] if spec.passes and temperature == 1 else 0.0,
        )
        for name in weights
    ]


def count_tokens_by_label(shards: Sequence[dict[str, Any]]) -> dict[SourceLabel, int]:
    """Training tokens of each (language, source). Raises UserError if the shards have no labels."""
    tokens: dict[SourceLabel, int] = {}
    for shard in shards:
        if "language" not in shard:
            raise UserError("--mix: this dataset has no labels: run `python data_process.py pretrain FILES…` again")
        label = (shard["language"], shard["source"])
        tokens[label] = tokens.get(label, 0) + shard["tokens"]
    return tokens


def unused_tokens(shards: Sequence[dict[str, Any]], *stages: list[MixComponent]) -> dict[str, int]:
    """Tokens of the labels that no component of any stage contains, by "language" or "language/source"."""
    used = {label for components in stages for component in components for label in component.labels}
    return {"/".join(filter(None, k)): v for k, v in count_tokens_by_label(shards).items() if k not in used and v}


def _label_part(label: SourceLabel, kind: str) -> str:
    return label[MIX_LABELS.index(kind)]
