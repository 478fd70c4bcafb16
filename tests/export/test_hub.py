"""--push_to_hub against a local server with the hub's protocol: create, preupload, LFS upload, commit.

Promises: every file is uploaded byte for byte, in one commit, to a private repository if requested; a dry run lists the
same files and sends no request; an error of the hub is one line, and the folder is kept.
"""

import base64
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from common.errors import UserError
from export.hub import check_repo_id
from tests.helpers import run_process


class HubHandler(BaseHTTPRequestHandler):
    """The hub endpoints that an upload uses. Received data is stored on the server object."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def check_token(self):
        self.server.asked.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") == "Bearer hf_right" or self.path.startswith("/storage/"):
            return True
        self.body()
        self.answer({"error": "Invalid username or password."}, 401)
        return False

    def do_GET(self):
        if self.check_token():
            self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self):
        if not self.check_token():
            return
        body = self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)  # huggingface_hub before 2.0 sends "private"
            self.server.private = asked.get("private") or asked.get("visibility") == "private"
            self.answer({"url": f"{self.server.url}/me/small", "name": "me/small"})
        elif self.path == "/api/validate-yaml":  # the card's front matter
            block = json.loads(body)["content"].split("---\n")[1]
            self.server.card = yaml.safe_load(block)
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            modes = [{"path": f["path"], "shouldIgnore": False} for f in json.loads(body)["files"]]
            for mode in modes:
                mode["uploadMode"] = "lfs" if mode["path"].endswith(".safetensors") else "regular"
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/storage/{item['oid']}", "header": {}}}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/main" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            self.server.commits.append(lines)
            self.answer({"commitUrl": f"{self.server.url}/me/small/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"error": f"unknown {self.path}"}, 404)

    def do_PUT(self):
        if self.check_token():
            self.server.stored[self.path.removeprefix("/storage/")] = self.body()
            self.answer({})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.commits, server.stored, server.private = [], [], {}, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_push(hub, tiny_parent, folder, *flags, token="hf_right"):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent / "home")}
    command = [f"{name}={value}" for name, value in environment.items()] + ([f"HF_TOKEN={token}"] if token else [])
    script = [sys.executable, "export_model.py", tiny_parent, folder, "--no-verify", "--push_to_hub", "me/small"]
    return run_process("env", "-u", "HF_TOKEN", *command, *script, *flags)


def test_every_file_is_uploaded_in_one_commit(hub, tiny_parent, tmp_path):
    folder = tmp_path / "small"
    done = run_push(hub, tiny_parent, folder, "--private")
    assert done.returncode == 0, done.stderr
    assert hub.private is True and len(hub.commits) == 1 and hub.card["license"] == "unknown"
    arrived = {}
    for line in hub.commits[0]:
        value = line["value"]
        if line["key"] == "file":
            assert value["encoding"] == "base64"
            arrived[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            arrived[value["path"]] = hub.stored[value["oid"]]
            assert hashlib.sha256(arrived[value["path"]]).hexdigest() == value["oid"]
    assert arrived == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert arrived.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert "me/small" in arrived["README.md"].decode() and f"pushed to {hub.url}/me/small" in done.stdout


def test_a_dry_run_sends_no_request(hub, tiny_parent, tmp_path):
    done = run_push(hub, tiny_parent, tmp_path / "small", "--dry_run", token=None)
    assert done.returncode == 0, done.stderr
    assert hub.asked == []
    for path in (tmp_path / "small").iterdir():
        assert f"{path.stat().st_size:,} bytes  {path.name}\n" in done.stdout
    assert "nothing was uploaded" in done.stdout


def test_a_hub_error_is_one_line_and_keeps_the_folder(hub, tiny_parent, tmp_path):
    done = run_push(hub, tiny_parent, tmp_path / "small", token="hf_wrong")
    assert done.returncode == 2 and done.stderr.startswith("error: cannot push to me/small"), done.stderr
    assert done.stderr.count("\n") == 1 and "hf_wrong" not in done.stderr
    assert (tmp_path / "small").is_dir() and not hub.commits


def test_a_missing_token_and_invalid_names_are_rejected(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        check_repo_id("me/small", needs_token=True)
    check_repo_id("me/small", needs_token=False)
    for name in ("not a name", "a/b/c", "-x", ""):
        with pytest.raises(UserError, match="USER/MODEL"):
            check_repo_id(name, needs_token=False)
