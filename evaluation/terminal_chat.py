"""A conversation on the terminal.

    > What is the capital of France?
    The capital of France is Paris.
    [8 tokens, 71 tokens/s]
    > /temperature 0

A line that begins with / is a command (`/help` lists them), any other line is said to the model. Ctrl-C stops the
answer; on an empty line it says how to leave. `/save` writes the conversation as a line that `data_process.py sft`
reads: what you correct there can be trained on.
Called by 2-eval.py. Read next: chat_model.py (who answers).
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from evaluation.chat_model import SAMPLING_SETTINGS, ChatModel
from evaluation.qa_data import require_nonempty_text
from model.chat_template import Message
from model.sampling_presets import format_settings, merge_settings

COMMAND_HINT = "/help lists the commands, Ctrl-C stops an answer, /exit ends"
COMMAND_HELP = """/reset              forget the conversation
/retry              draw the last answer again (with a --seed it is the same: /seed none)
/save [FILE]        write the conversation to a jsonl file (data_process.py sft reads it)
/system [TEXT]      put a system message in front; without TEXT take it away
/history [N]        remember the last N turns (0: each question stands alone); without N all
/temperature 0.7    also /top_k /top_p /min_p /repetition_penalty /no_repeat_ngram_size /max_new_tokens /seed;
                    without a number: show them
/num_beams 4        beam search: draws nothing (temperature 0), shows complete answers; also /length_penalty
/exit               end"""


class TerminalChat:
    """What has been said, and how much of it the model is told: the last `history` turns, None for all."""

    def __init__(self, chat_model: ChatModel, history: int | None = None) -> None:
        self.chat_model, self.history = chat_model, history
        self.messages: list[Message] = []

    def send_message(self, text: str, is_interactive: bool = True) -> None:
        """Print the model's answer and remember both. A question that cannot be answered is not remembered.

        At the terminal Ctrl-C may stop the answer, and its speed is shown.
        """
        question: Message = {"role": "user", "content": require_nonempty_text(text, "the question")}
        past = self.messages if self.history is None else self.messages[max(0, len(self.messages) - 2 * self.history) :]
        answer = self.chat_model.stream_answer([*past, question], interruptible=is_interactive)
        stopped = self.chat_model.answers[-1]["finish_reason"] == "stopped"
        if answer or not stopped:
            self.messages += [question, {"role": "assistant", "content": answer}]
        if is_interactive:
            tokens, seconds = self.chat_model.last_timing
            print(f"[{tokens} tokens, {tokens / seconds:.0f} tokens/s]", flush=True)

    def retry(self) -> None:
        """Answer the last question once more; the old answer stays where no new one comes. Raises UserError."""
        if not self.messages:
            raise UserError("nothing has been said yet")
        *self.messages, question, old = self.messages
        before = len(self.messages)
        try:
            self.send_message(question["content"])
        finally:
            if len(self.messages) == before:
                self.messages += [question, old]

    def save(self, path: Path) -> None:
        """One line: a chat, or of a pretrained model, the texts that it went on with. Raises UserError."""
        if not self.messages:
            raise UserError("nothing has been said yet")
        if path.exists():
            raise UserError(f"{path} is there already: name another file")
        if self.chat_model.is_chat_model:
            rows: list[dict[str, object]] = [{"messages": self.chat_model.system + self.messages}]
        else:
            texts = [message["content"] for message in self.messages]
            rows = [{"text": prompt + more} for prompt, more in zip(texts[::2], texts[1::2], strict=True)]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def run_terminal_chat(chat_model: ChatModel, out_dir: str, history: int | None = None) -> None:
    """Read lines and answer them until /exit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input(); Windows has its own
    chat = TerminalChat(chat_model, history)
    print(COMMAND_HINT)
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
            print("\n" + COMMAND_HINT, flush=True)


def run_chat_command(chat: TerminalChat, line: str, out_dir: str) -> None:
    """Carry out one command and say what has been done. Raises UserError for a value that makes no sense."""
    chat_model = chat.chat_model
    name, _, value = line[1:].partition(" ")
    value = value.strip()
    if name == "reset":
        chat.messages = []
        message = "forgotten"
    elif name == "retry":
        return chat.retry()
    elif name == "save":
        path = Path(value or Path(out_dir) / "talks" / time.strftime("talk-%Y%m%d-%H%M%S.jsonl"))
        chat.save(path)
        message = f"written: {path}"
    elif name == "system":
        chat_model.system = [{"role": "system", "content": require_nonempty_text(value, "/system")}] if value else []
        message = "a system message stands in front" if value else "no system message"
    elif name == "history":
        chat.history = _parse_history(value) if value else None
        message = f"remembers {chat.history} turns" if value else "remembers all turns"
    elif name in SAMPLING_SETTINGS:
        message = _change_sampling(chat_model, name, value)
    else:
        return print(COMMAND_HELP, flush=True)
    print(f"[{message}]", flush=True)


def _parse_history(value: str) -> int:
    if not value.isdecimal():
        raise UserError(f"/history {value}: a whole number is needed, 0 or more")
    return int(value)


def _change_sampling(chat_model: ChatModel, name: str, value: str) -> str:
    """Change one number of the settings, or show them all."""
    if value:
        is_integer = name in ("top_k", "no_repeat_ngram_size", "num_beams", "max_new_tokens", "seed")
        current = {key: getattr(chat_model.settings, key) for key in SAMPLING_SETTINGS}
        try:
            number: Any = None if (name, value) == ("seed", "none") else int(value) if is_integer else float(value)
            chat_model.settings = dataclasses.replace(chat_model.settings, **merge_settings({name: number}, current))
        except ValueError as error:
            reason = str(error) if str(error).startswith(name) else f"{value} is no {'whole ' * is_integer}number"
            raise UserError(f"/{name}: {reason.removeprefix(name + ' ')}") from None
    return format_settings({name: getattr(chat_model.settings, name) for name in SAMPLING_SETTINGS})
