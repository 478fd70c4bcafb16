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
from typing import Any

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

    def list_model_names(self) -> list[str]:
        """The names of the server's models, [] where it lists none.

        Raises UserError where the server does not answer or rejects the key.
        """
        try:
            return [str(model["id"]) for model in json.loads(self._send("/models"))["data"]]
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                self._raise_unless_temporary(error)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(self._no_answer_message(_failure_reason(error))) from None
        except (ValueError, LookupError, TypeError):
            pass
        return []

    def complete_text(self, text: str) -> str:
        """The reply to one user message. Raises UserError when the server fails or times out."""
        return self.complete([{"role": "user", "content": text}]).text

    def complete(self, messages: list[dict[str, str]], **options: Any) -> ServerReply:
        """The reply to a chat; `options` extend `self.options`. Raises UserError when the server fails or times out."""
        problem = ""
        for attempt in range(MAX_TRIES):
            sent = {k: v for k, v in {**self.options, **options}.items() if k not in self.rejected_options}
            started = time.perf_counter()
            try:
                raw = self._send("/chat/completions", {"model": self.model, "messages": messages, **sent})
                self.has_answered = True
                return self._parse_reply(raw, time.perf_counter() - started)
            except urllib.error.HTTPError as error:
                problem, wait = self._raise_unless_temporary(error, sent), _retry_after(error)
                if error.code in (400, 422):
                    continue  # without the rejected option
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                problem, wait = _failure_reason(error), None
                if not self.has_answered and "timed out" not in problem:
                    raise UserError(self._no_answer_message(problem)) from None
            if attempt < MAX_TRIES - 1:
                time.sleep(min(2.0**attempt if wait is None else wait, MAX_RETRY_WAIT))
        raise UserError(f"{self.flag} {self.url}: gave up after {MAX_TRIES} tries ({problem}){self.retry_help}")

    def _send(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """POST `body` as JSON, or GET without one; returns at most MAX_REPLY_BYTES of the reply."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "mengya"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with self.opener.open(request, timeout=self.timeout) as response:
            raw: bytes = response.read(MAX_REPLY_BYTES)
            return raw

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

    def _raise_unless_temporary(self, error: urllib.error.HTTPError, sent: Iterable[str] = ()) -> str:
        """The server's error message, if a retry may help. Adds the options that it names to `rejected_options`.

        Raises UserError where a retry cannot help.
        """
        code, message = error.code, _error_message(error)
        if (code == 429 and "quota" not in message.lower()) or code in (408, 409) or code >= 500:
            return f"{code} {message}".strip()
        named_options = [name for name in sent if re.search(rf"\b{name}\b", message)] if code in (400, 422) else []
        self.rejected_options += named_options
        if named_options:
            return message
        reason = message or "the server rejects the request"
        if code in (401, 403):
            reason = f"the server rejects the key: {self.key_help} ({message})"
        elif code == 404:
            reason = f"does the address end in /v1, and is there a model {self.model}? ({message})"
        elif 300 <= code < 400:
            reason = "the server redirects to another address: give that address"
        raise UserError(f"{self.flag} {self.url}: {code}: {reason}") from None


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
