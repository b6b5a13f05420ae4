"""JSON documents larger than memory: the lists in the outermost object are handed over piece by piece. Beside the road.

What is right and what is wrong is what `json.loads` says, with `unique_keys` as its hook; of NaN too."""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

from retina.data.columns import CHUNK
from retina.schema import unique_keys

_ELEMENTS = 20_000
"""Of a list, that are handed over together."""
_NEAR = 16
"""Characters before the end within which a fault may be that of a part that is not read yet."""
_BLANKS = re.compile(r"[ \t\n\r]*")


class JsonStream:
    """A document that is read once, from its begin."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._digests: list[bytes] = []
        self._text, self._at, self._ended = "", 0, False
        self._before, self._lines, self._line_start = 0, 0, 0
        self._scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder(object_pairs_hook=unique_keys))[
            "scan_once"
        ]
        self._decode: Callable[[bytes, bool], str] | None = None

    def digest(self) -> str:
        """`digest_of` what has been read, which is the whole file once the document has been."""
        return hashlib.sha256(b"".join(self._digests)).hexdigest()

    def read(self, streamed: Collection[str], take: Callable[[str, list[Any]], None]) -> Any:
        """The document. Lists of the outermost object under `streamed` keys go to `take`, in pieces; they are empty in
        what is returned. Raises ValueError, RecursionError as `json.loads` does."""
        if self._next() != "{":
            return self._finished(self._value())
        self._at += 1
        pairs: list[tuple[str, Any]] = []
        if self._next() != "}":
            while True:
                pairs.append(self._member({*(key for key, _ in pairs)}, streamed, take))
                if not self._goes_on("}"):
                    break
        self._at += 1
        return self._finished(dict(pairs))

    def _member(
        self, known: Collection[str], streamed: Collection[str], take: Callable[[str, list[Any]], None]
    ) -> tuple[str, Any]:
        if self._next() != '"':
            self._fail("Expecting property name enclosed in double quotes")
        key = self._value()
        if key in known:
            unique_keys([(key, None), (key, None)])
        if self._next() != ":":
            self._fail("Expecting ':' delimiter")
        self._at += 1
        if key not in streamed or self._next() != "[":
            return key, self._value()
        self._at += 1
        for piece in self._pieces():
            take(key, piece)
        return key, []

    def _pieces(self) -> Iterator[list[Any]]:
        piece: list[Any] = []
        if self._next() != "]":
            while True:
                piece.append(self._value())
                if len(piece) == _ELEMENTS:
                    yield piece
                    piece = []
                if not self._goes_on("]"):
                    break
        self._at += 1
        yield piece

    def _goes_on(self, end: str) -> bool:
        """Whether a comma follows, which is read over, and not the end."""
        character = self._next()
        if character not in (",", end):
            self._fail("Expecting ',' delimiter")
        self._at += character == ","
        return character == ","

    def _next(self) -> str:
        """The next character that is not blank, which becomes the current one; "" at the end."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches anything
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except (StopIteration, json.JSONDecodeError) as error:
                at = error.value if isinstance(error, StopIteration) else error.pos
                message = "Expecting value" if isinstance(error, StopIteration) else error.msg
                is_open = at >= len(self._text) - _NEAR or message.startswith("Unterminated string")
                if is_open and self._more():
                    continue
                self._at = at
                self._fail(message)
            is_open = type(value) in (int, float) and end >= len(self._text) - _NEAR  # its digits may go on
            if is_open and self._more():
                continue
            self._at = end
            return value

    def _finished(self, document: Any) -> Any:
        if self._next():
            self._fail("Extra data")
        return document

    def _more(self) -> bool:
        """Reads on, so much that long values are not scanned again too often; whether there was more."""
        if self._ended:
            return False
        left = self._text[self._at :]
        read = self._text[: self._at]
        self._before += len(read)
        if breaks := read.count("\n"):
            self._lines += breaks
            self._line_start = self._before - (len(read) - read.rindex("\n") - 1)
        parts = [left]
        for _ in range(1 + len(left) // CHUNK):
            data = self._file.read(CHUNK)
            if self._decode is None:
                self._decode = codecs.getincrementaldecoder(json.detect_encoding(data))("surrogatepass").decode
            self._digests += [hashlib.sha256(data).digest()] if data else []
            self._ended = len(data) < CHUNK
            parts.append(self._decode(data, self._ended))
            if self._ended:
                break
        self._text, self._at = "".join(parts), 0
        return True

    def _fail(self, message: str) -> NoReturn:
        """Raises the error that json.loads would, which tells line, column and character of the whole document."""
        is_end = self._at >= len(self._text.rstrip(" \t\r\n\0"))
        error = json.JSONDecodeError(message, self._text, self._at)
        line = self._lines + error.lineno
        column = error.colno if error.lineno > 1 else self._before + self._at - self._line_start + 1
        text = f"{message}: line {line} column {column} (char {self._before + self._at})"
        raise CutOffError(text) if is_end else ValueError(text)


class CutOffError(ValueError):
    """The document ends before it is complete."""
