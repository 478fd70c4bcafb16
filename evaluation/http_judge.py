"""One request to a server that speaks OpenAI's protocol, with the patience that such servers need.

    POST {url}/chat/completions   {"model", "messages": [{"role": "user", "content"}], "temperature": 0}
    ->   {"choices": [{"message": {"content": "..."}}]}

Works with OpenAI, with serve_openai_api.py, and with everything that imitates them (vLLM, llama.cpp, ollama).
A busy server (429, 5xx) is asked again after the time that it names, or after 1, 2, 4, … seconds.
Read next: judge.py (what is asked).
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from corpus.errors import UserError

TRIES = 6
TIMEOUT = 180  # seconds for one reply
LONGEST_WAIT = 60.0
MAX_REPLY = 4 << 20  # bytes


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key and the answers to another place."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ChatServer:
    """`url` as OpenAI's clients take it, with its /v1; `model` as the server calls it."""

    def __init__(self, url: str, model: str, timeout: float = TIMEOUT) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False
        if not good:
            raise UserError(f"--judge {url}: not an address; it looks like http://localhost:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UserError("--judge: only the address, please; a key goes into the variable OPENAI_API_KEY")
        self.url, self.model, self.timeout = url.rstrip("/"), model, timeout
        self.options: dict[str, Any] = {"temperature": 0}  # left out once the server says that it does not take it
        self.answered = False
        self.opener = urllib.request.build_opener(_NoRedirect())

    def check(self) -> None:
        """Is anybody there who takes the key? Asks for the list of models, before any work goes into answers.

        A server without such a list is left in peace. Raises UserError where there is none, or one with another key.
        """
        try:
            self.opener.open(self._request("/models"), timeout=self.timeout).close()
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                self._refusal(error)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(self._nobody(_reason(error))) from None

    def ask(self, text: str) -> str:
        """The reply to one user message. Raises UserError when the server cannot, or not in time."""
        problem = ""
        for attempt in range(TRIES):
            try:
                with self.opener.open(self._request("/chat/completions", text), timeout=self.timeout) as response:
                    raw = response.read(MAX_REPLY)
                self.answered = True
                return self._content(raw)
            except urllib.error.HTTPError as error:
                problem, wait = self._refusal(error), _retry_after(error)
                if error.code == 400:
                    continue  # without the option that it refused
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                problem, wait = _reason(error), None
                if not self.answered and "timed out" not in problem:
                    raise UserError(self._nobody(problem)) from None
            if attempt < TRIES - 1:
                time.sleep(min(2.0**attempt if wait is None else wait, LONGEST_WAIT))
        raise UserError(
            f"--judge {self.url}: gave up after {TRIES} tries ({problem}): run the same command again to go on"
        )

    def _request(self, path: str, text: str | None = None) -> urllib.request.Request:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **self.options}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "mengya"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if text is not None else None
        return urllib.request.Request(self.url + path, data, headers)

    def _nobody(self, problem: str) -> str:
        return f"--judge {self.url}: no answer ({problem}): is the server running?"

    def _content(self, raw: bytes) -> str:
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            shown = raw[:80].decode(errors="replace").replace("\n", " ")
            raise UserError(f"--judge {self.url}: this is not OpenAI's protocol: {shown}") from None
        return content if isinstance(content, str) else ""  # null when a server's filter said nothing

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """What the server said. Raises UserError where asking again cannot help."""
        said = _message(error)
        where = f"--judge {self.url}: {error.code}"
        if (error.code == 429 and "quota" not in said.lower()) or error.code in (408, 409) or error.code >= 500:
            return f"{error.code} {said}".strip()
        refused = [name for name in self.options if name in said] if error.code == 400 else []
        if refused:
            for name in refused:
                del self.options[name]
            return said
        if error.code in (401, 403):
            raise UserError(f"{where}: it wants another key: set OPENAI_API_KEY ({said})") from None
        if error.code == 404:
            raise UserError(
                f"{where}: does the address end in /v1, and is there a model {self.model}? ({said})"
            ) from None
        if 300 <= error.code < 400:
            raise UserError(f"{where}: it redirects to another place: name that address") from None
        raise UserError(f"{where}: {said or 'the request was refused'}") from None


def _message(error: urllib.error.HTTPError) -> str:
    """The reason in OpenAI's error object, or the first words of whatever came; one line."""
    try:
        raw = error.read(10_000)
    except (OSError, http.client.HTTPException):
        raw = b""
    try:
        said = json.loads(raw)["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, LookupError, TypeError):
        said = raw.decode(errors="replace") or error.reason
    return " ".join(str(said).split())[:200]


def _reason(error: Exception) -> str:
    """Why nothing came, in the system's words. A URLError wraps the reason."""
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks for; a date is not read."""
    value = error.headers.get("Retry-After", "") if error.headers else ""
    try:
        return max(0.0, float(value))
    except ValueError:
        return None
