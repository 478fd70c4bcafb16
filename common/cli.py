"""Command lines from frozen dataclasses, argparse types with limits, and one-line errors.

    @dataclass(frozen=True)
    class TrainConfig(Config):
        data_path: str = flag("dataset/pretrain", "folder written by data_process.py", type=path_string)
        batch_size: int = flag(8, "rows per forward pass", type=positive_int, aliases=("batch",))

    config = parse(TrainConfig, __doc__)     python 1-pretrain.py --batch_size 16 @recipes/belle-sft.args

`@FILE.args` reads flags from a file: one or several per line, # starts a comment. Flags of the command line override
those of the file, wherever they stand. Aliases are accepted, but --help does not list them. Invalid values are rejected
before any file is read: `argument --batch_size: 0 is not a whole number of at least 1`, exit code 2. Imports only the
standard library.
Read next: flag_parser.py (help, errors, files of flags), errors.py, trainer/config.py.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, TypeVar, cast

from common.errors import UserError
from common.flag_parser import FlagParser, command_examples, module_command
from common.flag_types import NumberType, split_names


# ---- configurations: frozen dataclasses whose fields describe their flags ----
@dataclass(frozen=True)
class Config:
    """Base of all configurations. Subclasses check combinations of fields in `check`.

    main_flags: the fields that --help shows, about ten, in this order; (): all of them. --help_all shows the others.
    """

    main_flags: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Raises UserError for a number out of its limits, as the command line does, and for a wrong combination."""
        for field in dataclasses.fields(self):
            number, value = flag_options(type(self), field).get("type"), getattr(self, field.name)
            if isinstance(number, NumberType) and isinstance(value, (int, float)) and not number.accepts(value):
                default = None if field.default is MISSING else field.default
                if value != default:  # a default such as 0 may mean "not given"
                    raise UserError(f"--{field.name}: {value!r} is not {number.rule}")
        self.check()

    def check(self) -> None:
        """Raise UserError for a combination of fields that is not supported."""


ConfigT = TypeVar("ConfigT", bound=Config)


def flag(
    default: Any,
    help: str | Callable[[type], str],
    *,
    name: str = "",
    aliases: Sequence[str] = (),
    group: str = "",
    exclusive: str = "",
    hidden: bool = False,
    **options: Any,
) -> Any:
    """Return a dataclass field that describes a flag.

    default: MISSING makes the flag required; False makes it a switch; True makes it a switch with a negation
    (--name, --no-name); a tuple makes it a list.
    help: text, or a function that returns it for the class of the configuration.
    name: spelling of the flag if it is not the name of the field. aliases: further spellings, without dashes, that
    --help does not list. hidden: --help does not list the flag.
    group: title of its group in --help. exclusive: at most one flag of those with this name may be given.
    options: passed to add_argument (type, choices, metavar, nargs, action, parse, …); `positional=True` removes the
    dashes. A field of a subclass that only gives another default keeps the options of its base class.
    """
    metadata = {
        "help": help,
        "name": name,
        "aliases": aliases,
        "group": group,
        "exclusive": exclusive,
        "hidden": hidden,
    }
    return dataclasses.field(default=default, metadata={"flag": metadata | {"options": options}})


def overrides(of: type, *, group: str, skip: Sequence[str] = ()) -> Any:
    """Return a field that collects the flags of another dataclass: a dict of those that were given."""
    metadata = {"overrides": {"of": of, "group": group, "skip": tuple(skip)}}
    return dataclasses.field(default_factory=dict, metadata=metadata)


def flag_metadata(config: type, field: "dataclasses.Field[Any]") -> Mapping[str, Any] | None:
    """Return the metadata of a field's flag: the field's own, else that of the nearest base class; None without one."""
    for base in config.__mro__:
        own = base.__dict__.get("__dataclass_fields__", {}).get(field.name)
        if own is not None and "flag" in own.metadata:
            return cast("Mapping[str, Any]", own.metadata["flag"])
    return None


def flag_options(config: type, field: "dataclasses.Field[Any]") -> Mapping[str, Any]:
    """Return the add_argument options of a field: {} if it is no flag."""
    return cast("Mapping[str, Any]", (flag_metadata(config, field) or {}).get("options", {}))


def parse(
    config: type[ConfigT],
    description: str | None,
    arguments: Sequence[str] | None = None,
    flag_files: dict[str, dict[str, str]] | None = None,
) -> ConfigT:
    """Return the configuration of the command line (sys.argv without `arguments`). Raises UserError.

    flag_files: {flag: {value: file of flags}}, as {"--recipe": {"belle": "recipes/belle-sft.args"}}.
    """
    parser = FlagParser(description=description, prog=module_command(sys.argv))
    parser.flag_file_names = flag_files or {}
    add_flags(parser, config)
    return make_config(config, parser.parse_args(arguments))


