"""Chat in the terminal with any server of OpenAI's API: serve_openai_api.py, vLLM, llama.cpp, OpenAI.

    python chat_openai_api.py                                     the server on this machine, its first model
    python chat_openai_api.py --base_url http://127.0.0.1:11434/v1 --model qwen3:0.6b
    python chat_openai_api.py --prompt "What is the capital of France?"              prints one answer and ends

Answers are streamed, and every request contains the conversation so far. Ctrl-C stops an answer; an empty line or
Ctrl-D ends the conversation. Lines of piped input are questions too.
Needs: pip install "openai>=2,<4". Reads and writes no files.
Read next: serve_openai_api.py (the server), 2-eval.py (chatting without a server).
"""

import argparse
import contextlib
import os
from typing import Any

from common import cli, flag_types
from common.errors import UserError, escape_controls, fail_in_one_line
from evaluation.qa_data import require_nonempty_text

_Message = dict[str, str]


def make_parser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--base_url",
        type=flag_types.non_empty_text,
        default="http://127.0.0.1:8000/v1",
        help="the server's address, including /v1 (default: http://127.0.0.1:8000/v1)",
    )
    add(
        "--model",
        type=flag_types.non_empty_text,
        metavar="NAME",
        help="the server's name of the model (default: the first that it lists)",
    )
    add(
        "--api_key",
        type=flag_types.non_empty_text,
        metavar="KEY",
        help="sent with every request (default: $OPENAI_API_KEY, else none)",
    )
    add("--system", metavar="TEXT", help="system message of the conversation")
    add("--max_tokens", type=flag_types.positive_int, metavar="N", help="longest answer (default: the server's)")
    add("--prompt", metavar="TEXT", help="ask one question instead of starting a conversation")
    return parser


def make_client(args: argparse.Namespace) -> Any:
    """Return an `openai.OpenAI`. Raises UserError without the package, for an invalid address and an invalid key."""
    try:
        import openai
    except ImportError:
        raise UserError('openai is not installed: pip install "openai>=2,<4"') from None
    key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("--api_key: must be printable ASCII without spaces")
    try:
        if not args.base_url.startswith(("http://", "https://")):
            raise ValueError
        return openai.OpenAI(base_url=args.base_url, api_key=key)
    except Exception:  # openai does not wrap its HTTP library's exceptions for an invalid address
        raise UserError(f"--base_url {args.base_url}: not an address: use one like http://127.0.0.1:8000/v1") from None


@contextlib.contextmanager
def as_user_errors(base_url: str, model: str | None) -> Any:
    """Turn errors of the server, and responses that are not OpenAI's API, into UserError."""
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        raise UserError(f"no answer from {base_url} ({cause}): is the server running? see --base_url") from None
    except openai.AuthenticationError:
        raise UserError(f"{base_url} rejects the key: set --api_key or the variable OPENAI_API_KEY") from None
    except openai.NotFoundError as error:
        hint = f"--model {model}" if model else "--base_url, which usually ends with /v1"
        raise UserError(f"{base_url}: {server_message(error)}: see {hint}") from None
    except openai.APIError as error:
        raise UserError(f"{base_url}: {server_message(error)}") from None
    except (AttributeError, ValueError):  # raised by openai if the body has another shape
        raise UserError(f"{base_url}: the response is not OpenAI's API: see --base_url") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2"):
            raise
        raise UserError(f"{base_url}: connection lost ({error}): ask again") from None  # while streaming an answer


def server_message(error: Any) -> str:
    """The server's error message, on one line."""
    body = error.body if isinstance(error.body, dict) else {}
    return " ".join(str(body.get("message") or error.message).split())[:500]


def first_model_name(client: Any, base_url: str) -> str:
    with as_user_errors(base_url, None):
        names = [model.id for model in client.models.list()]
    if not names:
        raise UserError(f"{base_url} lists no models: name one with --model")
    return names[0]


def print_answer(client: Any, args: argparse.Namespace, messages: list[_Message]) -> str:
    """Stream the answer to the terminal and return it; after Ctrl-C, the part received so far."""
    options = {"max_tokens": args.max_tokens} if args.max_tokens else {}
    text, chunks = "", 0
    with as_user_errors(args.base_url, args.model), contextlib.suppress(KeyboardInterrupt):
        with client.chat.completions.create(model=args.model, messages=messages, stream=True, **options) as stream:
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
    args = make_parser().parse_args()
    client = make_client(args)
    args.model = args.model or first_model_name(client, args.base_url)
    messages = [{"role": "system", "content": require_nonempty_text(args.system, "--system")}] if args.system else []
    if args.prompt is not None:
        print_answer(
            client, args, [*messages, {"role": "user", "content": require_nonempty_text(args.prompt, "--prompt")}]
        )
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input(); Windows has its own
    print(f"{args.model} at {args.base_url}: Ctrl-C stops an answer, an empty line ends", flush=True)
    try:
        while question := input("> ").strip():
            messages.append({"role": "user", "content": require_nonempty_text(question, "the question")})
            messages.append({"role": "assistant", "content": print_answer(client, args, messages)})
    except EOFError:
        print()


if __name__ == "__main__":
    with fail_in_one_line():
        main()
