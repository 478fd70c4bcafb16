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
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def token_bytes(tokenizer: ChatTokenizer, token_id: int) -> bytes:
    """What a token adds to the text, in UTF-8; several tokens may share a character."""
    piece = tokenizer.backend.id_to_token(token_id) or ""
    if isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return _piece_bytes(piece)
    return bytes([int(piece[3:5], 16)]) if _is_byte_piece(piece) else tokenizer.decode([token_id]).encode()


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece; of an added token, which is written as it is, its own."""
    is_byte_level = all(char in _BYTE_OF_CHARACTER for char in piece)
    return bytes(_BYTE_OF_CHARACTER[char] for char in piece) if is_byte_level else piece.encode()


def _is_byte_piece(piece: str) -> bool:
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece) is not None


class IncrementalDetokenizer:
    """Ids in, text out, token by token: the pieces joined equal `tokenizer.decode` of all ids (up to a stop string).

    Holds back what the next token may still change: an unfinished UTF-8 character, and the beginning of a stop string.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop_strings: tuple[str, ...] = ()) -> None:
        self.backend = tokenizer.backend
        self.byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Other decoders: ids whose text is not out yet, behind one whose text is: some treat a first piece differently.
        self.pending_ids: list[int] = []
        self.emitted_text = ""  # the text of that one
        self.stop_strings = stop_strings
        self.held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token; often empty in the middle of a character."""
        piece = self.backend.id_to_token(token_id) or ""
        if self.byte_level:
            return self._cut_at_stop(self.utf8.decode(_piece_bytes(piece)))
        self.pending_ids.append(token_id)
        return (
            ""
            if _is_byte_piece(piece) or self._decode_pending().endswith("\ufffd")
            else self._cut_at_stop(self._flush_pending())
        )

    def completed_by(self, token_id: int) -> str:
        """The text of earlier tokens that this one completes, if it comes next: a character spelt in lone bytes."""
        if self.byte_level or _is_byte_piece(self.backend.id_to_token(token_id) or ""):
            return ""
        return self._decode_pending()[len(self.emitted_text) :]

    def finish(self) -> str:
        """What was held back, once no token follows; half a character becomes U+FFFD."""
        return self._cut_at_stop(self.utf8.decode(b"", final=True) + self._flush_pending(), final=True)

    def _decode_pending(self) -> str:
        return self.backend.decode(self.pending_ids, skip_special_tokens=False) if self.pending_ids else ""

    def _flush_pending(self) -> str:
        """The run's text. Bytes such as <0xE4> are valid only as a whole run, which ends where another piece comes."""
        text = self._decode_pending()[len(self.emitted_text) :]
        self.pending_ids = self.pending_ids[-1:]
        self.emitted_text = self._decode_pending()
        return text

    def _cut_at_stop(self, text: str, final: bool = False) -> str:
        if self.stopped or not self.stop_strings:
            return "" if self.stopped else text
        self.held += text
        # The stop string that is complete first counts, so that the cut does not depend on how text falls into tokens.
        found = min(((at + len(s), at) for s in self.stop_strings if (at := self.held.find(s)) >= 0), default=None)
        if found:
            self.stopped = True
            return self.held[: found[1]]
        prefix_lengths = (k for s in self.stop_strings for k in range(1, len(s)) if self.held.endswith(s[:k]))
        keep = 0 if final else max(prefix_lengths, default=0)
        released, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return released
