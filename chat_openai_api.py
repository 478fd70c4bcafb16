"""Chat in the terminal with any server of OpenAI's API: serve_openai_api.py, vLLM, llama.cpp, OpenAI.

    python chat_openai_api.py                                     the server on this machine, its first model
    python chat_openai_api.py --base_url http://127.0.0.1:11434/v1 --model qwen3:0.6b
    python chat_openai_api.py --prompt "What is the capital of France?"              prints one answer and ends

Answers are streamed, and every request contains the conversation so far. Ctrl-C stops an answer; an empty line or
Ctrl-D ends the conversation. Lines of piped input are questions too.
Needs: pip install "openai>=2,<4". Reads and writes no files.
Read next: serve_openai_api.py (the server), 2-eval.py (chatting without a server).
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from common import cli
from common.cli import flag
from common.errors import UserError, escape_controls, fail_in_one_line, require_nonempty_text
from common.flag_types import non_empty_text, positive_int


@dataclasses.dataclass(frozen=True)
class ChatClientConfig(cli.Config):
    """A conversation with a model of a server."""

    base_url: str = flag("http://127.0.0.1:8000/v1", "the server's address, including /v1", type=non_empty_text)
    model: str = flag(
        "", "the server's name of the model (default: the first that it lists)", type=non_empty_text, metavar="NAME"
    )
    api_key: str = flag(
        "", "sent with every request (default: $OPENAI_API_KEY, else none)", type=non_empty_text, metavar="KEY"
    )
    system: str = flag("", "system message of the conversation", metavar="TEXT")
    max_tokens: int = flag(0, "longest answer (default: the server's)", type=positive_int, metavar="N")
    prompt: str | None = flag(None, "ask one question instead of starting a conversation", metavar="TEXT")

    @property
    def key(self) -> str:
        return self.api_key or os.environ.get("OPENAI_API_KEY") or "none"

    def check(self) -> None:
        """Raises UserError for a key that a header cannot contain."""
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise UserError("--api_key: must be printable ASCII without spaces")


def make_client(config: ChatClientConfig) -> Any:
    """Return an `openai.OpenAI`. Raises UserError without the package and for an invalid address."""
    try:
        import openai
    except ImportError:
        raise UserError('openai is not installed: pip install "openai>=2,<4"') from None
    try:
        if not config.base_url.startswith(("http://", "https://")):
            raise ValueError
        return openai.OpenAI(base_url=config.base_url, api_key=config.key)
    except Exception:  # openai does not wrap its HTTP library's exceptions for an invalid address
        advice = "not an address: use one like http://127.0.0.1:8000/v1"
        raise UserError(f"--base_url {config.base_url}: {advice}") from None


@contextlib.contextmanager
def as_user_errors(config: ChatClientConfig) -> Iterator[None]:
    """Turn errors of the server, and responses that are not OpenAI's API, into UserError."""
    import openai

    url = config.base_url
    try:
        yield
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        raise UserError(f"no answer from {url} ({cause}): is the server running? see --base_url") from None
    except openai.AuthenticationError:
        raise UserError(f"{url} rejects the key: set --api_key or the variable OPENAI_API_KEY") from None
    except openai.APIError as error:
        hint = ""
        if isinstance(error, openai.NotFoundError):
            hint = f": see --model {config.model}" if config.model else ": see --base_url, which usually ends with /v1"
        body = error.body if isinstance(error.body, dict) else {}
        message = " ".join(str(body.get("message") or error.message).split())[:500]
        raise UserError(f"{url}: {message}{hint}") from None
    except (AttributeError, ValueError):  # raised by openai if the body has another shape
        raise UserError(f"{url}: the response is not OpenAI's API: see --base_url") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2"):
            raise
        raise UserError(f"{url}: connection lost ({error}): ask again") from None  # while streaming an answer


def first_model_name(client: Any, config: ChatClientConfig) -> str:
    with as_user_errors(config):
        names = [model.id for model in client.models.list()]
    if not names:
        raise UserError(f"{config.base_url} lists no models: name one with --model")
    return names[0]


def print_answer(client: Any, config: ChatClientConfig, messages: list[dict[str, str]]) -> str:
    """Stream the answer to the terminal and return it; after Ctrl-C, the part received so far."""
    options: dict[str, Any] = {"max_tokens": config.max_tokens} if config.max_tokens else {}
    options |= {"model": config.model, "messages": messages, "stream": True}
    text, chunks = "", 0
    with as_user_errors(config), contextlib.suppress(KeyboardInterrupt):
        with client.chat.completions.create(**options) as stream:
            for chunk in stream:
                chunks += 1
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                print(escape_controls(piece, keep="\n\t"), end="", flush=True)
                text += piece
        if not chunks:
            raise ValueError("no event")
    print(flush=True)
    return text


def main() -> None:
    config = cli.parse(ChatClientConfig, __doc__)
    client = make_client(config)
    config = dataclasses.replace(config, model=config.model or first_model_name(client, config))
    messages = []
    if config.system:
        messages.append({"role": "system", "content": require_nonempty_text(config.system, "--system")})
    if config.prompt is not None:
        question = require_nonempty_text(config.prompt, "--prompt")
        print_answer(client, config, [*messages, {"role": "user", "content": question}])
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input(); Windows has its own
    print(f"{config.model} at {config.base_url}: Ctrl-C stops an answer, an empty line ends", flush=True)
    try:
        while question := input("> ").strip():
            messages.append({"role": "user", "content": require_nonempty_text(question, "the question")})
            messages.append({"role": "assistant", "content": print_answer(client, config, messages)})
    except EOFError:
        print()


if __name__ == "__main__":
    with fail_in_one_line():
        main()
