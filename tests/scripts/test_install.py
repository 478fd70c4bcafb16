"""pip install: the same packages in all lists, ranges that end after the tested version, a wheel with every file."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

from common.packages import OPTIONAL, OTHERS, install_advice, require_packages
from evaluation.doctor import EXTRAS
from tests.helpers import ROOT, one_line_error, run_process

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")


def lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if re.match(r"\w", line)]


@pytest.fixture(scope="module")
def extras() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"]


def test_all_lists_of_packages_agree(extras):
    for extra, names in EXTRAS.items():
        assert [OPTIONAL[name] for name in names] == extras[extra]
    assert {name for names in EXTRAS.values() for name in names} == OPTIONAL.keys()
    own = [line for line in extras["dev"] if not line.startswith("mengya[")]
    assert extras["dev"][0] == f"mengya[{','.join(EXTRAS)}]"
    assert sorted(lines("requirements-dev.txt")) == sorted([*own, *OPTIONAL.values()])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f'"{OTHERS["deepspeed"]}"' in makefile


def test_every_range_ends_after_the_version_that_is_tested():
    """The installed version is inside, and the next one of the last number of the upper end is not."""
    checked = 0
    for line in [*lines("requirements.txt"), *lines("requirements-dev.txt"), OTHERS["deepspeed"]]:
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        upper = next(spec for spec in requirement.specifier if spec.operator in ("<", "<="))
        depth = upper.version.count(".") + 1
        numbers = [*map(int, re.findall(r"\d+", version)[:depth])]
        following = ".".join(map(str, [*numbers[:-1], numbers[-1] + 1]))
        assert requirement.specifier.contains(version), f"{line}: {version} is installed"
        assert not requirement.specifier.contains(following), f"{line} allows {following}, tested was {version}"
        checked += 1
    assert checked >= 13


@pytest.mark.parametrize("missing", [["fastapi"], ["fastapi", "uvicorn"]])
def test_all_missing_packages_stand_in_one_command(monkeypatch, missing):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with one_line_error(install_advice("the server", *missing), *(f'"{OPTIONAL[name]}"' for name in missing)) as error:
        require_packages("the server", "fastapi", "uvicorn", "torch")
    assert error.value.args[0].count("pip install") == 1
    assert install_advice("x", "ftfy", "lingua", "rensa").startswith("x needs ftfy, lingua and rensa: pip install")


def test_the_wheel_has_every_file_of_every_package_and_imports_without_the_folder(tmp_path):
    pytest.importorskip("setuptools", reason="builds the wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    source = tmp_path / "source"
    for name in names:  # a copy: pip writes build/ and an egg-info folder into the source
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = run_process(sys.executable, *command)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("mengya-*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
        wheel.extractall(tmp_path / "installed")
    packages = {name.split("/")[0] for name in names if name.endswith("/__init__.py")} - {"tests", "benchmarks", "docs"}
    assert packed == {name for name in names if name.split("/")[0] in packages}
    assert metadata.count("Requires-Dist: torch<=") == 1

    modules = [name.removesuffix(".py").replace("/", ".") for name in sorted(packed) if name.endswith(".py")]
    imports = "; ".join(f"import {name}" for name in modules if name.startswith(("common.", "corpus.", "model.")))
    code = f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
    code += f"sys.path.insert(0, {str(tmp_path / 'installed')!r})\n{imports}\n"
    code += "from corpus.layouts import LAYOUTS; import model.config; print(len(LAYOUTS), model.config.__file__)"
    done = run_process(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "installed") in done.stdout
