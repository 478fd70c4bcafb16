"""Chat in the terminal with any server of OpenAI's API: serve_openai_api.py, vLLM, llama.cpp, OpenAI.

    python chat_openai_api.py                                     the server on this machine, its first model
    python chat_openai_api.py --base_url http://127.0.0.1:11434/v1 --model qwen3:0.6b
    python chat_openai_api.py --prompt "What is the capital of France?"              prints one answer and ends
    python chat_openai_api.py --tools calculator,clock                               runs the tools that the model calls

Answers are streamed, and every request contains the conversation so far. Thoughts, calls and results are printed under
headings. Tools (evaluation/tools.py) run in this process; they only compute. Ctrl-C stops an answer; an empty line or
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
from common.flag_types import non_empty_text, parse_bool, path_string, positive_int
from common.packages import require_packages
from evaluation.tools import TOOL_NAMES, Tool, find_tools, run_tool
from model.answer_parts import ToolCall, parse_json_object

MAX_ROUNDS = 4  # answers with calls per question
Messages = list[dict[str, Any]]


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
    tools: str = flag(
        "", f"tools that the model may call, as calculator,clock: {', '.join(TOOL_NAMES)}",
        type=non_empty_text, metavar="NAMES",
    )  # fmt: skip
    lookup_file: str = flag("", "jsonl file of facts for the tool lookup", type=path_string, metavar="FILE")
    enable_thinking: bool | None = flag(
        None, "false: ask for answers without thoughts (default: the model decides)",
        type=parse_bool, metavar="{true,false}",
    )  # fmt: skip

    @property
    def key(self) -> str:
        return self.api_key or os.environ.get("OPENAI_API_KEY") or "none"

    def check(self) -> None:
        """Raises UserError for a key that a header cannot contain."""
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise UserError("--api_key: must be printable ASCII without spaces")


def make_client(config: ChatClientConfig) -> Any:
    """Return an `openai.OpenAI`. Raises UserError without the package and for an invalid address."""
    require_packages("the client", "openai")
    import openai

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


class AnswerPrinter:
    """Prints the chunks of an answer, and collects its message; a heading stands before all but a plain answer."""

    def __init__(self, heading: str) -> None:
        """`heading`: that of the text before the answer."""
        self.message: dict[str, Any] = {"role": "assistant", "content": ""}
        self.calls: list[dict[str, Any]] = []
        self.heading, self.is_line_start = heading, True

    def add(self, delta: Any) -> None:
        """The thought of an answer has two names: reasoning_content, and reasoning on some servers."""
        thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None) or ""
        for key, heading, piece in (
            ("reasoning_content", "[thought]\n", thought),
            ("content", "", delta.content or ""),
        ):
            if piece:
                self.message[key] = self.message.get(key, "") + piece
                self.show(heading, piece)
        for call in delta.tool_calls or []:
            if call.id or not self.calls:
                self.calls.append({"id": call.id or "", "type": "function", "function": {"name": "", "arguments": ""}})
            function = self.calls[-1]["function"]
            function["name"] += call.function.name or ""
            function["arguments"] += call.function.arguments or ""

    def show(self, heading: str, text: str) -> None:
        if heading != self.heading:
            heading, self.heading = heading or "[answer]\n", heading
            text = ("" if self.is_line_start else "\n") + heading + text
        print(escape_controls(text, keep="\n\t"), end="", flush=True)
        self.is_line_start = text.endswith("\n")

    def finish(self) -> dict[str, Any]:
        """Print the calls, end the line and return the message."""
        for call in self.calls:
            self.heading = ""
            self.show("[call] ", f"{call['function']['name']} {call['function']['arguments']}")
        print(flush=True)
        return self.message | ({"tool_calls": self.calls} if self.calls else {})


def print_answer(client: Any, config: ChatClientConfig, messages: Messages, tools: list[Tool]) -> dict[str, Any]:
    """Stream the answer to the terminal and return its message; after Ctrl-C, the text received so far."""
    options: dict[str, Any] = {"max_tokens": config.max_tokens} if config.max_tokens else {}
    options |= {"tools": [tool.schema for tool in tools]} if tools else {}
    if config.enable_thinking is not None:
        options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": config.enable_thinking}}
    options |= {"model": config.model, "messages": messages, "stream": True}
    printer, chunks = AnswerPrinter("" if messages[-1]["role"] == "user" else "[result] "), 0
    try:
        with as_user_errors(config):
            with client.chat.completions.create(**options) as stream:
                for chunk in stream:
                    chunks += 1
                    if chunk.choices:
                        printer.add(chunk.choices[0].delta)
            if not chunks:
                raise ValueError("no event")
    except KeyboardInterrupt:
        printer.calls = []
    return printer.finish()


def answer_question(client: Any, config: ChatClientConfig, messages: Messages, tools: list[Tool]) -> None:
    """Print the answer to the last message and append it. Calls are run, and their results are sent, before it."""
    for rounds_left in range(MAX_ROUNDS, -1, -1):
        answer = print_answer(client, config, messages, tools if rounds_left else [])
        messages.append(answer)
        for call in answer.get("tool_calls", []):
            arguments = parse_json_object(call["function"]["arguments"] or "{}")
            result = "error: the arguments are no JSON object"
            if arguments is not None:
                result = run_tool(ToolCall(call["function"]["name"], arguments), tools)
            print(f"[result] {result}", flush=True)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if not answer.get("tool_calls"):
            return


def main() -> None:
    config = cli.parse(ChatClientConfig, __doc__)
    client, tools = make_client(config), find_tools(config.tools, config.lookup_file)
    config = dataclasses.replace(config, model=config.model or first_model_name(client, config))
    messages: Messages = []
    if config.system:
        messages.append({"role": "system", "content": require_nonempty_text(config.system, "--system")})
    if config.prompt is not None:
        question = require_nonempty_text(config.prompt, "--prompt")
        answer_question(client, config, [*messages, {"role": "user", "content": question}], tools)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input(); Windows has its own
    print(f"{config.model} at {config.base_url}: Ctrl-C stops an answer, an empty line ends", flush=True)
    try:
        while question := input("> ").strip():
            messages.append({"role": "user", "content": require_nonempty_text(question, "the question")})
            answer_question(client, config, messages, tools)
    except EOFError:
        print()


if __name__ == "__main__":
    with fail_in_one_line():
        main()
