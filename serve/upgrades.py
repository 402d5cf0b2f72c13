"""Requests with an Upgrade header, read by uvicorn as if they had none (RFC 9110, section 7.8).

Java's HttpClient and `curl --http2` send one with every request, to offer HTTP/2. uvicorn's parser
llhttp (httptools) ends such a request after its head, so the body would be lost; h11 reads it.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def ignore_upgrades() -> None:
    """Change the classes that uvicorn reads requests with; the next call changes nothing.

    An app cannot choose these classes: uvicorn has done so before it imports the app.
    """
    if module := sys.modules.get("uvicorn.protocols.http.httptools_impl"):
        module.HttpToolsProtocol._should_upgrade = _starts_no_request
        module.HttpToolsProtocol.data_received = _receive
    if module := sys.modules.get("uvicorn.protocols.http.h11_impl"):
        module.H11Protocol._should_upgrade = lambda self: False  # WebSocket is not supported either


def _starts_no_request(self: "HttpToolsProtocol") -> bool:
    """Whether the callbacks of llhttp ignore this head, because _receive() parses it again."""
    return self.scope["method"] != "CONNECT"


def _receive(self: "HttpToolsProtocol", data: bytes) -> None:
    """HttpToolsProtocol.data_received, with all heads and bodies after an upgrade."""
    from httptools import HttpParserError, HttpParserUpgrade

    self._unset_keepalive_if_required()
    while data:
        try:
            self.parser.feed_data(data)
            return
        except HttpParserUpgrade as upgrade:
            data = _without_upgrade(self) + data[upgrade.args[0] :]
            self.parser = _new_parser(self)
        except HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)
            return


def _without_upgrade(self: "HttpToolsProtocol") -> bytes:
    """The head that was parsed, without its Upgrade header; nothing if its request has begun."""
    if self.scope["method"] == "CONNECT":
        return b""
    version = self.scope["http_version"]
    lines = [b"%s %s HTTP/%s" % (self.scope["method"].encode(), self.url, version.encode())]
    lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])


def _new_parser(self: "HttpToolsProtocol") -> Any:
    """A parser like that of HttpToolsProtocol.__init__."""
    from httptools import HttpRequestParser

    parser = HttpRequestParser(self)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
