"""Downloads public datasets from the hub or a mirror: resumes after a lost connection and verifies the SHA-256.

    python data_process.py download                          lists the datasets
    python data_process.py download minimind-sft
    python data_process.py download skypile --file data/2020-40_zh_head_0001.jsonl
    python data_process.py download ceval --mirror hf-mirror       hub, hf-mirror, modelscope, or a URL

Bytes are appended to <name>.part; <name>.part.json records the version they belong to (size and ETag of the response).
After a lost connection the next request asks for the missing bytes (Range); after a kill the same command resumes. The
complete file is compared with the SHA-256 that the hub publishes for large files (response header X-Linked-Etag), then
renamed. Archives are unpacked.

Writes  dataset/raw/<dataset>/<file>.  Read next: catalogue.py (the datasets), ../dataset/README.md.
"""

import contextlib
import errno
import hashlib
import http.client
import json
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

from common.cli import Config, flag
from common.errors import UserError
from common.files import atomic_write, replace_file, report_write_errors, write_json
from common.flag_types import non_empty_text, path_string, relative_path
from common.locks import lock_output
from curation.catalogue import CATALOGUE, DatasetEntry, format_size

DOWNLOAD_CHUNK_BYTES = 1 << 20
MAX_FAILED_ATTEMPTS = 6  # consecutive requests that return no byte
DOWNLOAD_TIMEOUT = 60.0  # seconds without data from the server
RETRY_STATUS_CODES = (408, 425, 429, 500, 502, 503, 504)  # temporary errors
QUOTA_EXCEEDED = getattr(errno, "EDQUOT", errno.ENOSPC)
DISK_ERRORS = (errno.ENOSPC, QUOTA_EXCEEDED, errno.EACCES, errno.EROFS, errno.EFBIG, errno.ENOTDIR, errno.EISDIR)
DISK_ADVICE = "free some space or choose another --out_dir"

ProgressCallback = Callable[[int, int], None]  # (bytes received, total bytes; 0: unknown)


@dataclass(frozen=True)
class DownloadConfig(Config):
    """download a public dataset to dataset/raw/NAME; without NAME: list the datasets"""

    name: str = flag("", "name of a dataset", positional=True, nargs="?", type=non_empty_text, metavar="NAME")
    file: tuple[str, ...] = flag(
        (), "further file of the same repository; may be repeated", action="append", type=relative_path
    )
    mirror: str = flag("", "hub, hf-mirror, modelscope or a URL (default: try each in this order)")
    out_dir: str = flag("dataset/raw", "folder to write", type=path_string)


@dataclass
class RemoteVersion:
    """Size and ETag of a file on the server. Bytes of two responses are joined only if both are equal."""

    size: int = 0  # bytes; 0: unknown
    etag: str = ""

    @property
    def sha256(self) -> str:
        """The ETag if it is a SHA-256, as it is for large files of the hub; otherwise ""."""
        return self.etag if re.fullmatch(r"[0-9a-f]{64}", self.etag) else ""


class _LinkedEtagHandler(urllib.request.HTTPRedirectHandler):
    """Stores the X-Linked-Etag header of the hub's redirect; the final response does not repeat it."""

    etag = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.etag = self.etag or headers.get("X-Linked-Etag", "")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download_file(url: str, target: Path, progress: ProgressCallback = lambda received, size: None) -> Path:
    """Download `url` to `target`, resuming an earlier partial download. Returns `target`.

    Raises UserError if the server rejects the request, MAX_FAILED_ATTEMPTS requests in a row return no byte, or the
    checksum does not match.
    """
    part, version_file = target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")
    with report_write_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    version, failures, reason = _read_version(version_file), 0, ""
    while failures < MAX_FAILED_ATTEMPTS:
        received = part.stat().st_size if part.is_file() else 0
        if received and received == version.size:
            break
        time.sleep(min(30.0, 0.5 * 2**failures) if failures else 0.0)
        try:
            version, is_complete = _request_bytes(url, part, version_file, version, received, progress)
            if is_complete:
                break
            reason = "the connection was closed"
        except (OSError, http.client.HTTPException) as error:
            reason = _failure_reason(error, url, target)
        failures = 0 if part.is_file() and part.stat().st_size > received else failures + 1
    else:
        raise UserError(
            f"{url}: {reason} ({MAX_FAILED_ATTEMPTS} times in a row): the bytes received so far are kept; "
            "run the same command again, or use another --mirror"
        )
    if version.sha256 and _file_sha256(part) != version.sha256:
        part.unlink()
        version_file.unlink(missing_ok=True)
        raise UserError(
            f"{url}: the download does not match the server's checksum and was deleted: run the same command again"
        )
    with report_write_errors(target.parent):
        replace_file(part, target)
    version_file.unlink(missing_ok=True)
    return target


