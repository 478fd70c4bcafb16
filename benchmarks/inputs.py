"""Make the inputs of the benchmarks offline: text of random words, a tokenizer, token shards, a model, its exports.

    python -m benchmarks.inputs FOLDER --preset small --gguf f32,q8_0

    FOLDER/tokenizer/                        6,400 entries, trained on the text
    FOLDER/model.pth   FOLDER/hf/            a model of the preset with random weights, and its transformers folder
    FOLDER/model-f32.gguf, model-q8_0.gguf   its exports for llama.cpp
    FOLDER/text.jsonl  FOLDER/shards/        with --tokens: that many random words, and their dataset for 1-pretrain.py

The speed of training and generation does not depend on the values of weights and tokens. The rows of the special tokens
in the embedding are zeros: their logits are 0, so greedy decoding never stops at one, and every generator writes the
requested number of tokens.

Read next: generation.py, gpu.py (the callers).
"""

import itertools
import json
import random
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import torch

from common import cli
from common.cli import Config, NameList, flag
from common.errors import fail_in_one_line
from common.files import write_text
from common.flag_types import non_negative_int, pathlib_path
from corpus.data_config import PretrainDataConfig
from corpus.prepare_text import prepare_text
from corpus.tokenizer_training import train_tokenizer
from export.gguf_export import QUANTIZATIONS, write_gguf
from export.hf_export import write_hf_folder
from model.checkpoint import save_model
from model.config import PRESETS, ModelConfig
from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, ChatTokenizer, load_tokenizer, save_tokenizer
from model.transformer import Transformer

VOCAB_SIZE = 6400  # the default of train_tokenizer.py
NUM_WORDS, WORDS_PER_LINE = 8000, 200


@dataclass(frozen=True)
class InputsConfig(Config):
    """The command line."""

    folder: Path = flag(MISSING, "folder to write", type=pathlib_path, positional=True)
    preset: str = flag("small", "model size", choices=tuple(PRESETS))
    max_seq_len: int = flag(0, "context length of the model (0: the preset's)", type=non_negative_int)
    gguf: tuple[str, ...] = flag((), f"formats of the GGUF files: {', '.join(QUANTIZATIONS)}", action=NameList)
    tokens: int = flag(0, "also write a training set of about this many tokens", type=non_negative_int)


def random_lines(words: int, seed: int = 0) -> list[str]:
    """Return lines of random words; the frequency of a word falls with its rank, as in natural text."""
    rng = random.Random(seed)
    syllables = [first + vowel + last for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in ("", "n", "r")]
    vocabulary = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(NUM_WORDS)})
    rng.shuffle(vocabulary)
    weights = list(itertools.accumulate(1 / (rank + 20) for rank in range(len(vocabulary))))
    drawn = rng.choices(vocabulary, cum_weights=weights, k=words)
    return [" ".join(drawn[i : i + WORDS_PER_LINE]) for i in range(0, words, WORDS_PER_LINE)]


def make_tokenizer(folder: Path) -> ChatTokenizer:
    """Train the tokenizer of VOCAB_SIZE entries, or load that of an earlier call."""
    if not (folder / "tokenizer.json").is_file():
        reserved = (*SPECIAL_TOKENS, *SPARE_TOKENS)
        save_tokenizer(train_tokenizer("bpe", random_lines(200_000), VOCAB_SIZE, reserved), folder)
    return load_tokenizer(folder)


def make_model(preset: str, tokenizer: ChatTokenizer, max_seq_len: int = 0) -> Transformer:
    """Return a model of the preset with random weights; the embeddings of special tokens are zeros."""
    torch.manual_seed(0)
    settings = PRESETS[preset] | ({"max_seq_len": max_seq_len} if max_seq_len else {})
    model = Transformer(ModelConfig(**{**settings, "vocab_size": tokenizer.vocab_size})).eval()
    with torch.no_grad():
        model.lm_head.weight[[*tokenizer.special_ids]] = 0
    return model


def make_shards(folder: Path, tokenizer: ChatTokenizer, tokens: int) -> Path:
    """Write a dataset for 1-pretrain.py of at least `tokens` tokens; returns its folder. A word has a token or more."""
    rows = (json.dumps({"text": line, "lang": "en"}) + "\n" for line in random_lines(tokens, seed=1))
    write_text(folder / "text.jsonl", "".join(rows))
    config = PretrainDataConfig((str(folder / "text.jsonl"),), out_dir=str(folder / "shards"), val_fraction=0.0)
    prepare_text(replace(config, tokenizer=str(folder / "tokenizer")), tokenizer, config.new_stats())
    return folder / "shards"


def make_inputs(config: InputsConfig) -> None:
    """Write all inputs."""
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder / "tokenizer")
    model = make_model(config.preset, tokenizer, config.max_seq_len)
    save_model(folder / "model.pth", model, "pretrain", tokenizer, [])
    (folder / "hf").mkdir(exist_ok=True)
    write_hf_folder(folder / "hf", model, tokenizer, torch.float32, 10**12)
    for name in config.gguf:
        write_gguf(folder / f"model-{name}.gguf", model, tokenizer, name, {"stage": "pretrain", "size": config.preset})
    if config.tokens:
        make_shards(folder, tokenizer, config.tokens)
    print(json.dumps({"parameters": model.count_parameters()[0]}))  # a case of harness.py ends with JSON


if __name__ == "__main__":
    with fail_in_one_line():
        make_inputs(cli.parse(InputsConfig, __doc__))
