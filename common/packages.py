"""Optional packages: a command that needs some names all missing ones at once, with one pip command.

    require_packages("the server", "fastapi", "uvicorn")
    error: the server needs fastapi and uvicorn: pip install "fastapi>=0.115,<1" "uvicorn>=0.30,<1"

The extras of pyproject.toml contain the same ranges: `pip install .[serve]`. Imports only the standard library.
Read next: errors.py, ../evaluation/doctor.py (lists what is missing).
"""

import importlib.util
import sys
from collections.abc import Sequence

from common.errors import UserError

# Import name -> requirement.
OPTIONAL = {
    "pyarrow": "pyarrow>=16,<27",
    "ftfy": "ftfy>=6.2,<7",
    "opencc": "opencc>=1.1.7,<2",
    "lingua": "lingua-language-detector>=2,<3",
    "rensa": "rensa>=0.5,<0.6",
    "datatrove": "datatrove>=0.6,<0.11",
    "gguf": "gguf>=0.17,<0.20",
    "peft": "peft>=0.18,<0.22",
    "fastapi": "fastapi>=0.115,<1",
    "uvicorn": "uvicorn>=0.30,<1",
    "openai": "openai>=2,<4",
    "streamlit": "streamlit>=1.51,<2",
}
# Not in an extra: they need a compiler, a cluster or an account.
OTHERS = {
    "deepspeed": "deepspeed>=0.19,<0.20",
    "ray": "ray>=2.9,<3",
}


def missing_packages(names: Sequence[str]) -> list[str]:
    """Return those that cannot be imported. A loaded module may have no spec, for which find_spec raises ValueError."""
    return [name for name in names if not (sys.modules.get(name) or _can_be_found(name))]


def _can_be_found(name: str) -> bool:
    return name not in sys.modules and importlib.util.find_spec(name) is not None


def install_advice(what: str, *names: str, otherwise: str = "") -> str:
    """Return "`what` needs A and B: pip install …": the message of the error. otherwise: what works without them."""
    needed = " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
    packages = " ".join(f'"{(OPTIONAL | OTHERS)[name]}"' for name in names)
    return f"{what} needs {needed}: pip install {packages}" + (f", or {otherwise}" if otherwise else "")


def require_packages(what: str, *names: str, otherwise: str = "") -> None:
    """Raise UserError with all of these packages that are not installed, by import name."""
    if missing := missing_packages(names):
        raise UserError(install_advice(what, *missing, otherwise=otherwise))
