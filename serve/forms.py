"""Multipart forms, read chunk by chunk. The name of a file has no influence."""

import re
from urllib.parse import unquote_to_bytes

import multipart

from serve.errors import ApiError, bad_request, quote

MAX_FIELDS = 20  # of a form, besides its files
EXTENDED = re.compile(r""";\s*(\w+)\*\s*=\s*"?[\w-]*'[\w-]*'([^;"\s]*)""")  # RFC 5987
NO_BOUNDARY = (
    "the Content-Type of the form has no valid boundary; let the HTTP client set this header"
)


class Part:
    """A part of a form; `chunks` grows while the form is read."""

    def __init__(self, segment: multipart.MultipartSegment) -> None:
        head = segment.header("Content-Disposition", "")
        extended = {key.lower(): text for key, text in EXTENDED.findall(head)}
        self.name = _decode(segment.name, extended.get("name")) or ""
        self.filename = _decode(segment.filename, extended.get("filename"))
        self.chunks: list[bytes] = []

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)


class Form:
    """The parts of a form so far; at most `max_files` may be files, or have the name `field`."""

    def __init__(self, content_type: str, field: str, max_files: int) -> None:
        """Raises ApiError if the content type has no boundary."""
        boundary = multipart.parse_options_header(content_type)[1].get("boundary")
        if not boundary:
            raise bad_request(NO_BOUNDARY)
        self.parts: list[Part] = []
        self._field, self._max_files = field, max_files
        self._parser = multipart.PushMultipartParser(
            boundary.encode("latin-1"),
            max_segment_count=max_files + MAX_FIELDS,
            header_charset="latin-1",  # which all bytes are; _decode() finds the right one
        )

    def feed(self, chunk: bytes) -> None:
        """Parse the next bytes, at the end b""; raises ApiError if the form is malformed."""
        try:
            for event in self._parser.parse(chunk):
                if isinstance(event, bytes):
                    self.parts[-1].chunks.append(event)
                elif event is not None:
                    self._begin(Part(event))
        except multipart.MultipartError as error:
            reason = f"cannot be read: {error}" if chunk else "ends before its last boundary"
            raise bad_request(f"the form {reason}; let the HTTP client create it") from error

    def pictures(self) -> list[Part]:
        """The parts named `field`, also without a file name. Raises ApiError if there are none."""
        pictures = [part for part in self.parts if part.name == self._field]
        if not pictures:
            names = ", ".join(quote(name) for name in {part.name: 0 for part in self.parts})
            message = f"no picture was sent as the field `{self._field}`"
            message += f"; the form has {names}" if names else "; the form is empty"
            raise ApiError(422, "missing_file", message)
        return pictures

    def _begin(self, part: Part) -> None:
        self.parts.append(part)
        named = [part.filename is not None or part.name == self._field for part in self.parts]
        if sum(named) > self._max_files:
            message = f"the form has over {self._max_files} files (MAX_BATCH_FILES)"
            if self._max_files == 1:
                message = "the form has several files; /predict/batch takes them, as `files`"
            raise ApiError(413, "too_many_files", message)


def _decode(plain: str | None, extended: str | None) -> str | None:
    """A name from its bytes, read as Latin-1, or from its extended form, in percent-encoding."""
    if extended:
        encoded = unquote_to_bytes(extended.encode("latin-1"))
    elif plain is not None:
        encoded = plain.encode("latin-1")
    else:
        return None
    try:
        return encoded.decode()
    except UnicodeDecodeError:  # of Windows, or at least readable in part
        return encoded.decode("cp1252", "replace")
