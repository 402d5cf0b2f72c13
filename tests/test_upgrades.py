"""serve/upgrades.py: a request with an Upgrade header is answered as one without."""

import base64
import http.client
import json
import socket
from typing import Any

import pytest

from mnist.registry import SAMPLE
from tests.test_app import drawn_seven, serving
from tests.test_forms import HEADERS, form

PICTURE = drawn_seven()
PARSERS = ("httptools", "h11")
OFFERS = {
    "h2c": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA",
    "websocket": "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13",
    "tls": "connection: keep-alive, Upgrade\r\nUPGRADE: TLS/1.0, HTTP/2.0",
    "two headers": "Connection: Upgrade\r\nConnection: keep-alive\r\nUpgrade: h2c",
    "close": "Connection: close, Upgrade\r\nUpgrade: h2c",
}


def post(body: bytes, offer: str, chunked: bool = False, path: str = "", kind: str = "") -> bytes:
    """POST /predict with this body and these header lines."""
    head = f"POST /predict{path}?top=1 HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: {kind or 'image/png'}\r\n{offer}\r\n"
    if not chunked:
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    chunks = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks


def answers(connection: socket.socket, n: int) -> list[tuple[int, Any]]:
    """The statuses and contents of the next `n` responses."""
    responses = []
    with connection.makefile("rb") as stream:
        for _ in range(n):
            status = int(stream.readline().split()[1])
            length = int(http.client.parse_headers(stream)["content-length"])
            responses.append((status, json.loads(stream.read(length))))
    return responses


@pytest.mark.parametrize("parser", PARSERS)
def test_an_upgrade_header_changes_no_answer(parser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(SAMPLE, monkeypatch, parser) as address:
        for name, offer in OFFERS.items():
            for chunked in (False, True):
                request = post(PICTURE, offer, chunked)
                cut = request.index(b"\r\n\r\n") + 4
                for packets in ([request], [request[:cut], request[cut:]]):
                    with socket.create_connection(address, timeout=10) as connection:
                        for packet in packets:
                            connection.sendall(packet)
                        [(status, answer)] = answers(connection, 1)
                    assert (status, len(answer["probabilities"])) == (200, 10), (name, chunked)


@pytest.mark.parametrize("parser", PARSERS)
def test_forms_and_json_with_an_upgrade_header_are_answered(
    parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps({"image": base64.b64encode(PICTURE).decode()}).encode()
    part = (b'name="file"; filename="7.png"', PICTURE)
    with (
        serving(SAMPLE, monkeypatch, parser) as address,
        socket.create_connection(address, timeout=10) as connection,
    ):
        for body, path, kind in (
            (form(part), "", HEADERS["content-type"]),
            (text, "/base64", "application/json"),
        ):
            connection.sendall(post(body, OFFERS["h2c"], path=path, kind=kind))
            [(status, answer)] = answers(connection, 1)
            assert (status, answer["prediction"]) == (200, "7")


@pytest.mark.parametrize("parser", PARSERS)
def test_requests_after_an_upgrade_header_are_answered_in_their_order(
    parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = f"GET /health HTTP/1.1\r\nHost: x\r\n{OFFERS['h2c']}\r\n\r\n".encode()
    with (
        serving(SAMPLE, monkeypatch, parser) as address,
        socket.create_connection(address, timeout=10) as connection,
    ):
        connection.sendall(
            health + post(PICTURE, OFFERS["h2c"]) + post(PICTURE, "X-None: 1") + health * 500
        )
        first, second, third, *others = answers(connection, 503)
        assert first == (200, {"status": "ok"})
        assert second == third
        assert second[1]["filename"] is None
        assert others == [first] * 500
        connection.sendall(b"CONNECT /health HTTP/1.1\r\nHost: x\r\n\r\n" + health)
        assert [status for status, _ in answers(connection, 2)] == [405, 200]
