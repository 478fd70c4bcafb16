"""Catalogue of public datasets for small Chinese and bilingual models, and the mirrors that have them.

    catalogue.json    name, description, repository of the hub and of ModelScope, files, size in bytes (approximate; 0:
                      unknown), licence as stated there, next command (FILE stands for the downloaded file)

The project contains none of this data. Sizes are those listed by the repositories. The revision is pinned where a
repository has changed its files. Checksums are not stored here: the hub publishes the SHA-256 of every large file.
Read next: download.py (downloads an entry), ../dataset/README.md (the same list as a table).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from common.errors import UserError

MIRRORS = {"hub": "https://huggingface.co", "hf-mirror": "https://hf-mirror.com", "modelscope": "modelscope"}


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset in a repository of the Hugging Face hub, of ModelScope, or of both."""

    name: str
    description: str
    files: tuple[str, ...]
    size: int
    licence: str
    command: str
    repository: str = ""
    modelscope: str = ""
    revision: str = "main"

    def url(self, file: str, mirror: str) -> str:
        """URL of a file on a mirror: "modelscope", or the base URL of the hub or of a server with the same paths."""
        if mirror == "modelscope":
            return f"https://modelscope.cn/datasets/{self.modelscope}/resolve/master/{quote(file)}"
        return f"{mirror.rstrip('/')}/datasets/{self.repository}/resolve/{self.revision}/{quote(file)}"

    def mirrors(self, mirror: str) -> list[str]:
        """The mirrors to try for --mirror, in order: base URLs or "modelscope". Raises UserError if it has none.

        HF_ENDPOINT replaces the URL of the hub, as in huggingface_hub.
        """
        urls = MIRRORS | ({} if mirror else {"hub": os.environ.get("HF_ENDPOINT") or MIRRORS["hub"]})
        available = [name for name in urls if (self.modelscope if name == "modelscope" else self.repository)]
        if not mirror:
            return [urls[name] for name in available]
        if mirror in urls and mirror not in available:
            raise UserError(f"{self.name} is not available at {mirror}: choose {' or '.join(available)}")
        if mirror not in urls and not mirror.startswith(("http://", "https://")):
            raise UserError(f"--mirror {mirror}: choose {', '.join(urls)} or a URL that begins with https://")
        return [urls.get(mirror, mirror)]


def _read_catalogue() -> dict[str, DatasetEntry]:
    rows = json.loads(Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8"))
    return {row["name"]: DatasetEntry(**{**row, "files": tuple(row["files"])}) for row in rows}


CATALOGUE = _read_catalogue()


def print_catalogue() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "description", "size", "licence", "next command")
    for entry in CATALOGUE.values():
        table.add_row(entry.name, entry.description, format_size(entry.size), entry.licence, entry.command)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)
    print("python data_process.py download NAME downloads one; read its licence first: none is part of this project")


def format_size(size: int) -> str:
    if not size:
        return "see its page"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
