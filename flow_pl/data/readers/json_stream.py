"""Reading a large JSON text value by value, so that only one value at a time is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK = 1 << 20
# the longest piece, other than a string, that can be cut by the end of what has been read: "-Infinity", an escape
_LONGEST_PIECE = 16


class JsonStream:
    """Walks through a JSON text; the caller says what comes next.

    Every method raises `json.JSONDecodeError`, a `ValueError`, where the text is damaged, ends too early or is nested
    too deeply.

    Args:
        file: the text.
        chunk: number of characters that are read at a time, at least.
    """

    def __init__(self, file: TextIO, chunk: int = _CHUNK) -> None:
        self._file = file
        self._chunk = chunk
        self._text = ""
        self._at = 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    def members(self) -> Iterator[str]:
        """The names of the members of the object that comes next.

        Yields:
            A name, before its value: the caller takes the value before it asks for the next name.
        """
        self._expect("{")
        if self._peek() == "}":
            self._expect("}")
            return
        while True:
            name = self.value()
            if not isinstance(name, str):
                raise self._error("Expecting property name")
            self._expect(":")
            yield name
            if self._expect(",}") == "}":
                return

    def value(self) -> Any:
        """Take the value that comes next."""
        self._peek()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_PIECE
                if self._ended or not cut:
                    raise
            except RecursionError:
                raise self._error("Nested too deeply") from None
            else:
                if end < len(self._text) or self._ended:  # at the end of what has been read, a number may go on
                    self._at = end
                    return found
            self._read()

    def end(self) -> None:
        """Check that nothing comes next."""
        if self._peek():
            raise self._error("Extra data")

    def _peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if not found or found not in characters:
            raise self._error(f"Expecting {' or '.join(map(repr, characters))}")
        self._at += 1
        return found

    def _read(self) -> None:
        rest = self._text[self._at :]
        # as much again as there is, so that a long value is decoded anew a few times only
        more = self._file.read(max(self._chunk, len(rest)))
        self._ended = not more
        self._text, self._at = rest + more, 0

    def _error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, self._at)