def _request_bytes(
    url: str, part: Path, version_file: Path, version: RemoteVersion, received: int, progress: ProgressCallback
) -> tuple[RemoteVersion, bool]:
    """Request the bytes from offset `received` and append them. Returns (version, file is complete)."""
    redirects = _LinkedEtagHandler()
    headers = {"User-Agent": "data_process.py", "Accept-Encoding": "identity"}
    if received:
        headers["Range"] = f"bytes={received}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=DOWNLOAD_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and received:  # the partial file is longer than the file on the server: it has changed
            part.unlink()
            return RemoteVersion(), False
        raise
    with response:
        start, size = _content_range(response)
        found = RemoteVersion(size, (redirects.etag or response.headers.get("ETag", "")).strip('W/"'))
        is_partial = response.status == 206
        is_resumable = is_partial and start == received and (not version.size or found == version)
        if received and is_partial and not is_resumable:
            part.unlink()
            return RemoteVersion(), False  # the file on the server has changed: restart
        if not is_resumable:
            part.unlink(missing_ok=True)  # first: after a kill, the version file must not describe older bytes
            received = 0
        write_json(version_file, asdict(found))
        with part.open("ab") as file:
            while chunk := response.read(DOWNLOAD_CHUNK_BYTES):
                file.write(chunk)
                received += len(chunk)
                progress(received, found.size)
    return found, received == found.size if found.size else True


def _content_range(response: Any) -> tuple[int, int]:
    """(first byte, size of the whole file) by the response headers; -1 and 0 if they do not state it."""
    if found := re.fullmatch(r"bytes (\d+)-.*?(?:/(\d+))?", response.headers.get("Content-Range", "")):
        return int(found[1]), int(found[2] or 0)
    length = response.headers.get("Content-Length", "")
    return -1, int(length) if length.isdigit() else 0