def parse_command(
    commands: Mapping[str, type[Config]],
    description: str | None,
    arguments: Sequence[str] | None = None,
    exits: Mapping[str, tuple[str, Callable[[], None]]] | None = None,
) -> tuple[str, Any]:
    """Return (command, its configuration). The docstring of a configuration is the help of its command.

    exits: flags that print something and end the program, {"--list": (help, function)}.
    """
    parser = FlagParser(description=description)
    for name, (text, function) in (exits or {}).items():
        parser.add_argument(name, action=ExitAction, nargs=0, function=function, help=text)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, config in commands.items():
        text = (config.__doc__ or "").split("\n\n")[0]
        about = f"{config.__doc__}\n\n{command_examples(description or '', f'{parser.prog} {name}')}"
        add_flags(subparsers.add_parser(name, help=text.replace("%", "%%"), description=about), config)
    namespace = parser.parse_args(arguments)
    return namespace.command, make_config(commands[namespace.command], namespace)


def make_config(config: type[ConfigT], namespace: argparse.Namespace) -> ConfigT:
    """Return the configuration of the given flags; all others have the defaults of their fields."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if "overrides" in field.metadata:
            other = field.metadata["overrides"]["of"]
            names = [name.name for name in dataclasses.fields(other)]
            values[field.name] = {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}
        elif hasattr(namespace, field.name):
            value = getattr(namespace, field.name)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return config(**values)


def add_flags(parser: FlagParser, config: type[Config]) -> None:
    """Add the flags of all fields of a configuration to a parser."""
    parser.main_flags = config.main_flags
    groups: dict[str, Any] = {"": parser}
    for field in dataclasses.fields(config):
        if other := field.metadata.get("overrides"):
            group = groups.setdefault(other["group"], None) or parser.add_argument_group(other["group"])
            groups[other["group"]] = group
            for inner in dataclasses.fields(other["of"]):
                if inner.name not in other["skip"] and (known := inner.metadata.get("flag")):
                    _add_flag(group, other["of"], inner, known, shows_default=False)
            continue
        if (known := flag_metadata(config, field)) is None:
            continue
        title = known["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        place = groups[title]
        if name := known["exclusive"]:
            place = groups.setdefault(f"{title}\0{name}", None) or place.add_mutually_exclusive_group()
            groups[f"{title}\0{name}"] = place
        _add_flag(place, config, field, known)


def _add_flag(
    place: Any, config: type, field: "dataclasses.Field[Any]", known: Mapping[str, Any], shows_default: bool = True
) -> None:
    options = dict(known["options"])
    default = field.default
    text = known["help"] if isinstance(known["help"], str) else known["help"](config)
    if options.pop("positional", False):
        if default is not MISSING and "nargs" not in options:
            options["nargs"] = "?"
        place.add_argument(field.name, default=argparse.SUPPRESS, help=text, **options)
        return
    if "choices" in options:
        options.setdefault("metavar", "{" + ",".join(map(str, options["choices"])) + "}")
    if isinstance(default, bool) and "action" not in options and "type" not in options:
        options["action"] = argparse.BooleanOptionalAction if default else "store_true"
    if "parse" in options:
        options.setdefault("action", NameList)
    shown = default not in (MISSING, None, False, "", ()) and default is not True and "(default" not in text
    if shown and shows_default:
        texts = ", ".join(map(str, default)) if isinstance(default, tuple) else f"{default}"
        text += f" (default: {texts})".replace("%", "%%")
    required = {"required": True} if default is MISSING else {}
    common = {"dest": field.name, "default": argparse.SUPPRESS, **options}
    text, name = argparse.SUPPRESS if known["hidden"] else text, known["name"] or field.name
    if known["name"] and "action" not in options:
        common.setdefault("metavar", name.upper())
    place.add_argument(f"--{name}", **common, **required, help=text)
    for alias in known["aliases"]:
        place.add_argument(f"--{alias}", **common, help=argparse.SUPPRESS)


class ExitAction(argparse.Action):
    """Calls a function and ends the program: `flag(False, …, action=ExitAction, nargs=0, function=…)`."""

    def __init__(self, *arguments: Any, function: Callable[[], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.function = function

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        self.function()
        parser.exit()


class NameList(argparse.Action):
    """A flag with a list of values separated by commas, spaces, or both.

    The option `read` converts the comma-separated text (default: `split_names`). With nargs=None the list is a single
    argument, for commands with positional files after the flags.
    """

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        self.parse: Callable[[str], Any] = options.pop("parse", split_names)
        super().__init__(option_strings, dest, **{"nargs": "+", **options})

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        texts = [values] if isinstance(values, str) else values
        try:
            value = self.parse(",".join(text.strip(" ,，、") for text in texts))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, value)
