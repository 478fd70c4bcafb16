"""Fetching a public data set: from the hub or a mirror, going on where the line broke, checked against its checksum.

    python data_process.py download                          what there is
    python data_process.py download minimind-sft
    python data_process.py download skypile --file data/2020-40_zh_head_0001.jsonl
    python data_process.py download ceval --mirror hf-mirror       hub, hf-mirror, modelscope, or an address

A file grows as <name>.part; beside it <name>.part.json says of which version it is (size and checksum as the server
gave them). Each break is followed by another request for the bytes that are missing; the same command goes on after a
kill. When all bytes are there, the SHA-256 that the hub publishes for large files (the header X-Linked-Etag of its
answer) must fit, then the file gets its name. Archives are unpacked.

Writes  dataset/raw/<set>/<file>.  Read next: catalogue.py (the sets), ../dataset/README.md.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import UserError
from common.files import atomic_write, replace_file, write_json
from common.locks import locked
from corpus.shard_writer import writing
from curation.catalogue import CATALOGUE, Source

MIRRORS = {"hub": "https://huggingface.co", "hf-mirror": "https://hf-mirror.com", "modelscope": "modelscope"}
PIECE = 1 << 20
PATIENCE = 6  # breaks in a row that bring not one byte
TIMEOUT = 60.0  # seconds without an answer
LATER = (408, 425, 429, 500, 502, 503, 504)  # answers that may be better in a while

DISK = (
    errno.ENOSPC,
    getattr(errno, "EDQUOT", errno.ENOSPC),
    errno.EACCES,
    errno.EROFS,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
)

Progress = Callable[[int, int], None]  # bytes that are here, bytes in all (0: not known)


@dataclass
class Version:
    """What the server says a file is: two answers of the same version may be put together."""

    size: int = 0  # 0: it does not say
    etag: str = ""

    @property
    def sha256(self) -> str:
        """The checksum, where the tag is one: the hub tags large files by their SHA-256."""
        return self.etag if re.fullmatch(r"[0-9a-f]{64}", self.etag) else ""


class _Linked(urllib.request.HTTPRedirectHandler):
    """Remembers the tag that the hub gives before it sends us to where the bytes are."""

    etag = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.etag = self.etag or headers.get("X-Linked-Etag", "")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, target: Path, progress: Progress = lambda have, size: None) -> Path:
    """Download `url` to `target`, going on with what an earlier call left. Returns the target.

    Raises UserError when the server refuses, when the line stays broken, or when the checksum does not fit.
    """
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    version, breaks, problem = _read_note(note), 0, ""
    while breaks < PATIENCE:
        have = part.stat().st_size if part.is_file() else 0
        if have and have == version.size:
            break
        time.sleep(min(30.0, 0.5 * 2**breaks) if breaks else 0.0)
        try:
            version, ended = _receive(url, part, note, version, have, progress)
            if ended:
                break
            problem = "the connection was closed"
        except (OSError, http.client.HTTPException) as error:
            problem = _reason(error, url, target)
        breaks = 0 if part.is_file() and part.stat().st_size > have else breaks + 1
    else:
        raise UserError(
            f"{url}: {problem} ({PATIENCE} times in a row): what is here so far is kept; "
            "run the same command again, or take another --mirror"
        )
    if version.sha256 and _sha256(part) != version.sha256:
        part.unlink()
        note.unlink(missing_ok=True)
        raise UserError(
            f"{url}: what came does not have the checksum that the server states; it was deleted: try again"
        )
    with writing(target.parent):
        replace_file(part, target)
    note.unlink(missing_ok=True)
    return target


def _receive(url: str, part: Path, note: Path, version: Version, have: int, progress: Progress) -> tuple[Version, bool]:
    """One request for the bytes from `have` on. Returns the version, and whether all of it is here."""
    linked = _Linked()
    headers = {"User-Agent": "data_process.py", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = urllib.request.build_opener(linked).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # what is here is longer than the file, or the file has changed
            part.unlink()
            return Version(), False
        raise
    with answer:
        found = Version(_total(answer, have), (linked.etag or answer.headers.get("ETag", "")).strip('W/"'))
        goes_on = answer.status == 206 and _starts_at(answer) == have and (not version.size or found == version)
        if have and answer.status == 206 and not goes_on:
            part.unlink()
            return Version(), False  # another version by now: from the start
        if not goes_on:
            part.unlink(missing_ok=True)  # before the note says what the next bytes are of
        write_json(note, asdict(found))
        with part.open("ab" if goes_on else "wb") as file:
            have = have if goes_on else 0
            while piece := answer.read(PIECE):
                file.write(piece)
                have += len(piece)
                progress(have, found.size)
    return found, have == found.size if found.size else True


def _total(answer: Any, have: int) -> int:
    """Bytes of the whole file, as the answer says it; 0 when it does not."""
    whole = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
    if whole:
        return int(whole[1])
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else 0


def _starts_at(answer: Any) -> int:
    start = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(start[1]) if start else -1


def _reason(error: Exception, url: str, target: Path) -> str:
    """What went wrong, for the next attempt. Raises UserError where another attempt is of no use."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (401, 403):
            raise UserError(
                f"{url}: the server wants you to accept terms or to log in ({error.code}): download the file with a "
                f"browser and put it at {target}"
            ) from None
        if error.code not in LATER:
            raise UserError(f"{url}: {error.code} {error.reason}: look at its page, or take another --mirror") from None
        return f"{error.code} {error.reason}"
    if isinstance(error, OSError) and error.errno in DISK:
        raise UserError(
            f"cannot write {target}: {error.strerror}: free some space or choose another --out_dir"
        ) from None
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _read_note(note: Path) -> Version:
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
        return Version(int(saved["size"]), str(saved["etag"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Version()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


# ---- archives --------------------------------------------------------------------------------------------------------
def unpack(archive: Path) -> list[Path]:
    """Unpack a zip or tar beside itself; returns its files. Anything else is returned as it is.

    Raises UserError for a damaged archive, and for one with a file that would land outside the folder.
    """
    is_tar = re.search(r"\.(tar|tgz|tar\.\w+)$", archive.name)
    if not is_tar and archive.suffix != ".zip":
        return [archive]
    try:
        with contextlib.ExitStack() as stack:
            if is_tar:
                tar = stack.enter_context(tarfile.open(archive))
                members = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
                return [_place(archive, name, content) for name, content in members]
            packed = stack.enter_context(zipfile.ZipFile(archive))
            names = [name for name in packed.namelist() if not name.endswith("/")]
            return [_place(archive, name, stack.enter_context(packed.open(name))) for name in names]
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): delete it and download it again") from None


def leaves_folder(name: str) -> bool:
    """Whether a relative POSIX path could name something outside the folder it is joined to, or the folder itself."""
    path = PurePosixPath(name)
    return not path.name or path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:|.*\\", name))


def _place(archive: Path, name: str, content: Any) -> Path:
    if leaves_folder(name):
        raise UserError(f"{archive} holds a file that would land outside its folder ({name}): nothing more is unpacked")
    target = archive.parent.joinpath(*PurePosixPath(name).parts)
    with atomic_write(target, "free some space or choose another --out_dir") as file:
        shutil.copyfileobj(content, file, PIECE)
    return target


# ---- the command -----------------------------------------------------------------------------------------------------
def print_catalogue() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "what", "size", "licence", "then")
    for entry in CATALOGUE.values():
        table.add_row(entry.name, entry.what, size_text(entry.size), entry.licence, entry.command)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)
    print(
        "python data_process.py download NAME fetches one; read its licence first: none of them is part of this project"
    )


