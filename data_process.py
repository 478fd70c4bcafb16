"""Prepares training data: raw files -> token shards, with statistics of every dropped and bad row.

    python data_process.py pretrain FILES…     text  -> dataset/pretrain/  token shards, split by content hash
    python data_process.py sft FILES…          chats -> dataset/sft/       train.jsonl, val.jsonl, token shards + masks
    python data_process.py dpo FILES…          pairs -> dataset/dpo/       the same, for chosen and rejected answers
    python data_process.py rl FILES…           chats -> dataset/rl/        prompts with references, without tokens
    python data_process.py sft FILES… --check  prints statistics and samples (trained tokens marked), writes nothing
    python data_process.py sft FILES… --scorer out/pretrain_512.pth --keep_entropy 10%,90%
                                               keeps the chats between two percentiles of the model's cross-entropy
    python data_process.py --list_layouts      lists the supported row layouts; --keys prompt=KEY,… adds others
    python data_process.py download NAME       downloads a public dataset, with resume; without NAME: lists them

    python data_process.py clean FILES…        text -> dataset/clean/      rule-based cleaning, counted, with examples
    python data_process.py dedup FILES…        text -> dataset/dedup/      without duplicates and near-duplicates
    python data_process.py decontaminate FILES… --against EXAM…            without the questions of an exam

FILES are txt, jsonl, json, csv, parquet or arrow, also compressed as .gz .xz .zst .bz2, or folders of them;
dataset/README.md describes the formats. pretrain, sft and dpo need a tokenizer (train_tokenizer.py).
Read next: corpus/prepare_text.py, corpus/prepare_chats.py and corpus/prepare_prompts.py (the steps), 1-pretrain.py
(trains on the data), curation/commands.py (clean, dedup, decontaminate, download).
"""

from dataclasses import dataclass, replace

from common import cli
from common.errors import UserError, fail_in_one_line
from common.locks import lock_output
from corpus.data_config import (
    ChatDataConfig,
    DataConfig,
    DpoDataConfig,
    PretrainDataConfig,
    PromptDataConfig,
    SftDataConfig,
)
from corpus.dataset_writer import check_replaceable, dataset_staging_folder
from corpus.input_files import expand_inputs
from corpus.job_state import PROGRESS_FILE
from corpus.layouts import print_layouts
from corpus.prepare_chats import prepare_chats
from corpus.prepare_prompts import prepare_prompts
from corpus.prepare_text import prepare_text
from corpus.preview import print_prompts, print_samples, sample_examples, sample_prompts
from corpus.progress import reading_progress_bar
from corpus.stats import DataStats
from corpus.stats_tables import print_stats
from curation import commands
from curation.perplexity_filter import PerplexityFilter, PerplexityFlags, print_histogram
from model.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class FilteredSftConfig(SftDataConfig, PerplexityFlags):
    """chats -> jsonl and token shards for 3-full_sft.py"""

    main_flags = (
        "files", "out_dir", "tokenizer", "max_seq_len", "chat_format", "keys", "val_fraction", "check_only",
        "max_bad_fraction", "scorer",
    )  # fmt: skip


DATA_COMMANDS = {
    "pretrain": PretrainDataConfig,
    "sft": FilteredSftConfig,
    "dpo": DpoDataConfig,
    "rl": PromptDataConfig,
    **commands.CURATION_COMMANDS,
}


def main(arguments: list[str] | None = None) -> None:
    exits = {"--list_layouts": ("list the supported row layouts and exit", print_layouts)}
    command, config = cli.parse_command(DATA_COMMANDS, __doc__, arguments, exits)
    if command in commands.CURATION_COMMANDS:
        return commands.run_curation_command(command, config)
    config = replace(config, files=tuple(expand_inputs(config.files)))
    tokenizer = config.load_tokenizer() if command != "rl" else None
    chat_filter = make_filter(config) if command == "sft" and config.scorer else None
    if config.check_only:
        return preview_dataset(config, tokenizer, chat_filter)
    with lock_output(config.out_dir):
        write_dataset(config, tokenizer, chat_filter)


def make_filter(config: FilteredSftConfig) -> PerplexityFilter:
    """Score the chats with --scorer, and choose those between the limits of --keep_entropy."""
    from curation.perplexity_scorer import score_chats  # imports torch

    scores = score_chats(config, config.read_examples)
    return PerplexityFilter(scores, config.keep_entropy, config.keep_fraction)


def write_dataset(
    config: PretrainDataConfig | ChatDataConfig | PromptDataConfig,
    tokenizer: ChatTokenizer,
    chat_filter: PerplexityFilter | None,
) -> None:
    """Write the dataset to --out_dir and print the statistics of its rows. Prompts need no tokenizer."""
    if check_replaceable(config.out_dir):
        print(f"{config.out_dir} holds an older dataset: it is replaced when the new one is complete")
    staging, stats = dataset_staging_folder(config.out_dir), config.new_stats()
    if (staging / PROGRESS_FILE).is_file():
        print(f"{staging} holds an unfinished run: it is resumed if files and settings are the same, else replaced")
    try:
        with reading_progress_bar(config.files, stats) as on_batch:
            if isinstance(config, PretrainDataConfig):
                meta = prepare_text(config, tokenizer, stats, on_batch)
            elif isinstance(config, PromptDataConfig):
                meta = prepare_prompts(config, stats, on_batch)
            else:
                meta = prepare_chats(config, tokenizer, stats, on_batch, chat_filter)
    except (UserError, KeyboardInterrupt):
        if (staging / PROGRESS_FILE).is_file():
            print(f"unfinished work is kept in {staging}: the same command resumes it; delete it to free the space")
        raise
    print_stats(stats)
    if chat_filter:
        print_histogram(chat_filter)
    print_too_long(stats)
    unit, sizes = "prompts", meta.get("rows", {})
    if "splits" in meta:
        unit, sizes = "tokens", {name: split["tokens"] for name, split in meta["splits"].items()}
    print(f"written: {config.out_dir} ({unit}: {', '.join(f'{name} {size:,}' for name, size in sizes.items())})")
    print(f"next: python {config.training_script} --data_path {config.out_dir}")


def preview_dataset(config: DataConfig, tokenizer: ChatTokenizer, chat_filter: PerplexityFilter | None) -> None:
    """Print the statistics and some samples of the dataset that the command would write."""
    stats = config.new_stats()
    with reading_progress_bar(config.files, stats) as on_batch:
        if isinstance(config, PromptDataConfig):
            prompts = sample_prompts(config, stats, on_batch)
        else:
            samples = sample_examples(config, tokenizer, stats, on_batch, chat_filter)
    print_stats(stats)
    print_too_long(stats)
    if isinstance(config, PromptDataConfig):
        print_prompts(prompts)
    else:
        print_samples(samples, tokenizer, ("chosen", "rejected") if isinstance(config, DpoDataConfig) else ())
    if not stats.kept:
        raise UserError("these files have no trainable row: see the table of rows above")
    if chat_filter:
        print_histogram(chat_filter)


def print_too_long(stats: DataStats) -> None:
    """Print a note if more than 5 % of the rows were dropped for their length: easy to overlook in a table."""
    too_long = sum(reason.count for name, reason in stats.dropped.items() if name.endswith(" tokens"))
    if too_long > 0.05 * stats.read:
        print(f"note: {too_long / stats.read:.1%} of the rows do not fit: a larger --max_seq_len keeps more of them")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
