"""ChatTokenizer: encode and decode text, render chats to token ids and a loss mask.

    messages -> ids, mask        <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n
                                                                                           ^^^^^^^^^^^^^^^^ mask = 1

Training, evaluation and serving all call `render`. The chat format (chat_template.py) is stored in the tokenizer's
files. The mask is built from the spans of the messages, not by searching the ids for markers. Marker strings inside a
message are encoded as ordinary text.
The folder format is that of `transformers.AutoTokenizer`: tokenizer.json and tokenizer_config.json. Folders of other
models open too (../export/hf_import.py).
Read next: chat_template.py (formats, ids and masks), transformer.py.
"""

import json
import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from common.errors import CHAT_FORMAT_ADVICE, UserError, escape_controls
from model.chat_template import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    ChatTemplate,
    Message,
    find_chat_template,
)
from model.chatml import CHAT_MARKERS as CHAT_MARKERS
from model.fast_bpe import BYTE_OF_CHARACTER, FastBPE, is_line_bpe
from model.jinja_template import JinjaTemplate
from model.renderer import RenderedChat, Renderer
from model.tokenizer_files import (
    LEGACY_TEMPLATE,
    PAD_TOKEN,
    TOKENIZER_FILES,
    mark_special,
    name_chat_markers,
    name_spare_tokens,
    open_backend,
    read_chat_template,
    read_settings,
    read_special_token,
    sha256_hex,
    tokenizer_files,
    write_tokenizer_files,
)
from model.tokenizer_files import SPARE_TOKENS as SPARE_TOKENS

SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, PAD_TOKEN]


