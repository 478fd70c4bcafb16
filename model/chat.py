"""How a chat becomes token ids: the tokenizer as the house sees it, and the one rendering of a conversation.

    messages -> ids, mask        <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>\\n
                                                                                           ^^^^^^^^^^^^^^^^ mask = 1

SFT, evaluation, the command line and every later front end call `render`; nobody else writes a marker. The mask comes
from the spans of the messages while they are put together, never from searching for marker ids afterwards. Marker
strings that a user types stay ordinary text.

Reads and writes a folder of tokenizer.json + tokenizer_config.json that `transformers.AutoTokenizer` opens as well.
Read next: transformer.py (what the ids meet), ../train_tokenizer.py (where the folder comes from).
"""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from corpus.errors import UserError

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, PAD]
SPARE_TOKENS = [
    f"<|spare_{i}|>" for i in range(12)
]  # unused rows of the embedding, for markers that later stages invent
ROLES = ("system", "user", "assistant", "tool")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Message = dict[str, str]


class ChatTokenizer:
    """A trained tokenizer and the chat format that it was trained for.

    `files` maps file names to their text: it is what `save` writes and what a checkpoint carries, so that a single .pth
    is enough to talk to a model.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.backend = Tokenizer.from_str(files["tokenizer.json"])
        # Without this line the *text* "<|im_end|>" in a user's message would become the control token.
        self.backend.encode_special_tokens = True
        self.eos_id, self.im_start_id, self.im_end_id, self.pad_id = (self._id(token) for token in SPECIAL_TOKENS)

    def _id(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        if index is None:
            raise UserError(f"the tokenizer has no {token} token: train one with `python train_tokenizer.py FILES…`")
        return index

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name this tokenizer: datasets and checkpoints made with another one are refused."""
        return hashlib.sha256(self.files["tokenizer.json"].encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; marker strings inside it stay text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, shape (vocab,); 0 for special tokens. For bits per byte."""
        vocab = self.backend.get_vocab(with_added_tokens=True)
        byte_level = json.loads(self.files["tokenizer.json"])["decoder"]["type"] == "ByteLevel"
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, index in vocab.items():
            if index in self.special_ids:
                continue
            if byte_level:  # every character of a byte-level piece is one byte
                lengths[index] = len(piece)
            else:  # byte fallback spells a lone byte as <0xE4>
                lone_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
                lengths[index] = 1 if lone_byte else len(piece.encode())
        return lengths

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of a conversation and the mask of trained tokens: 1 at the answers and the <|im_end|> closing each.

        With `add_generation_prompt` the ids end where the assistant is to speak. Both lists have the same length.
        """
        ids: list[int] = []
        mask: list[int] = []

        def add(new_ids: list[int], trained: int) -> None:
            ids.extend(new_ids)
            mask.extend([trained] * len(new_ids))

        for message in messages:
            trained = int(message["role"] == "assistant")
            add([self.im_start_id, *self.encode(message["role"] + "\n")], 0)
            add([*self.encode(message["content"]), self.im_end_id], trained)
            add(self.encode("\n"), 0)
        if add_generation_prompt:
            add([self.im_start_id, *self.encode("assistant\n")], 0)
        return ids, mask

    def save(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            temporary = Path(folder) / (name + ".tmp")
            temporary.write_text(text, encoding="utf-8", newline="\n")
            temporary.replace(Path(folder) / name)


def tokenizer_files(backend: Tokenizer, chat_template: str = CHAT_TEMPLATE) -> dict[str, str]:
    """The files of a tokenizer folder, {name: text}, for a trained `tokenizers.Tokenizer`."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # loads in transformers 4 and 5 alike
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "model_max_length": 1_000_000,  # the limit is the model's, and its config states it
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    specials = {"eos_token": END_OF_TEXT, "pad_token": PAD}
    return {
        "tokenizer.json": backend.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        "special_tokens_map.json": json.dumps(specials, indent=2),
    }


def save_tokenizer(
    backend: Tokenizer, folder: str | os.PathLike[str], chat_template: str = CHAT_TEMPLATE
) -> ChatTokenizer:
    """Write a trained tokenizer as a folder that both this project and transformers open; returns it opened."""
    tokenizer = ChatTokenizer(tokenizer_files(backend, chat_template))
    tokenizer.save(folder)
    return tokenizer


def load_tokenizer(folder: str | os.PathLike[str]) -> ChatTokenizer:
    """Open a tokenizer folder.

    Raises UserError with the command to run when there is none or it is not one of ours.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    found = {name: Path(folder) / name for name in names if (Path(folder) / name).is_file()}
    if "tokenizer.json" not in found:
        raise UserError(f"no tokenizer in {folder}: run `python train_tokenizer.py FILES…` first")
    try:
        return ChatTokenizer({name: path.read_text(encoding="utf-8") for name, path in found.items()})
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"cannot read {found['tokenizer.json']} ({error}): train it again") from None