def _failure_reason(error: Exception, url: str, target: Path) -> str:
    """The error as text, if a retry may help. Raises UserError if it cannot."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (401, 403):
            advice = f"download the file with a browser and put it at {target}"
            raise UserError(
                f"{url}: the server requires you to accept terms or to log in ({error.code}): {advice}"
            ) from None
        if error.code not in RETRY_STATUS_CODES:
            advice = "see the dataset's page, or use another --mirror"
            raise UserError(f"{url}: {error.code} {error.reason}: {advice}") from None
        return f"{error.code} {error.reason}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        raise UserError(f"cannot write {target}: {error.strerror}: {DISK_ADVICE}") from None
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _read_version(version_file: Path) -> RemoteVersion:
    try:
        saved = json.loads(version_file.read_text(encoding="utf-8"))
        return RemoteVersion(int(saved["size"]), str(saved["etag"]))
    except (OSError, ValueError, KeyError, TypeError):
        return RemoteVersion()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(DOWNLOAD_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# ---- archives --------------------------------------------------------------------------------------------------------
def unpack_archive(archive: Path) -> list[Path]:
    """Unpack a zip or tar into its own folder and return the extracted files; other files are returned unchanged.

    Raises UserError for a damaged archive or one with a member outside the folder.
    """
    is_tar = re.search(r"\.(tar|tgz|tar\.\w+)$", archive.name)
    if not is_tar and archive.suffix != ".zip":
        return [archive]
    try:
        with contextlib.ExitStack() as stack:
            if is_tar:
                tar = stack.enter_context(tarfile.open(archive))
                members = [(member.name, tar.extractfile(member)) for member in tar if member.isfile()]
                return [_extract_member(archive, name, content) for name, content in members]
            zip_archive = stack.enter_context(zipfile.ZipFile(archive))
            names = [name for name in zip_archive.namelist() if not name.endswith("/")]
            return [_extract_member(archive, name, stack.enter_context(zip_archive.open(name))) for name in names]
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): delete it and download it again") from None


def escapes_folder(name: str) -> bool:
    """True if a relative POSIX path can resolve to the folder it is joined to or to a path outside it."""
    path = PurePosixPath(name)
    return not path.name or path.is_absolute() or ".." in path.parts or bool(re.match(r"[A-Za-z]:|.*\\", name))


def _extract_member(archive: Path, name: str, content: Any) -> Path:
    if escapes_folder(name):
        raise UserError(f"{archive} contains a path outside its folder ({name}): no further file is unpacked")
    target = archive.parent.joinpath(*PurePosixPath(name).parts)
    with atomic_write(target, DISK_ADVICE) as file:
        shutil.copyfileobj(content, file, DOWNLOAD_CHUNK_BYTES)
    return target


# ---- the command -----------------------------------------------------------------------------------------------------
def download_dataset(config: DownloadConfig) -> None:
    """Download a dataset of the catalogue, or the --file of its repository, and unpack it.

    Raises UserError for an unknown name, file or mirror, or too little space.
    """
    if config.name not in CATALOGUE:
        raise UserError(f"{config.name}: no such dataset; choose from {', '.join(CATALOGUE)}")
    entry, folder = CATALOGUE[config.name], Path(config.out_dir) / config.name
    files = config.file or entry.files
    paths = [folder / PurePosixPath(file).name for file in files]
    with lock_output(folder):
        if not config.file and not all(path.is_file() for path in paths):
            require_space(folder, entry.size)
        found: list[Path] = []
        for file, path in zip(files, paths, strict=True):
            if path.is_file():
                print(f"{path} exists already")
            else:
                with download_progress_bar(path.name) as progress:
                    _download_from_mirrors(entry, file, path, config.mirror, progress)
            found += unpack_archive(path)
    print(f"licence: {entry.licence}")
    shown_path = str(found[0]) if len(found) == 1 else str(folder)
    print(f"written: {shown_path}" + (f" ({len(found)} files)" if len(found) > 1 else ""))
    print(f"next: {entry.command.replace('FILE', shown_path)}")


def _download_from_mirrors(entry: DatasetEntry, file: str, path: Path, mirror: str, progress: ProgressCallback) -> None:
    """Download from `mirror`, or from the first mirror that works."""
    errors = []
    for address in entry.mirrors(mirror):
        url = entry.url(file, address)
        print(f"from {url}")
        try:
            download_file(url, path, progress)
            return
        except UserError as error:
            errors.append(error)
    raise errors[0] if len(errors) == 1 else UserError("; ".join(map(str, errors)))


def require_space(folder: Path, size: int) -> None:
    """Raises UserError if the disk has fewer than `size` free bytes."""
    path = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(path).free
    if free < size:
        raise UserError(
            f"{format_size(size)} do not fit on the disk of {path} ({format_size(free)} free): use --out_dir"
        )


@contextlib.contextmanager
def download_progress_bar(name: str) -> Iterator[ProgressCallback]:
    """A progress bar on a terminal; elsewhere one line every ten percent."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as ProgressBar

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    last_tenth = -1
    with ProgressBar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def update(received: int, size: int) -> None:
            nonlocal last_tenth
            bar.update(task, completed=received, total=size or None)
            tenth = 10 * received // size if size else -1
            if not console.is_terminal and tenth > last_tenth:
                last_tenth = tenth
                print(f"{name}: {10 * tenth} % of {format_size(size)}", flush=True)

        yield update
