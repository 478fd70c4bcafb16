"""A client of OpenAI's protocol, with the retries that busy servers need: for the judge and for models under test.

    POST {url}/chat/completions   {"model", "messages": [{"role": "user", "content"}], "temperature": 0}
    ->   {"choices": [{"message": {"content": "..."}, "finish_reason": "stop"}], "usage": {"completion_tokens": 9}}

Works with OpenAI, with serve_openai_api.py, and with everything that imitates them (vLLM, llama.cpp, ollama).
A busy server (429, 5xx) is asked again after the time that it names, or after 1, 2, 4, … seconds.
An option that the server refuses by name (400, 422) is left out from then on. Redirects are refused.
Read next: judge.py (what the judge is asked), remote_model.py (a served model in a report).
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from common.errors import UserError

MAX_TRIES = 6
REPLY_TIMEOUT = 180  # seconds for one reply
MAX_RETRY_WAIT = 60.0
MAX_REPLY_BYTES = 4 << 20  # bytes


class _RejectRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key and the answers to another place."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class ServerReply:
    """`tokens`: of the answer, None where the server does not count them. `seconds`: of the last try alone."""

    text: str
    finish_reason: str
    tokens: int | None
    seconds: float


class ChatClient:
    """`url`: with its /v1, as OpenAI's clients take it. `model`: its name on the server. `flag`: the flag in errors.

    Raises UserError for an invalid address, and for one that contains a password or a query.
    """

    key_variable = "OPENAI_API_KEY"
    key_help = "set OPENAI_API_KEY"  # what to do about a missing or wrong key
    retry_help = ": run the same command again to continue"

    def __init__(self, url: str, model: str, timeout: float = REPLY_TIMEOUT, flag: str = "--judge") -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            is_valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            is_valid = False
        if is_valid and ("@" in parts.netloc or parts.query or parts.fragment):  # not shown: it may contain a key
            raise UserError(f"{flag}: give the address alone, without a key, which belongs in {self.key_variable}")
        if not is_valid:
            raise UserError(f"{flag} {url}: not an address; it looks like http://localhost:8000/v1")
        self.url, self.model, self.timeout, self.flag = url.rstrip("/"), model, timeout, flag
        self.options: dict[str, Any] = {"temperature": 0}
        self.rejected_options: list[str] = []  # options that the server does not take
        self.key = os.environ.get(self.key_variable, "").strip()
        self.has_answered = False
        self.opener = urllib.request.build_opener(_RejectRedirects())

    def check_connection(self) -> None:
        """Ask for the list of models, before any work goes into answers. A server without such a list passes.

        Raises UserError where no server answers, or where it refuses the key.
        """
        self.list_model_names()

    def list_model_names(self) -> list[str]:
        """The names of the server's models; [] where it lists none. Raises UserError as `check_connection` does."""
        try:
            with self.opener.open(self._make_request("/models"), timeout=self.timeout) as response:
                raw = response.read(MAX_REPLY_BYTES)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                self._handle_http_error(error)
            return []
        except (OSError, http.client.HTTPException) as error:
            raise UserError(self._no_answer_message(_failure_reason(error))) from None
        try:
            return [str(model["id"]) for model in json.loads(raw)["data"]]
        except (ValueError, LookupError, TypeError):
            return []

    def complete_text(self, text: str) -> str:
        """The reply to one user message. Raises UserError when the server cannot, or not in time."""
        return self.complete([{"role": "user", "content": text}]).text

    def complete(self, messages: list[dict[str, str]], **options: Any) -> ServerReply:
        """The reply to a chat; `options` are sent beside `self.options`. Raises UserError as `complete_text` does."""
        problem = ""
        for attempt in range(MAX_TRIES):
            started = time.perf_counter()
            try:
                request = self._make_request("/chat/completions", messages, options)
                with self.opener.open(request, timeout=self.timeout) as response:
                    raw = response.read(MAX_REPLY_BYTES)
                self.has_answered = True
                return self._parse_reply(raw, time.perf_counter() - started)
            except urllib.error.HTTPError as error:
                problem, wait = self._handle_http_error(error, {**self.options, **options}), _retry_after(error)
                if error.code in (400, 422):
                    continue  # without the option that it refused
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                problem, wait = _failure_reason(error), None
                if not self.has_answered and "timed out" not in problem:
                    raise UserError(self._no_answer_message(problem)) from None
            if attempt < MAX_TRIES - 1:
                time.sleep(min(2.0**attempt if wait is None else wait, MAX_RETRY_WAIT))
        raise UserError(f"{self.flag} {self.url}: gave up after {MAX_TRIES} tries ({problem}){self.retry_help}")

    def _make_request(
        self, path: str, messages: list[dict[str, str]] | None = None, options: dict[str, Any] | None = None
    ) -> urllib.request.Request:
        sent = {
            name: value
            for name, value in {**self.options, **(options or {})}.items()
            if name not in self.rejected_options
        }
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "mengya"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        body = {"model": self.model, "messages": messages, **sent}
        data = json.dumps(body).encode() if messages is not None else None
        return urllib.request.Request(self.url + path, data, headers)

    def _no_answer_message(self, problem: str) -> str:
        return f"{self.flag} {self.url}: no answer ({problem}): is the server running?"

    def _parse_reply(self, raw: bytes, seconds: float) -> ServerReply:
        try:
            content = json.loads(raw)
            choice = content["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            tokens = (content.get("usage") or {}).get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = raw[:80].decode(errors="replace").replace("\n", " ")
            raise UserError(f"{self.flag} {self.url}: this is not OpenAI's protocol: {shown}") from None
        return ServerReply(
            text if isinstance(text, str) else "",  # null where a server's filter removed the answer
            reason if isinstance(reason, str) else "",
            tokens if isinstance(tokens, int) and tokens >= 0 else None,
            seconds,
        )

    def _handle_http_error(self, error: urllib.error.HTTPError, sent: Iterable[str] = ()) -> str:
        """The server's message. Options that were sent and that it names are left out from now on.

        Raises UserError where asking again cannot help.
        """
        message = _error_message(error)
        if (error.code == 429 and "quota" not in message.lower()) or error.code in (408, 409) or error.code >= 500:
            return f"{error.code} {message}".strip()
        if error.code in (400, 422):
            named_options = [
                name for name in sent if name not in self.rejected_options and re.search(rf"\b{name}\b", message)
            ]
            self.rejected_options += named_options
            if named_options:
                return message
        self._raise_http_error(error.code, message)

    def _raise_http_error(self, code: int, message: str) -> NoReturn:
        prefix = f"{self.flag} {self.url}: {code}"
        if code in (401, 403):
            raise UserError(f"{prefix}: it refuses the key: {self.key_help} ({message})") from None
        if code == 404:
            raise UserError(
                f"{prefix}: does the address end in /v1, and is there a model {self.model}? ({message})"
            ) from None
        if 300 <= code < 400:
            raise UserError(f"{prefix}: it redirects to another place: name that address") from None
        raise UserError(f"{prefix}: {message or 'the request was refused'}") from None


def _error_message(error: urllib.error.HTTPError) -> str:
    """The reason in OpenAI's error object, or the first words of whatever came; one line."""
    try:
        raw = error.read(10_000)
    except (OSError, http.client.HTTPException):
        raw = b""
    try:
        message = json.loads(raw)["error"]
        message = message["message"] if isinstance(message, dict) else message
    except (ValueError, LookupError, TypeError):
        message = raw.decode(errors="replace") or error.reason
    return " ".join(str(message).split())[:200]


def _failure_reason(error: Exception) -> str:
    """Why nothing came, in the system's words. A URLError wraps the reason."""
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks for; a date is not read."""
    value = error.headers.get("Retry-After", "") if error.headers else ""
    try:
        return max(0.0, float(value))
    except ValueError:
        return None
