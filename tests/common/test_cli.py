"""Command lines made from frozen dataclasses: defaults, limits, aliases, groups, files of flags, subcommands."""

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any

import pytest

from common.cli import Config, ExitAction, flag, overrides, parse, parse_command
from common.errors import UserError, choose_from
from common.flag_types import fraction, path_string, positive_int


@dataclass(frozen=True)
class Shape:
    dim: int = flag(512, "width", type=positive_int)
    vocab_size: int = 6400


@dataclass(frozen=True)
class BaseConfig(Config):
    """trains a model"""

    data_path: str = flag("data", "folder", type=path_string, group="files")
    batch_size: int = flag(8, "rows", type=positive_int, aliases=("batch",))
    ratio: float = flag(0.1, lambda config: f"of {config.__name__}", type=fraction)
    compile: bool = flag(False, "compile")
    verify: bool = flag(True, "compare")
    names: tuple[str, ...] = flag(("all",), "names", nargs="+", metavar="NAME")
    prompt: str | None = flag(None, "one prompt", exclusive="prompts")
    prompts: str | None = flag(None, "a file", exclusive="prompts")
    limit: int = flag(0, "0 means no limit", type=positive_int)
    shape: dict[str, Any] = overrides(Shape, group="model", skip=("vocab_size",))


@dataclass(frozen=True)
class TunedConfig(BaseConfig):
    """tunes a model"""

    batch_size: int = 32

    def check(self) -> None:
        if self.compile and self.prompt:
            raise UserError("--compile and --prompt: leave one out")


@dataclass(frozen=True)
class FilesConfig(Config):
    """reads files"""

    files: tuple[str, ...] = flag(MISSING, "files", positional=True, nargs="+")
    kind: str = flag("a", "kind", choices=("a", "b"))
    check_only: bool = flag(False, "write nothing", name="check")
    kinds: bool = flag(False, "list", action=ExitAction, nargs=0, function=lambda: print("a b"))


def test_defaults_come_from_the_fields_and_subclasses_change_them():
    config = parse(TunedConfig, "text", [])
    assert (config.batch_size, config.data_path, config.names, config.shape) == (32, "data", ("all",), {})
    assert config == TunedConfig() and parse(BaseConfig, "", []).batch_size == 8


def test_flags_aliases_switches_and_lists():
    config = parse(TunedConfig, "", ["--batch", "4", "--compile", "--names", "a", "b", "--dim", "64"])
    assert (config.batch_size, config.compile, config.names, config.shape) == (4, True, ("a", "b"), {"dim": 64})
    assert config.verify and not parse(TunedConfig, "", ["--no-verify"]).verify
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch_size = 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "0"], "argument --batch_size: 0 is not a whole number of at least 1"),
        (["--batch", "0"], "argument --batch: 0 is not a whole number of at least 1"),
        (["--prompt", "x", "--prompts", "y"], "not allowed with argument --prompt"),
        (["--compile", "--prompt", "x"], "--compile and --prompt: leave one out"),
        (["--dim=--"], "argument --dim: a value is missing"),
        (["--unknown"], "unknown flag --unknown; "),
        (["--vocab_size", "3"], "unknown flag --vocab_size"),
    ],
)
def test_invalid_flags_are_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        parse(TunedConfig, "", arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_limits_also_hold_for_configurations_made_in_python():
    with pytest.raises(UserError, match="--batch_size: 0 is not a whole number of at least 1"):
        BaseConfig(batch_size=0)
    assert BaseConfig().limit == 0, "a default outside the limits means: not given"


def test_help_lists_groups_and_defaults_but_no_aliases(capsys):
    with pytest.raises(SystemExit):
        parse(TunedConfig, "What it does.\n\n    an example", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("What it does. an example", "files:", "rows (default: 32)", "of TunedConfig (default: 0.1)", "--dim"):
        assert part in text
    assert "--batch " not in text and "width (default" not in text, "the model's defaults depend on the preset"


@dataclass(frozen=True)
class ShortConfig(TunedConfig):
    main_flags = ("names", "batch_size")


def test_help_shows_the_main_flags_in_order_and_help_all_the_others(capsys):
    lines = "\n".join(f"    python a.py {number}" for number in range(9))
    description = f"What it does.\n\n    y = x\n\n{lines}\n\nRead next: b.py"
    shown = []
    for flag_name in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parse(ShortConfig, description, [flag_name])
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    short, full = shown
    assert "y = x" in short and "a.py 5" in short and "a.py 6" not in short and "Read next" not in short
    assert (
        0 < short.index("--names NAME") < short.index("--batch_size N ") < short.index("--help_all describes the other")
    )
    assert "--data_path" not in short and "the other 8 flags" in short
    assert "a.py 8" in full and "Read next: b.py" in full
    for name in ("data_path", "batch_size", "ratio", "compile", "no-verify", "names", "prompts", "limit", "dim"):
        assert f"--{name}" in full


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batchsize", "3"], "unknown flag --batchsize: did you mean --batch_size? `python"),
        (["--batch-size", "3"], "unknown flag --batch-size: did you mean --batch_size?"),
        (["—batch_size", "3"], "unknown flag —batch_size: did you mean --batch_size?"),
        (["-batch_size", "3"], "did you mean --batch_size?"),
        (["--data_pth=x"], "unknown flag --data_pth: did you mean --data_path?"),
        (["--zzz", "3"], "unknown flag --zzz; `python"),
        (["3"], "unexpected value '3': a flag begins with --"),
    ],
)
def test_a_misspelt_flag_is_one_line_with_the_nearest_flag(arguments, message):
    with pytest.raises(UserError) as error:
        parse(TunedConfig, "", arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_misspelt_choice_or_command_is_one_line_with_the_nearest_one():
    commands = {"train": TunedConfig, "read": FilesConfig}
    for arguments, message in (
        (["trian"], "invalid choice: 'trian': did you mean train? choose from train, read;"),
        (["read", "a", "--kind", "bb"], "argument --kind: invalid choice: 'bb': did you mean b? choose from a, b;"),
        (["train", "--batchsize", "2"], "unknown flag --batchsize: did you mean --batch_size?"),
    ):
        with pytest.raises(UserError) as error:
            parse_command(commands, "", arguments)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_long_list_of_choices_is_not_repeated_where_one_is_near():
    names = [f"subject_{number}" for number in range(50)]
    assert choose_from("subjct_7", names) == "did you mean subject_7?"
    assert choose_from("", names) == f"choose from {', '.join(names)}"
    assert choose_from("abc", ["abd", "x"]) == "did you mean abd? choose from abd, x"


def test_the_help_of_a_command_has_the_examples_of_its_description(capsys):
    description = "About.\n\n    python pytest train A    trains\n    python pytest read A     reads\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pytest"])
        with pytest.raises(SystemExit):
            parse_command({"train": TunedConfig, "read": FilesConfig}, description, ["read", "--help"])
    text = capsys.readouterr().out
    assert "python pytest read A     reads" in text and "pytest train" not in text


