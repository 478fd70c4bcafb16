"""Promise: a download survives broken lines and kills, never keeps wrong bytes under the right name, and says what is
wrong in one line. The server is real HTTP on this machine, with the hub's redirects and headers."""

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
from curation import download
from curation.catalogue import CATALOGUE
from curation.download import fetch, mirrors_of, require_space, unpack

CONTENT = os.urandom(3_000_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; breaks the line after `break_after` bytes of a body `breaks` times; notes what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.answers = {"/file": CONTENT}, [], []
        self.breaks, self.break_after, self.ranges, self.tags, self.length = 0, 700_000, True, True, True
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
        server.asked.append((self.path, self.headers.get("Range", "")))
        if server.answers:  # errors that are to come first
            self.send_error(server.answers.pop(0))
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
        rest = body[first:]
        if server.breaks:
            server.breaks -= 1
            rest = rest[: server.break_after]
        self.wfile.write(rest)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("breaks", [0, 1, 4])
def test_a_broken_line_costs_no_byte_twice(server, tmp_path, breaks):
    server.breaks = breaks
    target = fetch(server.url + "/file", tmp_path / "a" / "file")
    assert target.read_bytes() == CONTENT
    asked = ["", *(f"bytes={700_000 * i}-" for i in range(1, breaks + 1))]
    assert [header for _, header in server.asked] == asked
    assert [path.name for path in target.parent.iterdir()] == ["file"], "nothing else is left"


def test_the_same_command_goes_on_after_a_kill(server, tmp_path):
    def killed(have, size):
        if have > 1_500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server.url + "/file", tmp_path / "file", killed)
    have = (tmp_path / "file.part").stat().st_size
    assert 1_500_000 < have < len(CONTENT) and not (tmp_path / "file").exists()
    fetch(server.url + "/file", tmp_path / "file")
    assert server.asked[-1][1] == f"bytes={have}-" and (tmp_path / "file").read_bytes() == CONTENT


def test_a_file_that_was_whole_but_not_yet_named_is_not_fetched_again(server, tmp_path):
    def killed(have, size):
        if have == size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server.url + "/file", tmp_path / "file", killed)
    asked = len(server.asked)
    fetch(server.url + "/file", tmp_path / "file")
    assert len(server.asked) == asked and (tmp_path / "file").read_bytes() == CONTENT


def test_another_version_on_the_server_starts_anew(server, tmp_path):
    server.breaks = 1

    def changed(have, size):
        server.files["/file"] = CONTENT[::-1][:2_000_000]

    fetch(server.url + "/file", tmp_path / "file", changed)
    assert (tmp_path / "file").read_bytes() == CONTENT[::-1][:2_000_000]
    server.breaks = 1
    server.files["/file"] = CONTENT
    (tmp_path / "file").unlink()

    def shorter(have, size):
        server.files["/file"] = b"short"

    fetch(server.url + "/file", tmp_path / "file", shorter)
    assert (tmp_path / "file").read_bytes() == b"short"


def test_a_server_without_ranges_or_lengths_works_too(server, tmp_path):
    server.ranges, server.breaks = False, 2
    assert fetch(server.url + "/file", tmp_path / "file").read_bytes() == CONTENT
    server.length = server.tags = False
    assert fetch(server.url + "/file", tmp_path / "other").read_bytes() == CONTENT


