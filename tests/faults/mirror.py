"""A local HTTP server that `data_process.py download` uses as a mirror."""

import contextlib
import http.server
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from typing import Any


def exam_archive() -> bytes:
    """A small zip in C-Eval's layout."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for split in ("dev", "val"):
            packed.writestr(f"{split}/law_{split}.csv", "id,question,A,B,C,answer\n" + "0,why?,a,b,c,A\n" * 2000)
    return file.getvalue()


@contextlib.contextmanager
def mirror() -> Iterator[str]:
    """Start a server that answers every GET with `exam_archive()` and supports ranges; yields its URL."""
    body = exam_archive()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            span = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(span[1]) if span else 0
            self.send_response(206 if span else 200)
            if span:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body[first:])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
