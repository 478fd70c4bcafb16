"""Flags of serve_openai_api.py and web_demo.py. The modules of the server and of the page read these configurations.

Imports no torch.
Read next: middleware.py (keys, hosts, sizes), connections.py (connections, timeouts), scheduler.py (running and waiting
requests), page.py (the chat page).
"""

import functools
import ipaddress
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import Config, NameList, flag
from common.errors import UserError
from common.flag_groups import InferenceFlags, RunFlags
from common.flag_types import (
    DTYPE_NAMES,
    int_at_least,
    int_between,
    non_empty_text,
    non_negative_int,
    path_string,
    positive_int,
)
from model.chat_template import CHAT_FORMATS
from model.rope_flags import RopeFlags

# System -> the variable that names the folder of a user's data, and its default below the home folder.
_USER_DATA = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Application Support")}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")  # names of this machine in the Host header


def is_this_machine(host: str) -> bool:
    """Whether a server that listens on `host` accepts connections from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


@dataclass(frozen=True)
class ServeConfig(RopeFlags, InferenceFlags, RunFlags):
    """One server. `max_num_seqs` and `max_queue` count per model."""

    main_flags = (
        "checkpoint", "out_dir", "host", "port", "api_key", "api_key_file", "max_context", "max_num_seqs", "max_queue",
        "quantize", "device",
    )  # fmt: skip
    checkpoint: tuple[str, ...] = flag(
        (), ".pth files or transformers folders; NAME=FILE sets a model's name",
        nargs="+", type=path_string, metavar="FILE", group="models",
    )  # fmt: skip
    max_context: int = flag(4096, "tokens of prompt and answer together, at most", type=int_at_least(8), group="models")
    strict_model_names: bool = flag(
        False, "404 for unknown model names (default: a server of one model uses it for any name)", group="models"
    )
    sampling_preset: str = flag(
        "auto", "sampling defaults of chats: the preset of the model's chat format (auto), none, or another format's",
        choices=("auto", "none", *CHAT_FORMATS), group="models",
    )  # fmt: skip
    host: str = flag(
        "127.0.0.1", "address to listen on (default: 127.0.0.1, this machine only)", type=non_empty_text, group="access"
    )
    port: int = flag(8000, "0: any free port", type=int_between(0, 65535), group="access")
    api_key: str = flag(
        "", "clients must send it; other users of this machine can see it in the process list (ps) "
        "(default: $MENGYA_API_KEY, else none)", type=non_empty_text, metavar="KEY", group="access",
    )  # fmt: skip
    api_key_file: str = flag("", "further keys, one per line", type=path_string, metavar="FILE", group="access")
    allowed_hosts: tuple[str, ...] = flag(
        (), "further names accepted in the Host header (default: localhost, 127.0.0.1, ::1, --host; any with a key)",
        action=NameList, metavar="NAME", group="access",
    )  # fmt: skip
    cors: tuple[str, ...] = flag(
        (), "origins of web pages that may send requests, as https://chat.example.org",
        action=NameList, metavar="ORIGIN", group="access",
    )  # fmt: skip
    max_num_seqs: int = flag(
        16, "sequences per model that run in one batch", type=positive_int, aliases=("seats",), group="limits"
    )
    max_queue: int = flag(
        64, "more that wait; further requests get 429", type=non_negative_int, aliases=("queue",), group="limits"
    )
    max_request_bytes: int = flag(2**20, "larger requests get 413", type=positive_int, group="limits")
    max_queued_bytes: int = flag(
        0, "total of large requests; further ones get 429 (default: 16 times --max_request_bytes)",
        type=positive_int, group="limits",
    )  # fmt: skip
    max_connections: int = flag(256, "further ones replace idle ones", type=int_at_least(2), group="limits")
    client_timeout: int = flag(
        30, "seconds a client has to send headers, to send each MiB of a body, and to read part of the answer",
        type=int_at_least(1), group="limits",
    )  # fmt: skip
    dtype: str = flag(
        "float32", "float32: text independent of other requests; auto, bfloat16, float16: faster where native",
        choices=DTYPE_NAMES, group="machine",
    )  # fmt: skip

    def check(self) -> None:
        """Raises UserError for an invalid key, and for a --host other than this machine without a key."""
        super().check()
        if not self.api_keys and not is_this_machine(self.host):
            need = "set --api_key KEY or --api_key_file FILE as well"
            raise UserError(f"--host {self.host} accepts other machines: {need}")
        if self.queued_bytes_limit < self.max_request_bytes:
            limits = f"{self.max_queued_bytes} is less than --max_request_bytes {self.max_request_bytes}"
            raise UserError(f"--max_queued_bytes {limits}")

    @property
    def queued_bytes_limit(self) -> int:
        """Total size of the bodies above middleware.SMALL_BODY_BYTES that are being read or answered."""
        return self.max_queued_bytes or 16 * self.max_request_bytes

    @functools.cached_property
    def api_keys(self) -> tuple[str, ...]:
        """The keys, of which a request needs one: --api_key, or else $MENGYA_API_KEY, and those of --api_key_file.

        Raises UserError for a key that a header cannot contain, and for a file that cannot be read or has no key.
        """
        given = self.api_key or os.environ.get("MENGYA_API_KEY")
        keys = [("--api_key", given)] if given else []
        if self.api_key_file:
            source = f"--api_key_file {self.api_key_file}"
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8 text"
                raise UserError(f"{source}: {reason}: use a text file with one key per line") from None
            in_file = [(source, line.strip()) for line in lines if line.strip()]
            if not in_file:
                raise UserError(f"{source}: no key in it: write one key per line")
            keys += in_file
        for source, key in keys:
            if not (key.isascii() and key.isprintable() and " " not in key):
                raise UserError(f"{source}: a key must be printable ASCII without spaces")
        return tuple(key for _, key in keys)

    @property
    def accepted_hosts(self) -> frozenset[str] | None:
        """Accepted names in the Host header, in lower case; None accepts all.

        A server without a key checks them, because a web page can send requests to this machine under the page's own
        host name (DNS rebinding).
        """
        if self.api_keys and not self.allowed_hosts:
            return None
        return frozenset(name.lower() for name in (*LOCAL_HOSTS, self.host, *self.allowed_hosts))


@dataclass(frozen=True)
class PageConfig(RopeFlags, InferenceFlags, Config):
    """The chat page."""

    out_dir: str = flag(
        "", "folder of the models (default: out, here or in the project's folder)", type=path_string, group="models"
    )
    checkpoint: tuple[str, ...] = flag(
        (), ".pth files or transformers folders to use instead",
        nargs="+", type=path_string, metavar="FILE", group="models",
    )  # fmt: skip
    lookup_file: str = flag(
        "", "jsonl file of facts for the tool lookup", type=path_string, metavar="FILE", group="page"
    )
    history_dir: str = flag(
        "", "folder of saved conversations; none: save nothing (default: mengya/chats in the folder of your user's "
        "data, and none where --host accepts other machines, because everybody who opens the page sees them)",
        type=path_string, metavar="DIR", group="page",
    )  # fmt: skip
    host: str = flag(
        "127.0.0.1", "address to listen on; 0.0.0.0 accepts other machines", type=non_empty_text, group="page"
    )
    port: int = flag(8501, "port to listen on", type=int_between(1, 65535), group="page")
    lang: str = flag("auto", "initial language (auto: the browser's)", choices=("auto", "zh", "en"), group="page")

    @property
    def models_dir(self) -> Path:
        """--out_dir, else out/ in the working directory, else out/ in the project's folder."""
        if self.out_dir:
            return Path(self.out_dir)
        return Path("out") if Path("out").is_dir() else Path(__file__).resolve().parent.parent / "out"

    @property
    def history_folder(self) -> Path | None:
        """--history_dir, else mengya/chats in the folder where this system keeps a user's data.

        None saves nothing: the user's choice, or other machines may open the page, or there is no home folder.
        """
        if self.history_dir:
            return Path(self.history_dir) if self.history_dir != "none" else None
        if not is_this_machine(self.host):
            return None
        variable, folder = _USER_DATA.get(sys.platform, ("XDG_DATA_HOME", ".local/share"))
        named = Path(os.environ.get(variable, ""))
        try:
            root = named if named.is_absolute() else Path.home() / folder
        except RuntimeError:  # a user without an entry in the user database
            return None
        return root / "mengya" / "chats"
