"""ChatTokenizer: encode and decode text, render chats to token ids and a loss mask.

    messages -> ids, mask        <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n
                                                                                           ^^^^^^^^^^^^^^^^ mask = 1

Training, evaluation and serving all call `render`. The chat format (chat_template.py) is stored in the tokenizer's
files. The mask is built from the spans of the messages, not by searching the ids for markers. Marker strings inside a
message are encoded as ordinary text.
The folder format is that of `transformers.AutoTokenizer`: tokenizer.json and tokenizer_config.json. Folders of other
models open too (../export/hf_import.py).
Read next: chat_template.py (the formats), render.py (ids and masks), transformer.py.
"""

import hashlib
import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from common.errors import CHAT_FORMAT_ADVICE, UserError, escape_controls
from common.files import remove, replace_folder, temporary_path, write_error, write_text
from model.chat_template import END_OF_TEXT, IM_END, IM_START, ChatTemplate, Message, find_chat_template
from model.jinja_template import JinjaTemplate
from model.render import RenderedChat, render_chats, render_unfinished
from model.tokenizer_files import open_backend, read_chat_template, read_settings

PAD_TOKEN = "<|pad|>"  # no password  # nosec B105
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, PAD_TOKEN]
SPARE_TOKENS = [f"<|spare_{i}|>" for i in range(12)]  # reserved embedding rows for markers of later stages
LEGACY_TEMPLATE = (  # in tokenizer files of earlier versions, which have no chat_format field
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",  # transformers >= 4.50 stores the template here
    "generation_config.json",  # of imported models: eos_token_id
)


