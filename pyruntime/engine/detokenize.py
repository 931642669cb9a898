"""Token ids to text, a piece at a time: whole characters only, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"
# A code point has at most four bytes; a longer undecodable run is the model's own noise.
_MAX_HELD_TOKENS = 8


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Decodes a window of tokens: decoders look at neighbours (spaces, byte runs), so the text of a
    token is the difference between the window with it and the window without it."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._read = 0
        self._seen = ""

    def push(self, token: int) -> str:
        """New text after one more token; empty while a character is incomplete."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        held = len(self._window) - self._read
        # No text yet (half a character, or a special token): moving the window on now would lose
        # what the decoder needs to see before the next piece.
        if held <= _MAX_HELD_TOKENS and (text.endswith(_BROKEN) or len(text) <= len(self._seen)):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is still held, without a trailing piece of a character."""
        if self._read == len(self._window):
            return ""
        return self._take(self._tokenizer.decode(self._window).rstrip(_BROKEN))

    def _take(self, text: str) -> str:
        new = text[len(self._seen) :]
        del self._window[: self._read]
        self._read = len(self._window)
        self._seen = self._tokenizer.decode(self._window)
        return new


class TextStream:
    """The text of one request. `text` is everything released so far; `stopped` the stop string hit.

    With no tokenizer the text stays empty (token-id prompts on a model without one).
    """

    def __init__(self, tokenizer: Decoder | None, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        self._stops = tuple(stops)
        self._held = ""
        self.text = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """Text that may be shown after one more token: never part of a possible stop string."""
        if self._detokenizer is None:
            return ""
        return self._release(self._detokenizer.push(token))

    def flush(self) -> str:
        """The rest, when the request has ended."""
        if self._detokenizer is None or self.stopped is not None:
            return ""
        new = self._release(self._detokenizer.flush())
        rest, self._held = self._held, ""
        if self.stopped is None:
            self.text += rest
            new += rest
        return new

    def _release(self, new: str) -> str:
        if not self._stops:
            self.text += new
            return new
        pending = self._held + new
        hits = [(at, s) for s in self._stops if (at := pending.find(s)) >= 0]
        if hits:
            at, self.stopped = min(hits, key=lambda hit: hit[0])
            pending, self._held = pending[:at], ""
        else:
            keep = _possible_stop(pending, self._stops)
            pending, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += pending
        return pending


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which some stop string begins."""
    longest = min(max(len(s) for s in stops) - 1, len(text))
    for n in range(longest, 0, -1):
        if any(s.startswith(text[-n:]) for s in stops):
            return n
    return 0
