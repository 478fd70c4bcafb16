"""Settings of `data_process.py pretrain`, `sft`, `dpo` and `rl`.

Read next: data_flags.py (flags of all commands), prepare_text.py and prepare_chats.py (the steps).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from common.cli import flag
from common.errors import UserError
from common.flag_types import fraction_below_one, non_negative_int, path_string, positive_int
from corpus.data_flags import DataFlags
from corpus.examples import ChatExample, PairExample, PromptExample, TextExample
from corpus.read_examples import read_chat_examples, read_documents, read_pair_examples, read_prompt_examples
from corpus.stats import DataStats
from model.chat_template import CHAT_FORMATS
from model.tokenizer import ChatTokenizer, load_tokenizer


@dataclass(frozen=True)
class DataConfig(DataFlags):
    """Settings that all kinds of training data share."""

    training_script: ClassVar[str]

    val_fraction: float = flag(
        0.01, "fraction held out for validation", type=fraction_below_one, aliases=("val_share",)
    )
    check_only: bool = flag(False, "print statistics and samples, write nothing", name="check")
    samples: int = flag(3, "number of samples printed by --check", type=non_negative_int)

    def read_examples(self, stats: DataStats) -> Iterator[Any]:
        """Yield the examples of `files`; count the other rows in `stats`."""
        raise NotImplementedError


@dataclass(frozen=True)
class TokenDataConfig(DataConfig):
    """Settings of the kinds of data that are stored as tokens."""

    tokenizer: str = flag("model/tokenizer", "folder of the tokenizer", type=path_string)

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
class PretrainDataConfig(TokenDataConfig):
    """text (or chats, as plain text) -> token shards for 1-pretrain.py"""

    training_script = "1-pretrain.py"

    out_dir: str = "dataset/pretrain"
    source_key: str = flag(
        "", "row key that holds the source, or `file` for the file name; for 1-pretrain.py --mix", metavar="KEY"
    )

    def read_examples(self, stats: DataStats) -> Iterator[TextExample]:
        return read_documents(self.files, stats, self.source_key, self.reader)


@dataclass(frozen=True)
class ChatDataConfig(TokenDataConfig):
    """Settings that chats and pairs of answers share."""

    example_type: ClassVar[type[ChatExample] | type[PairExample]]

    max_seq_len: int = flag(
        512,
        "longer chats lose their last turns, longer pairs the first turns of their prompt; training scripts have the "
        "same flag",
        type=positive_int,
    )
    chat_format: str = flag("", "chat template (default: that of the tokenizer folder)", choices=CHAT_FORMATS)

    @property
    def row_choice(self) -> dict[str, Any]:
        """The settings that choose rows and their keys: a run resumes only if they are unchanged."""
        return self.reader.key_settings()

    def load_tokenizer(self) -> ChatTokenizer:
        return super().load_tokenizer().with_chat_format(self.chat_format or None)


@dataclass(frozen=True)
class SftDataConfig(ChatDataConfig):
    """chats -> jsonl and token shards for 3-full_sft.py"""

    training_script = "3-full_sft.py"
    example_type = ChatExample

    out_dir: str = "dataset/sft"
    only: str = flag("", "keep only chats of one turn, or of several", choices=("single", "multi"))

    @property
    def row_choice(self) -> dict[str, Any]:
        return self.reader.key_settings() | ({"only": self.only} if self.only else {})

    def read_examples(self, stats: DataStats) -> Iterator[ChatExample]:
        return read_chat_examples(self.files, stats, self.reader, self.only)


@dataclass(frozen=True)
class DpoDataConfig(ChatDataConfig):
    """pairs of a chosen and a rejected answer -> jsonl and token shards for 5-dpo_train.py"""

    training_script = "5-dpo_train.py"
    example_type = PairExample

    out_dir: str = "dataset/dpo"
    val_fraction: float = 0.05  # pairs are few, and the accuracy on a pair is only 0 or 1

    def read_examples(self, stats: DataStats) -> Iterator[PairExample]:
        return read_pair_examples(self.files, stats, self.reader)


@dataclass(frozen=True)
class PromptDataConfig(DataConfig):
    """questions and answers, or chats -> jsonl of prompts with references for 6-grpo_train.py"""

    training_script = "6-grpo_train.py"

    out_dir: str = "dataset/rl"
    val_fraction: float = 0.05  # prompts are few

    def read_examples(self, stats: DataStats) -> Iterator[PromptExample]:
        return read_prompt_examples(self.files, stats, self.reader)
