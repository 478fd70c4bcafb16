"""Token ids in, text out, token by token, without half a character and without a stop string.

A byte-level token is a few bytes, not a few characters: one Chinese character may take three of them. What is not
certain yet is held back; what came out is never taken back.
Called by generate.py. Read next: tokenizer.py (ids and text the other way round).
"""

import codecs
import re

from tokenizers import decoders

from model.tokenizer import ChatTokenizer

# Byte-level pieces spell a byte as one visible character: printable ones as themselves, others from U+0100 on (GPT-2).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def token_bytes(tokenizer: ChatTokenizer, token_id: int) -> bytes:
    """What a token adds to the text, in UTF-8; several tokens may share a character."""
    piece = tokenizer.backend.id_to_token(token_id) or ""
    if isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return _spelled(piece)
    return bytes([int(piece[3:5], 16)]) if _is_lone_byte(piece) else tokenizer.decode([token_id]).encode()


def _spelled(piece: str) -> bytes:
    """The bytes of a byte-level piece; of an added token, which is written as it is, its own."""
    known = all(char in _BYTE_OF for char in piece)
    return bytes(_BYTE_OF[char] for char in piece) if known else piece.encode()


def _is_lone_byte(piece: str) -> bool:
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece) is not None


class TextStream:
    """Ids in, text out, token by token: the pieces joined equal `tokenizer.decode` of all ids (up to a stop string).

    Holds back what the next token may still change: an unfinished UTF-8 character, and the beginning of a stop string.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: tuple[str, ...] = ()) -> None:
        self.backend = tokenizer.backend
        self.byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Other decoders: ids whose text is not out yet, behind one whose text is: some treat a first piece differently.
        self.run: list[int] = []
        self.out = ""  # the text of that one
        self.stop = stop
        self.held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token; often empty in the middle of a character."""
        piece = self.backend.id_to_token(token_id) or ""
        if self.byte_level:
            return self._release(self.utf8.decode(_spelled(piece)))
        self.run.append(token_id)
        return "" if _is_lone_byte(piece) or self._decode_run().endswith("\ufffd") else self._release(self._take_run())

    def before(self, token_id: int) -> str:
        """The text of earlier tokens that this one completes, if it comes next: a character spelt in lone bytes."""
        if self.byte_level or _is_lone_byte(self.backend.id_to_token(token_id) or ""):
            return ""
        return self._decode_run()[len(self.out) :]

    def finish(self) -> str:
        """What was held back, once no token follows; half a character becomes U+FFFD."""
        return self._release(self.utf8.decode(b"", final=True) + self._take_run(), final=True)

    def _decode_run(self) -> str:
        return self.backend.decode(self.run, skip_special_tokens=False) if self.run else ""

    def _take_run(self) -> str:
        """The run's text. Bytes such as <0xE4> are valid only as a whole run, which ends where another piece comes."""
        text = self._decode_run()[len(self.out) :]
        self.run = self.run[-1:]
        self.out = self._decode_run()
        return text

    def _release(self, text: str, final: bool = False) -> str:
        if self.stopped or not self.stop:
            return "" if self.stopped else text
        self.held += text
        # The stop string that is complete first counts, so that the cut does not depend on how text falls into tokens.
        found = min(((at + len(s), at) for s in self.stop if (at := self.held.find(s)) >= 0), default=None)
        if found:
            self.stopped = True
            return self.held[: found[1]]
        begun = (k for s in self.stop for k in range(1, len(s)) if self.held.endswith(s[:k]))
        keep = 0 if final else max(begun, default=0)
        certain, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return certain
