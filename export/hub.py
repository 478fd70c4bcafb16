"""Uploads an exported folder to the model hub with huggingface_hub.

    push_to_hub(folder, "me/small-chat", private=True)      creates the repository if necessary, uploads every file

Token, endpoint and cache are those of that library (`hf auth login`, HF_TOKEN, HF_ENDPOINT).
Read next: ../export_model.py.
"""

import re
from pathlib import Path

from common.errors import UserError


def check_repo_id(name: str, needs_token: bool) -> None:
    """Raises UserError if `name` is not a repository id, or if a token is needed and none is configured."""
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push_to_hub {name}: write USER/MODEL with letters, digits, - _ and .") from None
    if needs_token and not huggingface_hub.get_token():
        raise UserError("--push_to_hub needs a token: run `hf auth login`, or set HF_TOKEN; --dry_run needs none")


def list_files(folder: Path) -> list[str]:
    """One line for each file: size in bytes and name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.stat().st_size:>15,} bytes  {path.relative_to(folder).as_posix()}" for path in files]


def push_to_hub(folder: Path, name: str, private: bool) -> str:
    """Upload all files in one commit; return the URL of the repository. Raises UserError with the hub's reason."""
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    try:
        repository = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload the exported model")
    except Exception as error:  # the type of a network error depends on the version of huggingface_hub
        reason = re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
        raise UserError(f"cannot push to {name} ({reason}): the folder {folder} is complete") from None
    return str(repository)
