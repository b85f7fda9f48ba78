"""Parsing of multipart/form-data bodies, in which clients send files (RFC 7578).

Nothing is written to disk, and a body that was cut off is an error. Names of files are not used.
What would change the meaning of a part if it were ignored is refused: encodings of the content,
charsets other than UTF-8, and repeated headers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ...errors import InvalidRequest

# python-multipart logs a warning for each faulty body that a client sends.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

MOST_PARTS = 100
PLAIN = b"", b"7bit", b"8bit", b"binary"  # values of Content-Transfer-Encoding
UTF_8 = b"utf-8", b"us-ascii"
FILE_NAME = re.compile(rb";\s*filename\*=", re.IGNORECASE)  # RFC 5987's spelling


class FormPart(NamedTuple):
    """One part of a form; `is_file`: whether the client has sent it as a file."""

    name: str
    content: bytes
    is_file: bool


@dataclass(slots=True)
class _Part:
    """A part that is being parsed."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    content: list[bytes] = field(default_factory=list)


class _Parts:
    """Collects the parts that python-multipart's parser finds."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.complete = False
        self._name, self._value = b"", b""

    def on_part_begin(self) -> None:
        if len(self.parts) == MOST_PARTS:
            raise InvalidRequest(f"the form has more than {MOST_PARTS} parts")
        self.parts.append(_Part())

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        name, headers = self._name.lower(), self.parts[-1].headers
        if name in headers:
            raise InvalidRequest("a part of the form has the same header twice")
        headers[name] = self._value
        self._name, self._value = b"", b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].content.append(data[start:end])

    def on_end(self) -> None:
        self.complete = True


def form_parts(body: bytes, content_type: str) -> Iterator[FormPart]:
    """Yield the parts of a form.

    A file without a name and without content is left out: browsers send it for an empty field.
    Raises `InvalidRequest` for a body that is not a complete, valid form.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("content-type multipart/form-data has no boundary")
    found = _Parts()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": found.on_part_begin,
                "on_part_data": found.on_part_data,
                "on_header_field": found.on_header_field,
                "on_header_value": found.on_header_value,
                "on_header_end": found.on_header_end,
                "on_end": found.on_end,
            },
        )
        parser.write(body)
    except FormParserError:
        raise InvalidRequest("the body is no valid multipart/form-data") from None
    if not found.complete:
        raise InvalidRequest("the body ends before the form's last boundary: it was cut off")
    for part in found.parts:
        disposition = part.headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        name, content = options.get(b"name"), b"".join(part.content)
        if name is None:
            raise InvalidRequest("a part of the form has no name")
        if part.headers.get(b"content-transfer-encoding", b"").strip().lower() not in PLAIN:
            raise InvalidRequest(
                "a part of the form has a content-transfer-encoding: send it plain"
            )
        _, kind = parse_options_header(part.headers.get(b"content-type", b""))
        is_file = b"filename" in options or bool(FILE_NAME.search(disposition))
        if not is_file and kind.get(b"charset", b"utf-8").lower() not in UTF_8:
            raise InvalidRequest("a text of the form has another charset than UTF-8")
        if content or not is_file or options.get(b"filename"):
            yield FormPart(name.decode("utf-8", "replace"), content, is_file)