class ChatTokenizer:
    """A trained tokenizer with its chat format.

    `files` maps file names to text. `save` writes them to a folder, and every checkpoint contains them.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self.has_old_files = False  # whether CHAT_MARKERS are spare tokens there, on which no model was trained
        if given := files.get("tokenizer.json"):  # else open_backend raises the reason
            files = {**files, "tokenizer.json": name_chat_markers(given)}
            self.has_old_files = files["tokenizer.json"] != given
        self.files = files
        # Encodes plain text. Otherwise the text "<|im_end|>" in it would be encoded as the control token; the library
        # has this setting for special tokens only.
        self.backend = open_backend({name: mark_special(text) for name, text in files.items()})
        self.backend.encode_special_tokens = True
        self.config = read_settings(files, "tokenizer_config.json")
        self.eos = read_special_token(files, "eos_token") or END_OF_TEXT
        self.eos_id = self._token_id(self.eos)
        self.pad_id = self._token_id(read_special_token(files, "pad_token") or self.eos)
        self.format = self._find_format()

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

    def _find_format(self) -> ChatTemplate | JinjaTemplate | None:
        """The named format, else the jinja template of an imported model, else None."""
        template, name = read_chat_template(self.files, self.config), self.config.get("chat_format")
        # Files of earlier versions have no chat_format field.
        is_legacy = template in ("", LEGACY_TEMPLATE) and self.backend.token_to_id(IM_START) is not None
        if name or is_legacy:
            named = find_chat_template(escape_controls(str(name or "chatml"))[:60], self.eos)
            if name or not template:  # replaces an outdated template; base models have none
                self._write_template(named)
            return named
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special_tokens = {name: read_special_token(self.files, name) or "" for name in names}
        return JinjaTemplate(template, special_tokens, self._pattern(self.special_ids)) if template else None

    def _write_template(self, chat_format: ChatTemplate) -> None:
        """Store the format's jinja template in the files, for transformers."""
        template = chat_format.template
        if self.config.get("chat_template") == template and "chat_template.jinja" not in self.files:
            return
        self.config = {**self.config, "chat_template": template, "chat_format": chat_format.name}
        self.files = {**self.files, "tokenizer_config.json": json.dumps(self.config, ensure_ascii=False, indent=2)}
        self.files.pop("chat_template.jinja", None)

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

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus 1. Tokenizers of other models may have gaps in their ids."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def im_end_id(self) -> int:
        return self._token_id(IM_END)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of tokenizer.json. Datasets and checkpoints must match it.

        CHAT_MARKERS count as the spare tokens that they replace: an old tokenizer keeps its fingerprint.
        """
        return sha256_hex(name_spare_tokens(self.files["tokenizer.json"]))[:16]

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

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of `encode_batch`, as arrays of shape (tokens,), uint32. Fast for the BPE of this project."""
        if self._fast_bpe is None:
            return [np.array(ids, np.uint32) for ids in self.encode_batch(texts)]
        return self._fast_bpe.encode(texts)

    @cached_property
    def _fast_bpe(self) -> FastBPE | None:
        state = json.loads(self.backend.to_str())
        return FastBPE(state) if is_line_bpe(state) else None

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def chat_marker_ids(self) -> frozenset[int]:
        """The ids of CHAT_MARKERS that the tokenizer has as added tokens. They are generated and decoded as text."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.content in CHAT_MARKERS)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of control tokens, without CHAT_MARKERS."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special) - self.chat_marker_ids

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each token, shape (vocab,); 0 for special tokens. For bits per byte.

        CHAT_MARKERS have 0 bytes in a tokenizer of this project, in which no text is encoded as one of them.
        """
        vocab = self.backend.get_vocab(with_added_tokens=True)
        decoder = json.dumps(json.loads(self.files["tokenizer.json"]).get("decoder"))
        byte_level = '"ByteLevel"' in decoder
        space = "▁" if '"Replace"' in decoder or '"Metaspace"' in decoder else " "  # SentencePiece writes ▁
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        added = self.backend.get_added_tokens_decoder()
        for piece, index in vocab.items():
            if index in added and added[index].special:
                continue
            if byte_level:  # each character of a byte-level piece is one byte
                lengths[index] = len(piece)
            else:  # byte fallback writes a single byte as <0xE4>
                lone_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
                lengths[index] = 1 if lone_byte else len(piece.replace(space, " ").encode())
        return lengths

    def _pattern(self, ids: frozenset[int]) -> re.Pattern[str]:
        """Matches the names of added tokens."""
        tokens = sorted((self.backend.id_to_token(i) or "" for i in ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    @cached_property
    def renderer(self) -> Renderer:
        """Its backend encodes marker strings as control tokens. Raises UserError if the tokenizer has no format."""
        markers = self._pattern(self.special_ids | self.chat_marker_ids)
        is_named = isinstance(self.chat_format, ChatTemplate)
        answer_markers = markers if is_named else self._pattern(self.special_ids)
        return Renderer(open_backend(self.files), markers, self.chat_format, answer_markers, lambda: self._fast_bpe)

    def render(
        self, messages: list[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of a chat and its loss mask, two lists of equal length: 1 at answers and their end-of-turn tokens.

        With `add_generation_prompt` the ids end with the header of the next assistant turn, and an empty thought if
        `enable_thinking` is False; None leaves thinking to the model. A token that begins in the
        prompt has mask 0 even if it extends into the answer; this happens only in formats without a marker or newline
        before the answer (text, sometimes belle). Earlier answers that the template rewrites once turns follow have
        mask 0 too; `render_each` returns a sample for each of them.
        Raises UserError if the format does not support these messages.
        """
        (chat,) = self.render_each([messages], add_generation_prompt, enable_thinking)
        if chat.refusal:
            raise UserError(f"{chat.refusal}; {CHAT_FORMAT_ADVICE}")
        return chat.samples[-1].ids, chat.samples[-1].mask

    def render_each(
        self, chats: list[list[Message]], add_generation_prompt: bool = False, enable_thinking: bool | None = None
    ) -> list[RenderedChat]:
        """The training samples of each chat, tokenized in parallel. The last one is the whole chat, as in `render`.

        A chat has several samples if the template rewrites an answer once turns follow (chatml.py, jinja_template.py):
        each ends at an answer, and every answer is trained in exactly one. A chat that the format does not support has
        no sample and a `refusal`. Raises UserError if the format supports no chat at all.
        """
        return self.renderer.render(chats, add_generation_prompt, enable_thinking)

    def render_unfinished(self, messages: list[Message]) -> list[int]:
        """Token ids of a chat whose last message is a partial answer, without the text after an answer.

        The same as `continue_final_message` of transformers. Raises UserError if the format does not support these
        messages or omits the last one.
        """
        return self.renderer.render_unfinished(messages)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files to a folder; see `write_tokenizer_files`."""
        write_tokenizer_files(self.files, folder)


def piece_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece, or the UTF-8 bytes of an added token, which is stored as plain text."""
    is_byte_level = all(char in BYTE_OF_CHARACTER for char in piece)
    return bytes(BYTE_OF_CHARACTER[char] for char in piece) if is_byte_level else piece.encode()


def save_tokenizer(backend: Tokenizer, folder: str | os.PathLike[str], chat_format: str = "chatml") -> ChatTokenizer:
    """Write a trained tokenizer as a folder (see `ChatTokenizer.save`) and return it as a ChatTokenizer."""
    tokenizer = ChatTokenizer(tokenizer_files(backend, chat_format))
    tokenizer.save(folder)
    return tokenizer


def load_tokenizer(folder: str | os.PathLike[str]) -> ChatTokenizer:
    """Open a tokenizer folder. Raises UserError, with the command to run, if it is missing or unreadable."""
    existing = {name: Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()}
    if "tokenizer.json" not in existing:
        other = "or name the folder of another with --tokenizer, as out/demo/tokenizer"
        raise UserError(f"no tokenizer in {folder}: run `python train_tokenizer.py FILES…` first, {other}")
    try:
        return ChatTokenizer({name: path.read_text(encoding="utf-8") for name, path in existing.items()})
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {error}") from None
