"""A client of OpenAI's chat completions API with retries, for the judge and for served models.

    POST {url}/chat/completions   {"model", "messages": [{"role": "user", "content"}], "temperature": 0}
    ->   {"choices": [{"message": {"content": "..."}, "finish_reason": "stop"}], "usage": {"completion_tokens": 9}}

Works with OpenAI, serve_openai_api.py and compatible servers (vLLM, llama.cpp, ollama).
Retries after 429 and 5xx: after the seconds of Retry-After, else after 1, 2, 4, … seconds.
An option that the server rejects by name (400, 422) is omitted from later requests. Redirects are refused.
Read next: judge.py (the requests to the judge), remote_model.py (a served model in a report).
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
MAX_REPLY_BYTES = 4 << 20  # 4 MiB


class _RejectRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could send the key and the answers to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class ServerReply:
    """`tokens`: of the answer, None where the server does not count them. `seconds`: of the successful request only."""

    text: str
    finish_reason: str
    tokens: int | None
    seconds: float


class ChatClient:
    """`url`: base URL with /v1. `model`: its name on the server. `timeout`: seconds. `flag`: the flag named in errors.

    Raises UserError for an invalid address, and for an address with a password, query or fragment.
    """

    key_variable = "OPENAI_API_KEY"
    key_help = "set OPENAI_API_KEY"  # part of the error about a missing or wrong key
    retry_help = ": run the same command again to continue"

    def __init__(self, url: str, model: str, timeout: float = REPLY_TIMEOUT, flag: str = "--judge") -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            is_valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            is_valid = False
        if is_valid and ("@" in parts.netloc or parts.query or parts.fragment):  # not shown: it may hold a key
            raise UserError(f"{flag}: give the address without a key, which belongs in {self.key_variable}")
        if not is_valid:
            raise UserError(f"{flag} {url}: not an address: give one like http://localhost:8000/v1")
        self.url, self.model, self.timeout, self.flag = url.rstrip("/"), model, timeout, flag
        self.options: dict[str, Any] = {"temperature": 0}
        self.rejected_options: list[str] = []  # options that the server rejects
        self.key = os.environ.get(self.key_variable, "").strip()
        self.has_answered = False
        self.opener = urllib.request.build_opener(_RejectRedirects())

    def check_connection(self) -> None:
        """Request the list of models to fail before answers are generated. A server without such a list passes.

        Raises UserError where the server does not answer or rejects the key.
        """
        self.list_model_names()

    def list_model_names(self) -> list[str]:
        """The names of the server's models, [] where it lists none. Raises UserError like `check_connection`."""
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
        """The reply to one user message. Raises UserError when the server fails or times out."""
        return self.complete([{"role": "user", "content": text}]).text

    def complete(self, messages: list[dict[str, str]], **options: Any) -> ServerReply:
        """The reply to a chat; `options` extend `self.options`. Raises UserError when the server fails or times out."""
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
                    continue  # retry without the rejected option
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
            raise UserError(f"{self.flag} {self.url}: not a reply of OpenAI's API: {shown}") from None
        return ServerReply(
            text if isinstance(text, str) else "",  # null where a server's filter removed the answer
            reason if isinstance(reason, str) else "",
            tokens if isinstance(tokens, int) and tokens >= 0 else None,
            seconds,
        )

    def _handle_http_error(self, error: urllib.error.HTTPError, sent: Iterable[str] = ()) -> str:
        """The server's error message, if a retry may help. Adds the options that it names to `rejected_options`.

        Raises UserError where a retry cannot help.
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
            raise UserError(f"{prefix}: the server rejects the key: {self.key_help} ({message})") from None
        if code == 404:
            raise UserError(
                f"{prefix}: does the address end in /v1, and is there a model {self.model}? ({message})"
            ) from None
        if 300 <= code < 400:
            raise UserError(f"{prefix}: the server redirects to another address: give that address") from None
        raise UserError(f"{prefix}: {message or 'the server rejects the request'}") from None


def _error_message(error: urllib.error.HTTPError) -> str:
    """The message of OpenAI's error object, or the start of the body, in one line."""
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
    """The reason of a failed connection; a URLError wraps it."""
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds of Retry-After, None where it is missing or a date."""
    value = error.headers.get("Retry-After", "") if error.headers else ""
    try:
        return max(0.0, float(value))
    except ValueError:
        return None
