"""Read a large JSON text value by value, so that only one value at a time is in memory."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import Any

import ijson

_CHUNK = 1 << 13  # ijson keeps the events of a whole chunk, which take many times its size
_DEEPEST = 200
_PAIR = len(r"\ud83d\ude00")
_ESCAPE = re.compile(rb"\\(?:u(?:[dD][89abAB]..\\u[dD][c-fC-F]..|([dD][89a-fA-F]..))|.)", re.DOTALL)
"""An escape; the group is half of a surrogate pair without the other half."""


class JsonStream:
    """Walks through a JSON text; the caller determines what is expected next.

    The text is parsed by ijson according to RFC 8259, so without NaN and Infinity. Every method raises `ValueError` if
    the text is damaged, ends too early, is nested too deeply or has numbers out of the parser's range.

    Args:
        file: the text in UTF-8, with or without a byte order mark.
        chunk: number of bytes to read at a time.
    """

    def __init__(self, file: io.BufferedIOBase, chunk: int = _CHUNK) -> None:
        self._events = ijson.basic_parse(_Whole(file), use_float=True, buf_size=chunk)

    def members(self) -> Iterator[str]:
        """Read the names of the members of the next object.

        Yields:
            A name before its value, which the caller must take before the next name.
        """
        if self._next()[0] != "start_map":
            raise ValueError("Expecting an object")
        while (event := self._next())[0] == "map_key":
            yield event[1]

    def value(self) -> Any:
        """Take the next value."""
        builder, depth = ijson.ObjectBuilder(), 0
        while True:
            event, value = self._next()
            builder.event(event, value)
            if event in ("start_map", "start_array"):
                depth += 1
                if depth > _DEEPEST:
                    raise ValueError("Nested too deeply")
            elif event in ("end_map", "end_array"):
                depth -= 1
            if depth == 0:
                return builder.value

    def end(self) -> None:
        """Check that the text ends here, and that no string had half a character."""
        try:
            event = next(self._events, None)
        except ijson.JSONError as error:
            raise ValueError(_reason(error)) from error
        if event is not None:
            raise ValueError("Extra data")

    def _next(self) -> tuple[str, Any]:
        try:
            event: tuple[str, Any] = next(self._events)
        except StopIteration:
            raise ValueError("Unexpected end") from None
        except ijson.JSONError as error:
            raise ValueError(_reason(error)) from error
        return event


class _Whole:
    """A file without its byte order mark, whose escapes are checked to be whole characters.

    ijson's fastest backend replaces half a surrogate pair by a question mark; here it is refused.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._first = True
        self._cut = b""

    def read(self, size: int) -> bytes:
        if size == 0:  # called once to check that this returns bytes
            return b""
        block = self._file.read(size)
        if self._first:
            while 0 < len(block) < len(codecs.BOM_UTF8) and (more := self._file.read(size)):
                block += more
            block, self._first = block.removeprefix(codecs.BOM_UTF8) or self._file.read(size), False
        text, self._cut = self._cut + block, b""
        for escape in _ESCAPE.finditer(text):
            if block and escape.end() > len(text) - _PAIR:  # may continue in the next block
                self._cut = text[escape.start() :]
                break
            if escape[1]:
                raise ValueError(f"Half of a surrogate pair: \\u{escape[1].decode(errors='replace')}")
        else:
            self._cut = b"\\" if text.endswith(b"\\") else b""
        return block


def _reason(error: ijson.JSONError) -> str:
    """Return what ijson found, for all backends; the fastest one adds lines that point to the position."""
    first = error.args[0] if error.args else ""
    text = first.decode(errors="replace") if isinstance(first, bytes) else str(first)
    reason = text.splitlines()[0].strip() if text else "damaged"
    if "invalid char" in reason or "Unexpected symbol" in reason or "malformed number" in reason:
        reason += "; JSON has no NaN and no Infinity"
    return reason