class ChatTokenizer:
    """A trained tokenizer with its chat format.

    `files` maps file names to text. `save` writes them to a folder, and every checkpoint contains them.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.backend = open_backend(files)
        # Otherwise the text "<|im_end|>" in a message would be encoded as the control token.
        self.backend.encode_special_tokens = True
        self.config = read_settings(files, "tokenizer_config.json")
        self.eos = self._special_token("eos_token") or END_OF_TEXT
        self.eos_id = self._token_id(self.eos)
        self.pad_id = self._token_id(self._special_token("pad_token") or self.eos)
        self.format = self._find_format()
        if isinstance(self.format, ChatTemplate) and (self.config.get("chat_format") or not self._template):
            self._write_format(self.format)  # replaces an outdated template; base models have none

    def _special_token(self, name: str) -> str | None:
        """The string of bos_token, eos_token, …: from tokenizer_config.json, else from special_tokens_map.json."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = read_settings(self.files, file).get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                return token
        return None

    def _token_id(self, token: str) -> int:
        try:
            index = self.backend.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate
            index = None
        if index is None:
            raise UserError(
                f"the tokenizer has no {escape_controls(token)[:60]} token: "
                "train one with `python train_tokenizer.py FILES…`"
            )
        return index

    @property
    def _template(self) -> str:
        return read_chat_template(self.files, self.config)

    def _find_format(self) -> ChatTemplate | JinjaTemplate | None:
        """The named format, else the jinja template of an imported model, else None."""
        template = self._template
        name = self.config.get("chat_format")
        if (
            not name
            and (not template or template == LEGACY_TEMPLATE)
            and self.backend.token_to_id(IM_START) is not None
        ):
            name = "chatml"  # files of earlier versions have no chat_format field
        if name:
            return find_chat_template(escape_controls(str(name))[:60], self.eos)
        special = {key: self._special_token(key) or "" for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return JinjaTemplate(template, special, self._markers) if template else None

    def with_chat_format(self, name: str | None) -> "ChatTokenizer":
        """A tokenizer with the same vocabulary and the named chat format; `name` None returns self.

        Raises UserError if the name is unknown or the vocabulary lacks the format's markers.
        """
        if name is None or name == self.format_name:
            return self
        find_chat_template(name, self.eos)  # raises for an unknown name
        for marker in (IM_START, IM_END) if name == "chatml" else ():
            if self.backend.token_to_id(marker) is None:
                raise UserError(f"--chat_format {name}: this tokenizer has no {marker} token; choose another format")
        renamed = json.dumps({**self.config, "chat_format": name}, ensure_ascii=False, indent=2)
        return ChatTokenizer({**self.files, "tokenizer_config.json": renamed})

    def _write_format(self, template: ChatTemplate) -> None:
        """Store the format's jinja template in the files, for transformers."""
        if self.config.get("chat_template") == template.template and "chat_template.jinja" not in self.files:
            return
        self.config = {**self.config, "chat_template": template.template, "chat_format": template.name}
        self.files = {**self.files, "tokenizer_config.json": json.dumps(self.config, ensure_ascii=False, indent=2)}
        self.files.pop("chat_template.jinja", None)

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus 1. Tokenizers of other models may have gaps in their ids."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def im_start_id(self) -> int:
        return self._token_id(IM_START)

    @property
    def im_end_id(self) -> int:
        return self._token_id(IM_END)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of tokenizer.json. Datasets and checkpoints must match it."""
        return sha256_hex(self.files["tokenizer.json"])[:16]

    @property
    def format_name(self) -> str:
        """chatml, mindllm, …; "template" for the jinja template of an imported model; "" without a format."""
        return self.format.name if self.format else ""

    @cached_property
    def rendering_fingerprint(self) -> str:
        """Identifies vocabulary and chat format together; for chatml it equals `fingerprint`."""
        if self.format_name in ("chatml", ""):
            return self.fingerprint
        if not isinstance(self.format, ChatTemplate):
            return f"{self.fingerprint}-{sha256_hex(self.chat_format.template)[:8]}"
        revision = f"-{self.format.revision}" if self.format.revision > 1 else ""
        return f"{self.fingerprint}-{self.format_name}{revision}"

    @property
    def chat_format(self) -> ChatTemplate | JinjaTemplate:
        """The chat format. Raises UserError if the tokenizer has none."""
        if self.format is None:
            raise UserError(f"this tokenizer has no chat template: {CHAT_FORMAT_ADVICE}")
        return self.format

    @property
    def end_of_turn_id(self) -> int:
        """The id of the token that ends an answer."""
        return self.stop_ids[0]

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end generation: the end-of-turn token, eos_token_id of generation_config.json, and eos."""
        existing = [self._token_id(self.format.end_of_turn)] if self.format and self.format.end_of_turn else []
        declared = read_settings(self.files, "generation_config.json").get("eos_token_id")
        ids = [i for i in (declared if isinstance(declared, list) else [declared]) if type(i) is int]
        existing += [i for i in ids if i in self.special_ids]
        return list(dict.fromkeys([*existing, self.eos_id]))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end an answer in this format."""
        return self.format.stop_strings if self.format else ()

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. Marker strings are encoded as text, and no special token is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> list[int]:
        """Token ids of the beginning of a document: with the bos token if the tokenizer adds one."""
        return self.backend.encode_batch([text])[0].ids  # encode_batch releases the GIL, encode does not

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def byte_lengths(self) -> np.ndarray:
        """Number of UTF-8 bytes of each token, shape (vocab,); 0 for special tokens. For bits per byte."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        decoder = json.dumps(json.loads(self.files["tokenizer.json"]).get("decoder"))
        byte_level = '"ByteLevel"' in decoder
        space = "▁" if '"Replace"' in decoder or '"Metaspace"' in decoder else " "  # SentencePiece writes ▁
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, index in vocab.items():
            if index in self.special_ids:
                continue
            if byte_level:  # each character of a byte-level piece is one byte
                lengths[index] = len(piece)
            else:  # byte fallback writes a single byte as <0xE4>
                lone_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
                lengths[index] = 1 if lone_byte else len(piece.replace(space, " ").encode())
        return lengths

    @cached_property
    def _special_aware(self) -> Tokenizer:
        """A backend that encodes marker strings as control tokens, for rendered chats."""
        return open_backend(self.files)

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        tokens = sorted((self.backend.id_to_token(i) or "" for i in self.special_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of a chat and its loss mask, two lists of equal length: 1 at answers and their end-of-turn tokens.

        With `add_generation_prompt` the ids end with the header of the next assistant turn. A token that begins in the
        prompt has mask 0 even if it extends into the answer; this happens only in formats without a marker or newline
        before the answer (text, sometimes belle). Earlier answers that the template rewrites once turns follow have
        mask 0 too; `render_each` returns a sample for each of them.
        Raises UserError if the format does not support these messages.
        """
        return self.render_batch([messages], add_generation_prompt)[0]

    def render_unfinished(self, messages: list[Message]) -> list[int]:
        """Token ids of a chat whose last message is a partial answer, without the text after an answer.

        The same as `continue_final_message` of transformers. Raises UserError if the format does not support these
        messages or omits the last one.
        """
        return render_unfinished(self._special_aware, self.chat_format, self._markers, messages)

    def render_batch(
        self, chats: list[list[Message]], add_generation_prompt: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """`render` for several chats, tokenized in parallel."""
        rendered = self.render_each(chats, add_generation_prompt)
        for chat in rendered:
            if chat.refusal:
                raise UserError(f"{chat.refusal}; {CHAT_FORMAT_ADVICE}")
        return [(chat.samples[-1].ids, chat.samples[-1].mask) for chat in rendered]

    def render_each(self, chats: list[list[Message]], add_generation_prompt: bool = False) -> list[RenderedChat]:
        """The training samples of each chat. The last sample is the whole chat, as `render` returns it.

        A chat has several samples if the template rewrites an answer once turns follow (jinja_template.py): each ends
        at an answer, and every answer is trained in exactly one. A chat that the format does not support has no sample
        and a `refusal`. Raises UserError if the format supports no chat at all.
        """
        return render_chats(self._special_aware, self.chat_format, self._markers, chats, add_generation_prompt)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files to a folder. A folder that holds only tokenizer files is replaced atomically.

        In a folder with other files (an exported model) each file is replaced separately. Raises UserError if the
        folder cannot be written.
        """
        target_folder = Path(folder).resolve()
        if target_folder.exists() and not target_folder.is_dir():
            raise UserError(f"cannot write {target_folder}: it is a file: name a folder")
        try:
            existing = {path.name for path in target_folder.iterdir()} if target_folder.is_dir() else set()
            replaces_folder = existing <= self.files.keys() and not target_folder.is_mount()
            target = temporary_path(target_folder, "tmp") if replaces_folder else target_folder
            for name, text in self.files.items():
                write_text(target / name, text)
            if replaces_folder:
                replace_folder(target, target_folder)
        except OSError as error:
            raise write_error(target_folder, error) from error
        finally:
            remove(temporary_path(target_folder, "tmp"))


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


def save_tokenizer(backend: Tokenizer, folder: str | os.PathLike[str], chat_format: str = "chatml") -> ChatTokenizer:
    """Write a trained tokenizer as a folder (see `ChatTokenizer.save`) and return it as a ChatTokenizer."""
    tokenizer = ChatTokenizer(tokenizer_files(backend, chat_format))
    tokenizer.save(folder)
    return tokenizer


def load_tokenizer(folder: str | os.PathLike[str]) -> ChatTokenizer:
    """Open a tokenizer folder. Raises UserError, with the command to run, if it is missing or unreadable."""
    existing = {name: Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()}
    if "tokenizer.json" not in existing:
        raise UserError(f"no tokenizer in {folder}: run `python train_tokenizer.py FILES…` first")
    try:
        return ChatTokenizer({name: path.read_text(encoding="utf-8") for name, path in existing.items()})
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {error}") from None
