"""An interactive chat on the terminal.

    > What is the capital of France?
    The capital of France is Paris.
    [8 tokens, 71 tokens/s]
    > /temperature 0

A line that begins with / is a command (`/help` lists them); any other line is a message to the model. Ctrl-C stops the
answer; at the prompt it prints the hint about /exit. `/save` writes the conversation in the format of
`data_process.py sft`, so corrected answers can become training data. Thoughts, calls of tools and their results are
printed under headings, and dimmed on a terminal:

    > What is 17 times 23?
    [call] calculator {"expression": "17 * 23"}
    [result] 391
    [answer]
    17 times 23 is 391.

Called by 2-eval.py. Read next: tool_loop.py (a reply), chat_model.py (generation).
"""

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import UserError, escape_controls, require_nonempty_text
from common.files import write_text
from evaluation.chat_model import ChatModel
from evaluation.qa_data import system_messages
from evaluation.terminal_texts import terminal_texts
from evaluation.tool_loop import NO_TOOLS, Reply, ReplyPart, ToolOptions, stream_reply
from evaluation.tools import find_tools
from model.chat_template import Message
from model.sampling import SamplingParams
from model.sampling_presets import SAMPLING_SETTINGS, format_settings, merge_settings

THINKING = {"on": True, "off": False, "auto": None}


class TerminalChat:
    """A conversation; a prompt contains its last `history` turns, or all if None. Counts tokens and seconds.

    Raises UserError for a blank system message, and for tools if the model's chat format has none.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        settings: SamplingParams,
        system: str = "",
        history: int | None = None,
        options: ToolOptions = NO_TOOLS,
        lang: str = "en",
    ) -> None:
        options.check(chat_model)
        self.chat_model, self.settings, self.history, self.options = chat_model, settings, history, options
        self.system, self.texts = system_messages(system), terminal_texts(lang)
        self.messages: list[Message] = []
        self.answers: list[dict[str, Any]] = []
        self.tokens, self.seconds = 0, 0.0

    def send_message(self, text: str, is_interactive: bool = True) -> None:
        """Print the model's reply; append question and reply to the messages unless generation fails.

        If `is_interactive`, Ctrl-C stops the reply and keeps its text, and the speed is printed.
        """
        question: Message = {"role": "user", "content": require_nonempty_text(text, "the question")}
        past = self.messages if self.history is None else last_turns(self.messages, self.history)
        reply, printer, started = (
            Reply(self.options, self.chat_model.has_answer_parts),
            ReplyPrinter(self.texts),
            time.perf_counter(),
        )
        try:
            for part in stream_reply(self.chat_model, [*self.system, *past, question], self.settings, reply):
                printer.show(part)
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            reply.stop()
            print(self.texts["stopped"], end="")
        except ValueError as error:  # the prompt is too long
            raise UserError(str(error)) from None
        print(flush=True)
        tokens, seconds = reply.num_tokens, max(time.perf_counter() - started, 1e-9)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        answer = {"prompt": question["content"], "answer": reply.text, "finish_reason": reply.finish_reason}
        has_parts = len(reply.messages) > 1 or any(len(message) > 2 for message in reply.messages)
        self.answers.append(answer | ({"messages": reply.messages} if has_parts else {}))
        if reply.messages:
            self.messages += [question, *reply.messages]
        if is_interactive:
            print(self.texts["speed"].format(tokens=tokens, speed=tokens / seconds), flush=True)

    def retry(self) -> None:
        """Replace the last reply; keep it if generation fails. Raises UserError for an empty conversation."""
        if not self.messages:
            raise UserError(self.texts["empty"])
        last = last_turns(self.messages, 1)
        self.messages = self.messages[: len(self.messages) - len(last)]
        before = len(self.messages)
        try:
            self.send_message(last[0]["content"])
        finally:
            if len(self.messages) == before:
                self.messages += last

    def save(self, path: Path) -> None:
        """Write one line with the chat, or for a pretrained model one line per continued text. Raises UserError."""
        if not self.messages:
            raise UserError(self.texts["empty"])
        if path.exists():
            raise UserError(self.texts["exists"].format(path=path))
        if self.chat_model.is_chat_model:
            rows: list[dict[str, object]] = [{"messages": self.options.add_tools(self.system + self.messages)}]
        else:
            texts = [message["content"] for message in self.messages]
            rows = [{"text": prompt + more} for prompt, more in zip(texts[::2], texts[1::2], strict=True)]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def last_turns(messages: list[Message], count: int) -> list[Message]:
    """The messages of the last turns. A turn begins at a user message and has all answers and results after it."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return messages[starts[max(0, len(starts) - count)] :] if count and starts else []