def test_the_checksum_of_the_hub_is_checked(server, tmp_path):
    server.redirect_tag = hashlib.sha256(CONTENT).hexdigest()
    server.breaks = 2
    assert fetch(server.url + "/file", tmp_path / "file").read_bytes() == CONTENT
    server.redirect_tag = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UserError, match="does not have the checksum that the server states"):
        fetch(server.url + "/file", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "wrong bytes are not kept"


def test_answers_that_pass_are_waited_for_and_others_are_one_line(server, tmp_path):
    server.answers = [503, 429, 502]
    assert fetch(server.url + "/file", tmp_path / "file").read_bytes() == CONTENT
    with pytest.raises(UserError, match="404"):
        fetch(server.url + "/nothing", tmp_path / "nothing")
    server.answers = [403]
    with pytest.raises(UserError, match=r"accept terms or to log in \(403\).*put it at"):
        fetch(server.url + "/file", tmp_path / "closed")
    server.answers = [500] * download.PATIENCE
    with pytest.raises(UserError, match=r"500 .* \(6 times in a row\).*run the same command again"):
        fetch(server.url + "/file", tmp_path / "broken")
    server.breaks, server.break_after = 99, 0
    with pytest.raises(UserError, match="6 times in a row"):
        fetch(server.url + "/file", tmp_path / "silent")
    with pytest.raises(UserError, match="6 times in a row"):
        fetch("http://127.0.0.1:9/file", tmp_path / "nobody")


def test_a_full_disk_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file.part").mkdir()  # something that cannot be written
    with pytest.raises(UserError, match="cannot write"):
        fetch(server.url + "/file", tmp_path / "file")
    with pytest.raises(UserError, match=r"1000000\.00 GB do not fit"):
        require_space(tmp_path / "new" / "folder", 10**15)


# ---- archives --------------------------------------------------------------------------------------------------------
def zip_of(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_archives_are_unpacked_and_cannot_reach_outside(tmp_path):
    found = unpack(zip_of(tmp_path / "a.zip", {"val/x.csv": "1", "dev/y.csv": "2"}))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["val/x.csv", "dev/y.csv"]
    assert (tmp_path / "val" / "x.csv").read_text() == "1"
    with tarfile.open(tmp_path / "b.jsonl.tar.bz2", "w:bz2") as tar:
        info = tarfile.TarInfo("b.jsonl")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    assert unpack(tmp_path / "b.jsonl.tar.bz2")[0].read_bytes() == b"{}"
    assert unpack(tmp_path / "c.jsonl") == [tmp_path / "c.jsonl"]
    for name in ("../out", "/etc/out", "a/../../out", "C:/out"):
        with pytest.raises(UserError, match="outside its folder"):
            unpack(zip_of(tmp_path / "evil.zip", {name: "x"}))
    (tmp_path / "torn.zip").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "torn.zip")


# ---- the command -----------------------------------------------------------------------------------------------------
def test_a_set_of_the_catalogue_end_to_end(server, tmp_path, monkeypatch, capsys):
    archive = zip_of(tmp_path / "exam.zip", {"val/law_val.csv": "id,question\n"}).read_bytes()
    entry = CATALOGUE["ceval"]
    path = f"/datasets/{entry.repository}/resolve/{entry.revision}/{entry.files[0]}"
    server.files[path] = archive
    server.breaks, server.break_after = 1, 60
    command = ["download", "ceval", "--mirror", server.url, "--out_dir", str(tmp_path / "raw")]
    data_process.main(command)
    said = capsys.readouterr().out
    assert (tmp_path / "raw" / "ceval" / "val" / "law_val.csv").read_text() == "id,question\n"
    assert "licence: CC BY-NC-SA 4.0" in said and "next: python eval_ceval.py" in said
    data_process.main(command)
    assert "is already there" in capsys.readouterr().out and len(server.asked) == 2
    monkeypatch.setenv("HF_ENDPOINT", server.url)  # as the hub's own tools know it
    data_process.main([*command[:2], "--out_dir", str(tmp_path / "again")])
    server.files["/datasets/Skywork/SkyPile-150B/resolve/main/data/other%20one.jsonl"] = b"{}"
    data_process.main(["download", "skypile", "--file", "data/other one.jsonl", "--out_dir", str(tmp_path)])
    assert (tmp_path / "skypile" / "other one.jsonl").read_bytes() == b"{}"


def test_the_next_mirror_is_taken_when_one_fails(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.MIRRORS, "hub", "http://127.0.0.1:9")
    monkeypatch.setitem(download.MIRRORS, "hf-mirror", server.url)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    entry = CATALOGUE["cmmlu"]
    server.files[f"/datasets/{entry.repository}/resolve/{entry.revision}/{entry.files[0]}"] = zip_of(
        tmp_path / "x.zip", {"test/a.csv": "1"}
    ).read_bytes()
    data_process.main(["download", "cmmlu", "--out_dir", str(tmp_path)])
    assert (tmp_path / "cmmlu" / "test" / "a.csv").is_file()
    assert capsys.readouterr().out.count("from http") == 2


def test_the_list_and_mistakes(capsys, tmp_path):
    data_process.main(["download"])
    said = capsys.readouterr().out
    assert all(name in said for name in CATALOGUE)
    with pytest.raises(UserError, match=r"no such data set; there are .*ceval"):
        data_process.main(["download", "nothing"])
    with pytest.raises(UserError, match="choose hub, hf-mirror, modelscope or an address"):
        data_process.main(["download", "ceval", "--mirror", "ftp://x", "--out_dir", str(tmp_path)])
    for file in ("..", ".", "", "/", "/etc/passwd", "a/..", "../../x.jsonl", "a\\..\\b", "C:/x"):
        with pytest.raises(UserError, match=r"--file: .*(is not a path inside the repository, as data/a.jsonl|empty)"):
            data_process.main(["download", "ceval", "--file", file, "--out_dir", str(tmp_path / "raw")])
    assert not (tmp_path / "raw").exists()
    with pytest.raises(UserError, match="ceval is not at modelscope"):
        mirrors_of(CATALOGUE["ceval"], "modelscope")
    assert mirrors_of(CATALOGUE["seq-monkey"], "") == ["modelscope"]


def test_every_address_is_well_formed():
    for entry in CATALOGUE.values():
        for mirror in mirrors_of(entry, ""):
            for file in entry.files:
                assert re.fullmatch(
                    r"https://[\w.-]+/datasets/[\w.-]+/[\w.-]+/resolve/\w+/[\w./%-]+", entry.url(file, mirror)
                )
        assert (entry.size > 0 or entry.name == "deepctrl-sft") and entry.licence and entry.what