def download(name: str, files: list[str], mirror: str, out_dir: str) -> list[Path]:
    """Fetch a set of the catalogue (`files` of its repository, or those that it names) and unpack it."""
    if name not in CATALOGUE:
        raise UserError(f"{name}: no such data set; there are {', '.join(CATALOGUE)}")
    entry, folder = CATALOGUE[name], Path(out_dir) / name
    for file in files:
        if leaves_folder(file):
            raise UserError(f"--file {file}: give the path of a file in the repository, as {entry.files[0]}")
    with locked(folder):
        return _download(entry, files, mirror, folder)


def _download(entry: Source, files: list[str], mirror: str, folder: Path) -> list[Path]:
    places = [folder / PurePosixPath(file).name for file in files or entry.files]
    if not files and not all(place.is_file() for place in places):
        require_space(folder, entry.size)
    found: list[Path] = []
    for file, place in zip(files or entry.files, places, strict=True):
        if place.is_file():
            print(f"{place} is already there")
        else:
            with progress_bar(place.name) as progress:
                _from_any_mirror(entry, file, place, mirror, progress)
        found += unpack(place)
    print(f"licence: {entry.licence}")
    shown = str(found[0]) if len(found) == 1 else str(folder)
    print(f"here: {shown}" + (f" ({len(found)} files)" if len(found) > 1 else ""))
    print(f"next: {entry.command.replace('FILE', shown)}")
    return found


def _from_any_mirror(entry: Source, file: str, place: Path, mirror: str, progress: Progress) -> None:
    """From the mirror that was asked for, or from the first that answers."""
    problems = []
    for address in mirrors_of(entry, mirror):
        url = entry.url(file, address)
        print(f"from {url}")
        try:
            fetch(url, place, progress)
            return
        except UserError as error:
            problems.append(error)
    raise problems[0] if len(problems) == 1 else UserError("; ".join(map(str, problems)))


def mirrors_of(entry: Source, mirror: str) -> list[str]:
    """Addresses to try, in this order. HF_ENDPOINT stands for the hub, as it does for the hub's own tools."""
    there = [name for name in MIRRORS if (entry.modelscope if name == "modelscope" else entry.repository)]
    if not mirror:
        return [os.environ.get("HF_ENDPOINT") or MIRRORS[name] if name == "hub" else MIRRORS[name] for name in there]
    if mirror in MIRRORS and mirror not in there:
        raise UserError(f"{entry.name} is not at {mirror}: choose {' or '.join(there)}")
    if mirror not in MIRRORS and not mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {mirror}: choose {', '.join(MIRRORS)} or an address that begins with https://")
    return [MIRRORS.get(mirror, mirror)]


def require_space(folder: Path, size: int) -> None:
    """Raises UserError unless the disk has room for `size` bytes."""
    place = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise UserError(f"{size_text(size)} do not fit on the disk of {place} ({size_text(free)} free): use --out_dir")


def size_text(size: int) -> str:
    if not size:
        return "see its page"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Progress]:
    """A live bar on a terminal, a line every ten percent elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    said = -1
    with Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def move(have: int, size: int) -> None:
            nonlocal said
            bar.update(task, completed=have, total=size or None)
            tenth = 10 * have // size if size else -1
            if not console.is_terminal and tenth > said:
                said = tenth
                print(f"{name}: {10 * tenth} % of {size_text(size)}", flush=True)

        yield move