class ReplyPrinter:
    """Prints the parts of a reply; a heading stands before all but a plain answer."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.kind = "content"  # of the last part
        self.is_line_start = True
        self.codes = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")  # dim, normal

    def show(self, part: ReplyPart) -> None:
        text = escape_controls(part.text, keep="\n\t")
        if text and (part.kind != self.kind or part.kind.startswith("tool_")):
            text = ("" if self.is_line_start else "\n") + self.texts[part.kind] + text
        if text:
            before, after = ("", "") if part.kind == "content" else self.codes
            print(f"{before}{text}{after}", end="", flush=True)
            self.kind, self.is_line_start = part.kind, text.endswith("\n")


def run_terminal_chat(chat: TerminalChat, out_dir: str) -> None:
    """Read lines and answer them until /exit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input(); Windows has its own
    print(chat.texts["hint"])
    while True:
        try:
            text = input("> ").strip()
            if not text:
                continue
            if text.split()[0] == "/exit":
                return
            if text.startswith("/"):
                run_chat_command(chat, text, out_dir)
            else:
                chat.send_message(text)
        except UserError as error:
            print(f"[{error}]", flush=True)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n" + chat.texts["hint"], flush=True)


def run_chat_command(chat: TerminalChat, line: str, out_dir: str) -> None:
    """Run one command and print its effect. Raises UserError for an invalid value."""
    name, _, value = line[1:].partition(" ")
    value, texts = value.strip(), chat.texts
    if name == "reset":
        chat.messages = []
        message = texts["cleared"]
    elif name == "retry":
        return chat.retry()
    elif name == "save":
        path = Path(value or Path(out_dir) / "talks" / time.strftime("talk-%Y%m%d-%H%M%S.jsonl"))
        chat.save(path)
        message = texts["written"].format(path=path)
    elif name == "system":
        chat.system = system_messages(value)
        message = texts["system" if value else "no system"]
    elif name == "history":
        if value and not value.isdecimal():
            raise UserError(texts["bad history"].format(value=value))
        chat.history = int(value) if value else None
        message = texts["history" if value else "all history"].format(count=chat.history)
    elif name in ("tools", "thinking"):
        message = _change_options(chat, name, value)
    elif name in SAMPLING_SETTINGS:
        message = _change_sampling(chat, name, value)
    else:
        return print(texts["help"], flush=True)
    print(f"[{message}]", flush=True)


def _change_options(chat: TerminalChat, name: str, value: str) -> str:
    """Change the tools or the thinking switch; returns the state as text. Raises UserError."""
    if name == "thinking":
        if value not in THINKING:
            raise UserError(chat.texts["bad thinking"].format(value=value))
        chat.options = dataclasses.replace(chat.options, enable_thinking=THINKING[value])
        return chat.texts["thinking"].format(value=value)
    options = dataclasses.replace(chat.options, tools=tuple(find_tools(value, chat.options.lookup_file)))
    options.check(chat.chat_model)
    chat.options = options
    return chat.texts["tools"].format(names=", ".join(tool.name for tool in options.tools) or chat.texts["none"])


def _change_sampling(chat: TerminalChat, name: str, value: str) -> str:
    """Change one setting if there is a value; returns all settings as text. Raises UserError."""
    if value:
        is_integer = name in ("top_k", "penalty_window", "no_repeat_ngram_size", "num_beams", "max_new_tokens", "seed")
        current = {key: getattr(chat.settings, key) for key in SAMPLING_SETTINGS}
        try:
            number: Any = None if (name, value) == ("seed", "none") else int(value) if is_integer else float(value)
            chat.settings = dataclasses.replace(chat.settings, **merge_settings({name: number}, current))
        except ValueError as error:
            reason = str(error) if str(error).startswith(name) else f"{value} is not a {'whole ' * is_integer}number"
            raise UserError(f"/{name}: {reason.removeprefix(name + ' ')}") from None
    return format_settings({name: getattr(chat.settings, name) for name in SAMPLING_SETTINGS})
