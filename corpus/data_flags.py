"""Flags that all commands of data_process.py share: input files, output folder, limits.

Read next: ../data_process.py, ../curation/commands.py (the commands).
"""

from dataclasses import MISSING, dataclass

from common.cli import Config, flag
from common.flag_types import ACCEPT_DAMAGED_HELP, fraction, path_string
from corpus.layouts import parse_keys
from corpus.row_text import RowReader
from corpus.stats import DataStats


@dataclass(frozen=True)
class DataFlags(Config):
    """What a command reads, where it writes, and how many rows may be unusable."""

    files: tuple[str, ...] = flag(MISSING, "txt, jsonl, json, csv, parquet, arrow; also .gz .xz .zst .bz2; or folders",
                                  positional=True, nargs="+", type=path_string, metavar="FILES")  # fmt: skip
    out_dir: str = flag("", "folder to write", type=path_string)
    max_bad_fraction: float = flag(0.01, "maximum fraction of unusable rows", type=fraction, aliases=("max_bad_share",))
    accept_damaged: bool = flag(False, ACCEPT_DAMAGED_HELP)
    keys: str = flag("", "keys of another row layout, for example prompt=ask,answer=reply; fields: --list_layouts",
                     metavar="FIELD=KEY,…")  # fmt: skip

    @property
    def reader(self) -> RowReader:
        """Reads rows by --keys. Raises UserError for an invalid specification."""
        return RowReader(parse_keys(self.keys))

    def new_stats(self) -> DataStats:
        """Counts of one pass over the files, with the limits of the flags."""
        return DataStats(self.max_bad_fraction, self.accept_damaged)