def test_a_file_of_flags_is_overridden_by_the_command_line(tmp_path):
    file = tmp_path / "a.args"
    file.write_text('# a comment\n--batch_size 64 --compile   # two flags\n\n--data_path "two words"\n--names a b\n')
    for arguments in ([f"@{file}", "--batch_size", "2"], ["--batch_size", "2", f"@{file}"]):
        config = parse(TunedConfig, "", arguments)
        assert (config.batch_size, config.compile, config.data_path) == (2, True, "two words")
        assert config.names == ("a", "b")
    config = parse(TunedConfig, "", ["--recipe=x"], {"--recipe": {"x": str(file)}})
    assert config == parse(TunedConfig, "", ["--recipe", "x"], {"--recipe": {"x": str(file)}})
    assert config.batch_size == 64
    assert parse(TunedConfig, "", ["--prompt", "@someone"]).prompt == "@someone", "only names in .args are files"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory: give an existing file"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"--epochs 3\n--batch_size 0\n", ".args:2: argument --batch_size: 0 is not"),
        (b"--nothing 3\n", ".args:1: unknown flag --nothing"),
        (b"batch_size 3\n", ".args:1: batch_size: a line begins with a flag"),
        (b'--data_path "x\n', ".args:1: No closing quotation"),
    ],
)
def test_a_wrong_file_of_flags_is_named_with_its_line(tmp_path, content, message):
    file = tmp_path / "a.args"
    if content is not None:
        file.write_bytes(content.replace(b"--epochs 3", b"--limit 3"))
    with pytest.raises(UserError) as error:
        parse(TunedConfig, "", [f"@{file}"])
    assert str(file) in str(error.value) and message in str(error.value)


def test_an_unknown_name_of_a_flag_file_lists_the_known_ones():
    with pytest.raises(UserError, match="--recipe: y: choose from x"):
        parse(TunedConfig, "", ["--recipe", "y"], {"--recipe": {"x": "x.args"}})


def test_commands_have_a_configuration_each(tmp_path, capsys):
    commands = {"train": TunedConfig, "read": FilesConfig}
    assert parse_command(commands, "", ["read", "a", "b"]) == ("read", FilesConfig(("a", "b")))
    (tmp_path / "b.args").write_text("--kind b\n")
    assert parse_command(commands, "", ["read", "a", f"@{tmp_path}/b.args"])[1].kind == "b"
    assert parse(FilesConfig, "", ["a", "--check"]).check_only
    for arguments in (["read"], ["read", "a", "--kind", "c"], [], ["write"]):
        with pytest.raises(UserError):
            parse_command(commands, "", arguments)
    with pytest.raises(SystemExit):
        parse_command(commands, "", ["--list"], {"--list": ("list", lambda: print("listed"))})
    with pytest.raises(SystemExit):
        parse_command(commands, "", ["read", "--kinds"])
    assert capsys.readouterr().out == "listed\na b\n"
