"""The short way for the parts of a stream: well framed, and only where the client's version of HTTP has chunks."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from serving import Served


@contextmanager
def connected(served: Served) -> Iterator[socket.socket]:
    where = served.http.base_url
    with socket.create_connection((where.host, where.port or 0), timeout=10) as client:
        yield client


def asked(version: str, *headers: str, prompt: str = "abc") -> bytes:
    body = json.dumps({"prompt": prompt, "stream": True}).encode()
    lines = (f"POST /generate HTTP/{version}", "Host: localhost", f"Content-Length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


def to_the_end(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of what comes until the server closes."""
    raw = b""
    while part := client.recv(1 << 16):
        raw += part
    head, _, body = raw.partition(b"\r\n\r\n")
    return head.lower(), body


def chunks(body: bytes) -> tuple[list[bytes], bytes]:
    """The chunks to the last, and what follows."""
    found: list[bytes] = []
    while True:
        size, _, rest = body.partition(b"\r\n")
        part, body = rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        if not part:
            return found, body
        found.append(part)


def texts(stream: bytes) -> str:
    events = [json.loads(event.removeprefix(b"data: ")) for event in stream.split(b"\n\n") if event]
    return "".join(event.get("text", "") for event in events)


def test_a_stream_is_well_framed(served: Served) -> None:
    with connected(served) as client:
        client.sendall(asked("1.1", "Connection: close"))
        head, body = to_the_end(client)
    assert b"transfer-encoding: chunked" in head
    parts, rest = chunks(body)
    assert (texts(b"".join(parts)), rest) == ("abc", b"")
    assert len(parts) >= 2


def test_the_connection_is_good_for_another_request(served: Served) -> None:
    with connected(served) as client:
        client.sendall(asked("1.1") + asked("1.1", "Connection: close", prompt="xyz"))
        _, body = to_the_end(client)
    first, rest = chunks(body)
    second, left = chunks(rest.partition(b"\r\n\r\n")[2])
    assert (texts(b"".join(first)), texts(b"".join(second)), left) == ("abc", "xyz", b"")


def test_an_older_client_gets_no_chunks(served: Served) -> None:
    with connected(served) as client:
        client.sendall(asked("1.0"))
        head, body = to_the_end(client)
    assert b"transfer-encoding" not in head
    assert texts(body) == "abc"
