"""The files of a tokenizer folder: read and validate, create, write.

    tokenizer.json            vocabulary, merges and special tokens        -> open_backend
    tokenizer_config.json     eos_token, pad_token, chat_template, …       -> read_settings, read_chat_template

The files may be damaged, foreign or malicious: every reader raises a UserError that names the file.
Read next: tokenizer.py.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.errors import UserError, escape_controls
from common.files import remove, replace_folder, temporary_path, write_error, write_text
from model.chat_template import END_OF_TEXT, find_chat_template
from model.chatml import CHAT_MARKERS

PAD_TOKEN = "<|pad|>"  # no password  # nosec B105
MAX_VOCAB_SIZE = 2**24  # ids; tables with one row per id are allocated
LEGACY_TEMPLATE = (  # in tokenizer files of earlier versions, which have no chat_format field
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPARE_TOKENS = [f"<|spare_{i}|>" for i in range(12)]  # reserved embedding rows for markers of later stages
_MARKER_OF_SPARE = dict(zip(SPARE_TOKENS, CHAT_MARKERS, strict=False))
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",  # transformers >= 4.50 stores the template here
    "generation_config.json",  # of imported models: eos_token_id
)


def open_backend(files: dict[str, str]) -> Tokenizer:
    """tokenizer.json as a tokenizers.Tokenizer, without padding and truncation, which a foreign file may set."""
    try:
        backend = Tokenizer.from_str(files["tokenizer.json"])
        backend.no_padding()
        backend.no_truncation()
        ids = backend.get_vocab(with_added_tokens=True).values()
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"tokenizer.json is damaged ({escape_controls(str(error))[:200]})") from None
    if not ids or max(ids) >= MAX_VOCAB_SIZE:
        raise UserError(f"tokenizer.json has {'ids above ' + str(MAX_VOCAB_SIZE) if ids else 'no token'}")
    return backend


def name_chat_markers(text: str) -> str:
    """A tokenizer.json of this project whose first spare tokens are CHAT_MARKERS, with their ids.

    They are added tokens that are not special: servers find them in the decoded text. Other files are unchanged.
    """
    if not all(json.dumps(spare) in text for spare in _MARKER_OF_SPARE) or any(
        json.dumps(marker) in text for marker in CHAT_MARKERS
    ):
        return text
    return _rename_added(text, _MARKER_OF_SPARE, special=False)


def name_spare_tokens(text: str) -> str:
    """The inverse of `name_chat_markers`: the tokenizer.json as `train_tokenizer` makes it."""
    if json.dumps(SPARE_TOKENS[-1]) not in text:
        return text  # of another project, which may have these markers
    return _rename_added(text, {marker: spare for spare, marker in _MARKER_OF_SPARE.items()}, special=True)


def mark_special(text: str) -> str:
    """The tokenizer.json with CHAT_MARKERS as special tokens, which an encoder can treat as text."""
    if json.dumps(SPARE_TOKENS[-1]) not in text:
        return text
    return _rename_added(text, {marker: marker for marker in CHAT_MARKERS}, special=True)


def _rename_added(text: str, names: dict[str, str], special: bool) -> str:
    """Text for text, so that everything else keeps its spelling: fingerprints are hashes of the file."""
    for old, new in names.items():
        entry = rf'("content":\s*{re.escape(json.dumps(old))}[^{{}}]*?"special":\s*)(?:true|false)'
        text = re.sub(entry, rf"\g<1>{'true' if special else 'false'}", text)
        text = text.replace(json.dumps(old), json.dumps(new))
    return text


def read_settings(files: dict[str, str], name: str) -> dict[str, Any]:
    """The JSON object in one of the other files; {} if there is no such file."""
    try:
        content = json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is damaged: it is not a JSON object")
    return content


def read_special_token(files: dict[str, str], name: str) -> str | None:
    """The string of bos_token, eos_token, …: from tokenizer_config.json, else from special_tokens_map.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_settings(files, file).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    return None


def read_chat_template(files: dict[str, str], settings: dict[str, Any]) -> str:
    """The template in chat_template.jinja, else in tokenizer_config.json (a text, or a list with a default); or ""."""
    template = files.get("chat_template.jinja") or settings.get("chat_template")
    if isinstance(template, list):  # several with names, for tools and the like
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, (str, type(None))):
        raise UserError("tokenizer_config.json is damaged: chat_template is not text")
    return template or ""


def sha256_hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_files(backend: Tokenizer, chat_format: str = "chatml") -> dict[str, str]:
    """The files of a tokenizer folder, {name: text}, for a trained `tokenizers.Tokenizer`."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # loads in transformers 4 and 5 alike
        "eos_token": END_OF_TEXT,
        "pad_token": PAD_TOKEN,
        "model_max_length": 1_000_000,  # the model's config states the real limit
        "clean_up_tokenization_spaces": False,
        "chat_template": find_chat_template(chat_format).template,
        "chat_format": chat_format,
    }
    specials = {"eos_token": END_OF_TEXT, "pad_token": PAD_TOKEN}
    return {
        "tokenizer.json": backend.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        "special_tokens_map.json": json.dumps(specials, indent=2),
    }


def write_tokenizer_files(files: dict[str, str], folder: str | os.PathLike[str]) -> None:
    """Write {name: text} to a folder. A folder that holds only tokenizer files is replaced atomically.

    In a folder with other files (an exported model) each file is replaced separately. Raises UserError if the
    folder cannot be written.
    """
    target_folder = Path(folder).resolve()
    if target_folder.exists() and not target_folder.is_dir():
        raise UserError(f"cannot write {target_folder}: it is a file: name a folder")
    try:
        existing = {path.name for path in target_folder.iterdir()} if target_folder.is_dir() else set()
        replaces_folder = existing <= files.keys() and not target_folder.is_mount()
        target = temporary_path(target_folder, "tmp") if replaces_folder else target_folder
        for name, text in files.items():
            write_text(target / name, text)
        if replaces_folder:
            replace_folder(target, target_folder)
    except OSError as error:
        raise write_error(target_folder, error) from error
    finally:
        remove(temporary_path(target_folder, "tmp"))
