"""The argparse parser of every script: two levels of help, files of flags, errors of one line that suggest a spelling.

    --help        the flags of Config.main_flags with their defaults, and examples
    --help_all    every flag, and the whole description
    error: unknown flag --batchsize: did you mean --batch_size? `python 1-pretrain.py --help` lists the flags

Imports only the standard library.
Read next: cli.py (adds the flags of a configuration).
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError, choose_from
from common.flag_types import MAX_SHOWN_CHARACTERS, NumberType

FLAG_FILE_SUFFIX = ".args"
SHOWN_COMMANDS = 6  # lines of examples in --help
DASHES = "-‐‑‒–—−"  # typed by word processors and web pages instead of "-"


class FlagHelp(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the description; `--batch_size N`, not `--batch_size BATCH_SIZE`."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 30, **options})

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if isinstance(action.type, NumberType) else action.dest.rsplit("_")[-1].upper()


class HelpAll(argparse.Action):
    """Prints every flag and the whole description, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        if isinstance(parser, FlagParser):
            parser.main_flags = ()
        parser.print_help()
        parser.exit()


class FlagParser(argparse.ArgumentParser):
    """argparse.ArgumentParser with the help and the errors described above. Errors raise UserError.

    main_flags: names of the fields that --help shows, in this order; (): all of them.
    flag_file_names: {flag: {value: file}} for flags that name a file of flags, as `--recipe belle`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": FlagHelp, **options})
        self.main_flags: tuple[str, ...] = ()
        self.flag_file_names: dict[str, dict[str, str]] = {}
        self.flag_sources: dict[str, str] = {}  # flag -> "FILE:LINE", for messages
        self.add_argument("--help_all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help="show every flag")

    # ---- help ----
    def format_help(self) -> str:
        """The text of --help: the main flags only, unless there are none."""
        files = "".join(f" {action.metavar or action.dest.upper()}" for action in self._get_positional_actions())
        self.usage = f"python {self.prog}{files} [--FLAG VALUE …]".replace("%", "%%")
        if not self.main_flags:
            return super().format_help()
        shown = [a for a in reversed(self._actions) if a.help != argparse.SUPPRESS]
        named = {name.lstrip(DASHES): a for a in shown for name in (a.dest, *a.option_strings)}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(short_description(self.description or ""))
        formatter.start_section("main flags")
        formatter.add_arguments([named[name] for name in self.main_flags])
        formatter.end_section()
        others = len({a.dest for a in shown} - {"help", "help_all"}) - len(self.main_flags)
        formatter.add_text(f"--help_all describes the other {others} flags and the rest of this text.")
        return formatter.format_help()

    # ---- errors ----
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises UserError for unknown flags, and for `--flag=--`, which Python before 3.13 parses as []."""
        texts = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # else the parser of the subcommand reads the files
            texts = self.read_flag_files(texts)
        for text in texts:
            if text.startswith("--") and text.endswith("=--"):
                self.error(f"argument {text.removesuffix('=--')}: a value is missing")
        known, unknown = super().parse_known_args(texts, namespace)
        if unknown:
            self._refuse(unknown)
        return known, unknown

    def _refuse(self, unknown: list[str]) -> NoReturn:
        """Raise UserError for the first unknown flag, with the nearest known one, or for a value without a flag."""
        flag = next((text for text in unknown if text[0:1] in DASHES and text.strip(DASHES)), "")
        if not flag:
            self.error(f"unexpected value {unknown[0][:MAX_SHOWN_CHARACTERS]!r}: a flag begins with --")
        name = _flag_name(flag)[:MAX_SHOWN_CHARACTERS]
        visible = (o for a in self._actions if a.help != argparse.SUPPRESS for o in a.option_strings)
        self.error(f"unknown flag {name}", choose_from(f"--{name.strip(DASHES).replace('-', '_')}", visible, limit=0))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            shown = str(value)[:MAX_SHOWN_CHARACTERS]
            advice = choose_from(shown, map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {shown!r}: {advice}")

    def error(self, message: str, advice: str = "") -> NoReturn:
        flags = re.findall("--[a-zA-Z][-a-zA-Z0-9_]*", message)
        place = next((f"{self.flag_sources[name]}: " for name in flags if name in self.flag_sources), "")
        text = " ".join(message.split()) + (f": {advice}" if advice else "")
        end = "" if text.endswith("?") else ";"
        raise UserError(f"{place}{text}{end} `python {self.prog} --help` describes the flags")

    # ---- files of flags ----
    def read_flag_files(self, texts: list[str]) -> list[str]:
        """Return the arguments with those of all files `@NAME.args` in front, so that the command line overrides them.

        Raises UserError if a file cannot be read.
        """
        from_files: list[str] = []
        others: list[str] = []
        position = 0
        while position < len(texts):
            name, _, value = texts[position].partition("=")
            is_file = name.startswith("@") and texts[position].endswith(FLAG_FILE_SUFFIX)
            if name in self.flag_file_names:
                if not value and position + 1 < len(texts):
                    position += 1
                    value = texts[position]
                if value not in (known := self.flag_file_names[name]):
                    self.error(f"argument {name}: {value or 'a value is missing'}", choose_from(value, known))
                from_files += self._read_flag_file(Path(known[value]))
            elif is_file:
                from_files += self._read_flag_file(Path(texts[position][1:]))
            else:
                others.append(texts[position])
            position += 1
        self.flag_sources = {f: place for f, place in self.flag_sources.items() if f not in map(_flag_name, others)}
        return from_files + others

    def _read_flag_file(self, path: Path) -> list[str]:
        found: list[str] = []
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text: a file of flags has one flag per line, as --epochs 3") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: give an existing file of flags after @") from None
        for number, line in enumerate(lines, 1):
            try:
                words = shlex.split(line, comments=True)
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}: a line holds flags as on the command line") from None
            if words and not words[0].startswith("--"):
                raise UserError(f"{path}:{number}: {words[0]}: a line begins with a flag, as --epochs 3")
            found += words
            self.flag_sources |= {_flag_name(word): f"{path}:{number}" for word in words if word.startswith("--")}
        return found


def short_description(text: str) -> str:
    """Return a description up to the end of its first block of commands, with SHOWN_COMMANDS of them at most."""
    shown: list[str] = []
    for block in text.strip("\n").split("\n\n"):
        lines = block.splitlines()
        has_commands = any(re.match(r"\s+(python|torchrun) ", line) for line in lines)
        shown.append("\n".join(lines[:SHOWN_COMMANDS] if has_commands else lines))
        if has_commands:
            break
    return "\n\n".join(shown)


def command_examples(text: str, command: str) -> str:
    """Return the indented lines of a description that begin with this command: its examples."""
    return "\n".join(line for line in text.splitlines() if re.match(rf"\s+python {re.escape(command)}( |$)", line))


def module_command(arguments: Iterable[str]) -> str | None:
    """Return "-m PACKAGE.MODULE" if the program was started so, else None: argparse takes the name of the file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.origin != next(iter(arguments), None):
        return None
    return f"-m {spec.name.removesuffix('.__main__')}"


def _flag_name(text: str) -> str:
    return text.partition("=")[0]
