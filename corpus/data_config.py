"""Settings of `data_process.py pretrain`, `sft` and `dpo`.

Read next: ../data_process.py (the commands), prepare_text.py and prepare_chats.py (the steps).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from common.cli import Config, flag
from common.errors import UserError
from common.flag_types import (
    ACCEPT_DAMAGED_HELP,
    fraction,
    fraction_below_one,
    non_negative_int,
    path_string,
    positive_int,
)
from corpus.examples import (
    ChatExample,
    PairExample,
    TextExample,
    read_chat_examples,
    read_documents,
    read_pair_examples,
)
from corpus.layouts import parse_keys
from corpus.row_text import RowReader
from corpus.stats import DataStats
from model.chat_template import CHAT_FORMATS
from model.tokenizer import ChatTokenizer, load_tokenizer


@dataclass(frozen=True)
class DataConfig(Config):
    """Input files, output folder and limits of a dataset."""

    files: tuple[str, ...] = flag(
        (),
        "txt, jsonl, json, csv, parquet, arrow; also .gz .xz .zst .bz2; or folders",
        positional=True,
        nargs="+",
        type=path_string,
        metavar="FILES",
    )
    tokenizer: str = flag("model/tokenizer", "folder of the tokenizer", type=path_string)
    out_dir: str = flag("dataset", "folder to write", type=path_string)
    val_fraction: float = flag(
        0.01, "fraction held out for validation", type=fraction_below_one, aliases=("val_share",)
    )
    max_bad_fraction: float = flag(
        0.01, "maximum fraction of unusable rows", type=fraction, aliases=("max_bad_share",)
    )
    accept_damaged: bool = flag(False, ACCEPT_DAMAGED_HELP)
    check: bool = flag(False, "print statistics and samples, write nothing")
    samples: int = flag(3, "number of samples printed by --check", type=non_negative_int)
    keys: str = flag(
        "",
        "keys of another row layout, for example prompt=ask,answer=reply; fields: --list_layouts",
        metavar="FIELD=KEY,…",
    )

    @property
    def reader(self) -> RowReader:
        """Raises UserError for malformed --keys."""
        return RowReader(parse_keys(self.keys))

    def make_stats(self) -> DataStats:
        return DataStats(self.max_bad_fraction, self.accept_damaged)

    def load_tokenizer(self) -> ChatTokenizer:
        """Load the tokenizer. Raises UserError with the command that trains one."""
        try:
            return load_tokenizer(self.tokenizer)
        except UserError:
            raise
        except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot parse
            problem = f"{self.tokenizer} is not a valid tokenizer ({error})"
            raise UserError(f"{problem}: train one with train_tokenizer.py") from None


@dataclass(frozen=True)
class PretrainDataConfig(DataConfig):
    """text (or chats, as plain text) -> token shards for 1-pretrain.py"""

    out_dir: str = "dataset/pretrain"
    source_key: str = flag(
        "",
        "row key that holds the source, or `file` for the file name; for 1-pretrain.py --mix",
        metavar="KEY",
    )

    def read_examples(self, stats: DataStats) -> Iterator[TextExample]:
        return read_documents(self.files, stats, self.source_key, self.reader)


@dataclass(frozen=True)
class ChatDataConfig(DataConfig):
    """Settings that chats and pairs share."""

    example_type: ClassVar[type[ChatExample] | type[PairExample]]
    longer: ClassVar[str]
    max_seq_len: int = flag(
        512, lambda config: f"longer {config.longer}; training scripts have the same flag", type=positive_int
    )
    chat_format: str = flag("", "chat template (default: that of the tokenizer folder)", choices=CHAT_FORMATS)

    def read_examples(self, stats: DataStats) -> Iterator[Any]:
        """Yield the examples of `files`; count the other rows."""
        raise NotImplementedError

    @property
    def row_choice(self) -> dict[str, Any]:
        """The settings of `read_examples`, which a resumed run must have as well."""
        return self.reader.key_settings()

    def load_tokenizer(self) -> ChatTokenizer:
        return super().load_tokenizer().with_chat_format(self.chat_format or None)


@dataclass(frozen=True)
class SftDataConfig(ChatDataConfig):
    """chats -> jsonl and token shards for 3-full_sft.py"""

    example_type = ChatExample
    longer = "chats lose their last turns"
    out_dir: str = "dataset/sft"
    only: str = flag("", "keep only chats of one turn, or of several", choices=("single", "multi"))

    def read_examples(self, stats: DataStats) -> Iterator[ChatExample]:
        return read_chat_examples(self.files, stats, self.reader, self.only)

    @property
    def row_choice(self) -> dict[str, Any]:
        return super().row_choice | ({"only": self.only} if self.only else {})


@dataclass(frozen=True)
class DpoDataConfig(ChatDataConfig):
    """pairs of a chosen and a rejected answer -> jsonl and token shards for 5-dpo_train.py"""

    example_type = PairExample
    longer = "pairs lose the first turns of their prompt"
    out_dir: str = "dataset/dpo"
    val_fraction: float = 0.05  # pairs are few, and the accuracy on a pair is only 0 or 1

    def read_examples(self, stats: DataStats) -> Iterator[PairExample]:
        return read_pair_examples(self.files, stats, self.reader)
