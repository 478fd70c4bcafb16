"""Incremental detokenizer: token ids in, complete characters out, with stop strings.

A byte-level token is a sequence of bytes, and one Chinese character may take three tokens. Text that the next token can
still change is held back; text that was returned never changes.
Called by generate.py. Read next: tokenizer.py (text to ids).
"""

import codecs
import re

from tokenizers import decoders

from model.tokenizer import ChatTokenizer, piece_bytes


def token_bytes(tokenizer: ChatTokenizer, token_id: int) -> bytes:
    """The UTF-8 bytes of a token; a character may span several tokens."""
    piece = tokenizer.backend.id_to_token(token_id) or ""
    if isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return piece_bytes(piece)
    return bytes([int(piece[3:5], 16)]) if _is_byte_piece(piece) else tokenizer.decode([token_id]).encode()


def _is_byte_piece(piece: str) -> bool:
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece) is not None


class IncrementalDetokenizer:
    """Decodes one token at a time. The concatenated output equals `tokenizer.decode(ids)`, cut before a stop string.

    Holds back an incomplete UTF-8 character and a suffix that may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop_strings: tuple[str, ...] = ()) -> None:
        self.backend = tokenizer.backend
        self.byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # For other decoders: the last emitted id, then pending ones: some decoders treat a first id differently.
        self.pending_ids: list[int] = []
        self.emitted_text = ""  # the text of the emitted id
        self.stop_strings = stop_strings
        self.held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that no later token can change, possibly ""."""
        piece = self.backend.id_to_token(token_id) or ""
        if self.byte_level:
            return self._cut_at_stop(self.utf8.decode(piece_bytes(piece)))
        self.pending_ids.append(token_id)
        if _is_byte_piece(piece) or self._decode_pending().endswith("\ufffd"):
            return ""
        return self._cut_at_stop(self._flush_pending())

    def completed_by(self, token_id: int) -> str:
        """The held-back text of byte tokens such as <0xE4> that this token would complete if it came next."""
        if self.byte_level or _is_byte_piece(self.backend.id_to_token(token_id) or ""):
            return ""
        return self._decode_pending()[len(self.emitted_text) :]

    def finish(self) -> str:
        """The held-back text after the last token; an incomplete character becomes U+FFFD."""
        return self._cut_at_stop(self.utf8.decode(b"", final=True) + self._flush_pending(), final=True)

    def _decode_pending(self) -> str:
        return self.backend.decode(self.pending_ids, skip_special_tokens=False) if self.pending_ids else ""

    def _flush_pending(self) -> str:
        """The text of the pending ids. A run of byte tokens such as <0xE4> is decoded as a whole."""
        text = self._decode_pending()[len(self.emitted_text) :]
        self.pending_ids = self.pending_ids[-1:]
        self.emitted_text = self._decode_pending()
        return text

    def _cut_at_stop(self, text: str, final: bool = False) -> str:
        if self.stopped or not self.stop_strings:
            return "" if self.stopped else text
        self.held += text
        # Cut at the stop string that is complete first: the result does not depend on token boundaries.
        found = min(((at + len(s), at) for s in self.stop_strings if (at := self.held.find(s)) >= 0), default=None)
        if found:
            self.stopped = True
            return self.held[: found[1]]
        prefix_lengths = (k for s in self.stop_strings for k in range(1, len(s)) if self.held.endswith(s[:k]))
        keep = 0 if final else max(prefix_lengths, default=0)
        released, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return released
