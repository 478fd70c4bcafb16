"""Loss by position up to 4 times the trained length, for every RoPE scaling: does the model use a longer context?

    row: plain RoPE, and linear, dynamic, yarn with a factor of 2 and 4      column: positions, in trained lengths
    cell: mean over the documents of -ln p(token | preceding tokens of its document), in nats per token

All rows of a table use the same documents: the first MAX_DOCUMENTS of a `--texts` file that reach the last column.
Documents are not concatenated, because tokens of another document do not help to predict the next one. Columns that no
document reaches are left out, and a note says so. A model whose config or --rope_scaling sets a RoPE scaling has one
row. Matrix products use fp32 and sums use fp64.
Read next: ../model/rope.py, bits_per_byte.py (bits per byte), report.py (the report).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from evaluation.bits_per_byte import fp32_log_probs
from evaluation.tables import table_row
from model.config import ModelConfig
from model.rope import extend_context, rope_summary
from model.rope_flags import ROPE_KINDS
from model.tokenizer import ChatTokenizer
from model.transformer import Transformer

LENGTH_EDGES = (0.5, 1.0, 2.0, 4.0)  # the ends of the columns, in trained lengths
MAX_DOCUMENTS = 8
MAX_TRAINED_LENGTH = 8192  # longer models are not measured: the forward passes take hours on a CPU


def length_loss(model: Transformer, tokenizer: ChatTokenizer, texts: list[str]) -> dict[str, Any]:
    """{"trained", "documents", "edges", "rows": [{"rope", "loss": [one per edge, None beyond max_seq_len]}], "note"}.

    `edges`: the ends of columns that some document reaches; without any, `rows` is empty. Restores the model's RoPE.
    """
    config = model.config
    trained = config.trained_len or config.max_seq_len
    result: dict[str, Any] = {"trained": trained, "documents": 0, "edges": [], "rows": [], "note": ""}
    if trained > MAX_TRAINED_LENGTH:
        return result | {"note": f"not measured for models trained with more than {MAX_TRAINED_LENGTH:,} tokens"}
    start = (tokenizer.encode_document("") or [tokenizer.eos_id])[:1]
    documents = [start + tokenizer.encode(text) for text in texts]
    longest = max(map(len, documents), default=0) - 1  # the last token predicts nothing
    limit = 4 * trained if not config.rope_scaling else config.max_seq_len
    edges = [edge for edge in LENGTH_EDGES if int(edge * trained) <= min(longest, limit)]
    if missing := [f"{edge:g}" for edge in LENGTH_EDGES if edge not in edges]:
        reason = f"the longest document has {longest:,} tokens"
        if longest >= limit:
            reason = f"the model reads {limit:,} tokens"
        result["note"] = f"not measured at {', '.join(missing)} times the trained {trained:,} tokens: {reason}"
    if not edges:
        return result
    reach = int(edges[-1] * trained)
    rows = [ids[: reach + 1] for ids in documents if len(ids) > reach][:MAX_DOCUMENTS]
    ends = [int(edge * trained) for edge in edges]
    try:
        for name, variant in rope_variants(config, edges[-1]):
            model.set_rope(variant)
            loss = loss_by_position(model, rows, [end for end in ends if end <= variant.max_seq_len])
            result["rows"].append({"rope": name, "loss": loss + [None] * (len(ends) - len(loss))})
    finally:
        model.set_rope(config)
    return result | {"documents": len(rows), "edges": edges}


def rope_variants(config: ModelConfig, reach: float) -> Iterator[tuple[str, ModelConfig]]:
    """(name, config) of each row: the scaling of `config`, else plain RoPE and every scaling of a factor <= `reach`."""
    if config.rope_scaling:
        yield rope_summary(config), config
        return
    yield "plain", dataclasses.replace(config, max_seq_len=int(max(reach, 1) * config.max_seq_len))
    for factor in (2.0, 4.0):
        for kind in ROPE_KINDS if factor <= reach else ():
            yield f"{kind} x {factor:g}", extend_context(config, kind, factor)


def loss_by_position(model: Transformer, documents: list[list[int]], ends: list[int]) -> list[float]:
    """Mean nats per token of the positions between consecutive `ends`, starting at 0; one document per forward pass."""
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    sums = torch.zeros(len(ends), dtype=torch.float64)
    for ids in documents:
        log_probs = fp32_log_probs(model, [(ids[: ends[-1] + 1], [1] * (ends[-1] + 1))])[0]
        sums -= torch.stack([log_probs[begin:end].sum() for begin, end in spans])
    return [float(total) / ((end - begin) * len(documents)) for total, (begin, end) in zip(sums, spans, strict=True)]


# ---- the section of the report ---------------------------------------------------------------------------------------
def length_section(models: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: a table for each model and text, from "length_loss" of each model of the report."""
    lines: list[str] = []
    for model in models:
        for name, result in model.get("length_loss", {}).items():
            label = model["label"].replace("_", "\\_")
            lines += [f"**{label}**, {name}: trained with {result['trained']:,} tokens", ""]
            if result["rows"]:
                lines += [*_length_table(result), ""]
            if result["note"]:
                lines += [f"- {result['note']}", ""]
    if not lines:
        return []
    explanation = (
        "Nats per token by position, lower is better; the factor in a column is its end in trained lengths. All rows "
        "of a table use the same documents, and documents are not joined. "
        "`--rope_scaling KIND --rope_factor N` selects a row."
    )
    return ["## Loss by position", "", explanation, "", *lines]


def _length_table(result: dict[str, Any]) -> list[str]:
    trained, edges = result["trained"], result["edges"]
    begins = [0.0, *edges[:-1]]
    columns = [f"{int(b * trained):,}–{int(e * trained):,} ({e:g}x)" for b, e in zip(begins, edges, strict=True)]
    lines = [table_row(f"RoPE ({result['documents']} documents)", *columns), "|---|" + "---:|" * len(edges)]
    for row in result["rows"]:
        lines.append(table_row(row["rope"], *("–" if loss is None else f"{loss:.3f}" for loss in row["loss"])))
    return lines
