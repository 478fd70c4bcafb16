"""Promise: downloads resume after lost connections and kills, a file with a wrong checksum is deleted, and errors are
one line. The tests run a local HTTP server that sends the hub's redirects and headers."""

import hashlib
import http.server
import io
import os
import re
import tarfile
import threading
import zipfile

import pytest

import data_process
from common.errors import UserError
from curation import catalogue, download
from curation.catalogue import CATALOGUE
from curation.download import download_file, require_space, unpack_archive

CONTENT = os.urandom(3_000_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` and records `requests`; closes the connection after `break_after` bytes, `num_breaks` times."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.error_codes = {"/file": CONTENT}, [], []
        self.num_breaks, self.break_after, self.ranges, self.tags, self.length = 0, 700_000, True, True, True
        self.redirect_tag = ""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range", "")))
        if server.error_codes:  # answer with these errors first
            self.send_error(server.error_codes.pop(0))
            return
        path = self.path.split("?")[0]
        if server.redirect_tag and path != "/bytes":
            self.send_response(302)
            self.send_header("Location", "/bytes")
            self.send_header("X-Linked-Etag", f'"{server.redirect_tag}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.files.get("/file" if path == "/bytes" else path)
        if body is None:
            self.send_error(404)
            return
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) if server.ranges else None
        first = int(start[1]) if start else 0
        if start and first >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if server.length:
            self.send_header("Content-Length", str(len(body) - first))
        if server.tags:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        payload = body[first:]
        if server.num_breaks:
            server.num_breaks -= 1
            payload = payload[: server.break_after]
        self.wfile.write(payload)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("breaks", [0, 1, 4])
def test_no_byte_is_downloaded_twice_after_lost_connections(server, tmp_path, breaks):
    server.num_breaks = breaks
    target = download_file(server.url + "/file", tmp_path / "a" / "file")
    assert target.read_bytes() == CONTENT
    expected_ranges = ["", *(f"bytes={700_000 * i}-" for i in range(1, breaks + 1))]
    assert [header for _, header in server.requests] == expected_ranges
    assert [path.name for path in target.parent.iterdir()] == ["file"], "temporary files are deleted"


@pytest.mark.parametrize("stop_at", [1_500_000, len(CONTENT)])
def test_a_killed_download_resumes(server, tmp_path, stop_at):
    """A part file that is complete already is not requested again."""

    def interrupt(received, size):
        if received >= stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_file(server.url + "/file", tmp_path / "file", interrupt)
    received = (tmp_path / "file.part").stat().st_size
    assert received >= stop_at and not (tmp_path / "file").exists()
    server.requests.clear()
    download_file(server.url + "/file", tmp_path / "file")
    assert [header for _, header in server.requests] == ([f"bytes={received}-"] if stop_at < len(CONTENT) else [])
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_changed_remote_file_is_downloaded_from_the_start(server, tmp_path):
    server.num_breaks = 1

    def changed(received, size):
        server.files["/file"] = CONTENT[::-1][:2_000_000]

    download_file(server.url + "/file", tmp_path / "file", changed)
    assert (tmp_path / "file").read_bytes() == CONTENT[::-1][:2_000_000]
    server.num_breaks = 1
    server.files["/file"] = CONTENT
    (tmp_path / "file").unlink()

    def shorter(received, size):
        server.files["/file"] = b"short"

    download_file(server.url + "/file", tmp_path / "file", shorter)
    assert (tmp_path / "file").read_bytes() == b"short"


def test_servers_without_ranges_or_lengths_work(server, tmp_path):
    server.ranges, server.num_breaks = False, 2
    assert download_file(server.url + "/file", tmp_path / "file").read_bytes() == CONTENT
    server.length = server.tags = False
    assert download_file(server.url + "/file", tmp_path / "other").read_bytes() == CONTENT


def test_the_checksum_of_the_hub_is_verified(server, tmp_path):
    server.redirect_tag = hashlib.sha256(CONTENT).hexdigest()
    server.num_breaks = 2
    assert download_file(server.url + "/file", tmp_path / "file").read_bytes() == CONTENT
    server.redirect_tag = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UserError, match="does not match the server's checksum and was deleted"):
        download_file(server.url + "/file", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "wrong bytes are not kept"


def test_temporary_errors_are_retried_and_permanent_ones_are_one_line(server, tmp_path):
    server.error_codes = [503, 429, 502]
    assert download_file(server.url + "/file", tmp_path / "file").read_bytes() == CONTENT
    with pytest.raises(UserError, match="404"):
        download_file(server.url + "/nothing", tmp_path / "nothing")
    server.error_codes = [403]
    with pytest.raises(UserError, match=r"accept terms or to log in \(403\).*put it at"):
        download_file(server.url + "/file", tmp_path / "closed")
    server.error_codes = [500] * download.MAX_FAILED_ATTEMPTS
    with pytest.raises(UserError, match=r"500 .* \(6 times in a row\).*run the same command again"):
        download_file(server.url + "/file", tmp_path / "broken")
    server.num_breaks, server.break_after = 99, 0
    with pytest.raises(UserError, match="6 times in a row"):
        download_file(server.url + "/file", tmp_path / "silent")
    with pytest.raises(UserError, match="6 times in a row"):
        download_file("http://127.0.0.1:9/file", tmp_path / "nobody")


def test_a_full_disk_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file.part").mkdir()  # cannot be opened for writing
    with pytest.raises(UserError, match="cannot write"):
        download_file(server.url + "/file", tmp_path / "file")
    with pytest.raises(UserError, match=r"1000000\.00 GB do not fit"):
        require_space(tmp_path / "new" / "folder", 10**15)


# ---- archives --------------------------------------------------------------------------------------------------------
def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_archives_are_unpacked_and_cannot_write_outside_their_folder(tmp_path):
    found = unpack_archive(write_zip(tmp_path / "a.zip", {"val/x.csv": "1", "dev/y.csv": "2"}))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["val/x.csv", "dev/y.csv"]
    assert (tmp_path / "val" / "x.csv").read_text() == "1"
    with tarfile.open(tmp_path / "b.jsonl.tar.bz2", "w:bz2") as tar:
        info = tarfile.TarInfo("b.jsonl")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    assert unpack_archive(tmp_path / "b.jsonl.tar.bz2")[0].read_bytes() == b"{}"
    assert unpack_archive(tmp_path / "c.jsonl") == [tmp_path / "c.jsonl"]
    for name in ("../out", "/etc/out", "a/../../out", "C:/out"):
        with pytest.raises(UserError, match="outside its folder"):
            unpack_archive(write_zip(tmp_path / "evil.zip", {name: "x"}))
    (tmp_path / "torn.zip").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack_archive(tmp_path / "torn.zip")


# ---- the command -----------------------------------------------------------------------------------------------------
def test_a_catalogue_entry_is_downloaded_and_unpacked(server, tmp_path, monkeypatch, capsys):
    archive = write_zip(tmp_path / "exam.zip", {"val/law_val.csv": "id,question\n"}).read_bytes()
    entry = CATALOGUE["ceval"]
    path = f"/datasets/{entry.repository}/resolve/{entry.revision}/{entry.files[0]}"
    server.files[path] = archive
    server.num_breaks, server.break_after = 1, 60
    command = ["download", "ceval", "--mirror", server.url, "--out_dir", str(tmp_path / "raw")]
    data_process.main(command)
    output = capsys.readouterr().out
    assert (tmp_path / "raw" / "ceval" / "val" / "law_val.csv").read_text() == "id,question\n"
    assert "licence: CC BY-NC-SA 4.0" in output and "next: python eval_ceval.py" in output
    data_process.main(command)
    assert "exists already" in capsys.readouterr().out and len(server.requests) == 2
    monkeypatch.setenv("HF_ENDPOINT", server.url)  # as for huggingface_hub
    data_process.main([*command[:2], "--out_dir", str(tmp_path / "again")])
    server.files["/datasets/Skywork/SkyPile-150B/resolve/main/data/other%20one.jsonl"] = b"{}"
    data_process.main(["download", "skypile", "--file", "data/other one.jsonl", "--out_dir", str(tmp_path)])
    assert (tmp_path / "skypile" / "other one.jsonl").read_bytes() == b"{}"


def test_the_next_mirror_is_used_when_one_fails(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(catalogue.MIRRORS, "hub", "http://127.0.0.1:9")
    monkeypatch.setitem(catalogue.MIRRORS, "hf-mirror", server.url)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    entry = CATALOGUE["cmmlu"]
    server.files[f"/datasets/{entry.repository}/resolve/{entry.revision}/{entry.files[0]}"] = write_zip(
        tmp_path / "x.zip", {"test/a.csv": "1"}
    ).read_bytes()
    data_process.main(["download", "cmmlu", "--out_dir", str(tmp_path)])
    assert (tmp_path / "cmmlu" / "test" / "a.csv").is_file()
    assert capsys.readouterr().out.count("from http") == 2


def test_the_catalogue_is_listed_and_invalid_arguments_are_one_line(capsys, tmp_path):
    data_process.main(["download"])
    output = capsys.readouterr().out
    assert all(name in output for name in CATALOGUE)
    with pytest.raises(UserError, match=r"no such dataset; choose from .*ceval"):
        data_process.main(["download", "nothing"])
    with pytest.raises(UserError, match="choose hub, hf-mirror, modelscope or a URL"):
        data_process.main(["download", "ceval", "--mirror", "ftp://x", "--out_dir", str(tmp_path)])
    for file in ("..", ".", "", "/", "/etc/passwd", "a/..", "../../x.jsonl", "a\\..\\b", "C:/x"):
        with pytest.raises(UserError, match=r"--file: .*(is not a path inside the repository, as data/a.jsonl|empty)"):
            data_process.main(["download", "ceval", "--file", file, "--out_dir", str(tmp_path / "raw")])
    assert not (tmp_path / "raw").exists()
    with pytest.raises(UserError, match="ceval is not available at modelscope"):
        CATALOGUE["ceval"].mirrors("modelscope")
    assert CATALOGUE["seq-monkey"].mirrors("") == ["modelscope"]


def test_every_url_is_well_formed():
    for entry in CATALOGUE.values():
        for mirror in entry.mirrors(""):
            for file in entry.files:
                assert re.fullmatch(
                    r"https://[\w.-]+/datasets/[\w.-]+/[\w.-]+/resolve/\w+/[\w./%-]+", entry.url(file, mirror)
                )
        assert (entry.size > 0 or entry.name == "deepctrl-sft") and entry.licence and entry.description
