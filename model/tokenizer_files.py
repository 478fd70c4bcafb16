"""Reading the files of a tokenizer: every one may be damaged, foreign, or written to break this program.

    open_backend(files)                   tokenizer.json as a tokenizers.Tokenizer
    read_settings(files, name)            the JSON object in one of the other files, {} where it is not there
    read_chat_template(files, settings)        the chat template, "" where there is none

Each raises UserError naming the file. Read next: tokenizer.py.
"""

import json
from typing import Any

from tokenizers import Tokenizer

from common.errors import UserError, escape_controls

MAX_VOCAB_SIZE = 2**24  # of a vocabulary: a table with a row per id is made of it


def open_backend(files: dict[str, str]) -> Tokenizer:
    """tokenizer.json without its padding and truncation, which a foreign file may ask for."""
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


def read_settings(files: dict[str, str], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is damaged: it is not a JSON object")
    return content


def read_chat_template(files: dict[str, str], settings: dict[str, Any]) -> str:
    """From chat_template.jinja, else from tokenizer_config.json: a text, or the default of a list of them."""
    template = files.get("chat_template.jinja") or settings.get("chat_template")
    if isinstance(template, list):  # several with names, for tools and the like
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, (str, type(None))):
        raise UserError("tokenizer_config.json is damaged: chat_template is not text")
    return template or ""
