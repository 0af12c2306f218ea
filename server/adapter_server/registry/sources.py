"""Where an operator may publish from, beside a folder: a hub at a pinned commit, and object stores. Off unless allowed.

    OWNER/NAME@COMMIT     hub, the commit as all of its 40 hex digits
    s3://BUCKET/PREFIX    gs://BUCKET/PREFIX

Only the command line comes here: the server imports nothing of this file, so that no request ever makes it fetch. The
two files of an adapter are streamed, never a byte beyond the caller's limits, and nothing else is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, NoReturn, cast

from adapter_server.errors import AdapterNotFound, AdapterServerError, AdapterUnavailable, InvalidRequest
from adapter_server.registry import guard

HUB = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95})/([A-Za-z0-9][A-Za-z0-9._-]{0,95})@(\S{1,200})")
STORE = re.compile(r"([a-z0-9]{1,16})://([a-z0-9][a-z0-9._-]{1,221}(?:/[A-Za-z0-9._=+@-]{1,255}){1,32})/?")
STORES = ("s3", "gs")  # the word before `://`, and the extra that has its client
KINDS = ("hub", *STORES)
CHUNK = 1 << 20
TIMEOUT_S = 30.0  # that a hub may be silent
NOT_MODELS = ("datasets", "spaces", "models", "buckets", "kernels")  # words with a meaning of their own in hub paths


@dataclass(frozen=True, slots=True)
class Place:
    """A source as parsed."""

    kind: str
    folder: str  # as its client names it
    name: str  # what the adapter is called unless the operator says otherwise
    label: str  # for the manifest


def parse(ref: str) -> Place:
    """What a source means. Raises InvalidRequest for what is none, such as a hub id without a commit."""
    if hub := HUB.fullmatch(ref):
        owner, name, commit = hub.groups()
        if owner in NOT_MODELS:
            _refuse(ref)
        if not guard.COMMIT.fullmatch(commit):
            raise InvalidRequest(
                f"{guard.show(ref)}: a branch or a tag can be moved: pin a commit, OWNER/NAME@ and its 40 hex digits"
            )
        return Place("hub", ref, name, f"hub {ref}")
    store = STORE.fullmatch(ref)
    if store is None or store[1] not in STORES or ".." in ref:
        _refuse(ref)
    return Place(store[1], store[2], store[2].rpartition("/")[2], f"{store[1]}://{store[2]}")


def _refuse(ref: str) -> NoReturn:
    raise InvalidRequest(
        f"{guard.show(ref)}: no such folder, and no source: give a folder, OWNER/NAME@COMMIT of a hub, "
        f"{' or '.join(f'{word}://BUCKET/PREFIX' for word in STORES)}"
    )


@contextmanager
def opened(place: Place, allowed: Collection[str]) -> Iterator[tuple[bytes, IO[bytes]]]:
    """The config, and the weights as a stream. Raises InvalidRequest where the operator has not allowed this kind."""
    if place.kind not in allowed:
        raise InvalidRequest(f"sources of kind {place.kind!r} are off: allow them with --allow-source {place.kind}")
    with _stream(place, guard.CONFIG) as config:
        raw = config.read(guard.MAX_CONFIG_BYTES + 1)
    with _stream(place, guard.WEIGHTS) as weights:
        yield raw, cast(IO[bytes], weights)


class _Stream:
    """A file far away, read from its first byte to its last."""

    def __init__(self, place: Place, file: str, pieces: Iterator[bytes]) -> None:
        self._place, self._file, self._pieces = place, file, pieces
        self._left = b""  # of the last piece

    def read(self, most: int) -> bytes:
        """At most so many bytes, fewer only at the end."""
        data = bytearray(self._left)
        with _told(self._place, self._file):
            while len(data) < most and (piece := next(self._pieces, b"")):
                data += piece
        self._left = bytes(data[most:])
        return bytes(data[:most])


@contextmanager
def _stream(place: Place, file: str) -> Iterator[_Stream]:
    with ExitStack() as stack:
        with _told(place, file):
            pieces = stack.enter_context(_downloaded(place, file) if place.kind == "hub" else _stored(place, file))
        yield _Stream(place, file, pieces)


@contextmanager
def _downloaded(place: Place, file: str) -> Iterator[Iterator[bytes]]:
    """One request; where it is sent on, only to other addresses of the web."""
    from huggingface_hub import constants, get_session, get_token

    url = f"{constants.ENDPOINT}/{place.folder.replace('@', '/resolve/')}/{file}"
    headers = {"Accept-Encoding": "identity"}  # nothing swells on its way in
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
        if response.status_code == 404:
            raise FileNotFoundError
        response.raise_for_status()
        yield response.iter_raw(CHUNK)


@contextmanager
def _stored(place: Place, file: str) -> Iterator[Iterator[bytes]]:
    import fsspec

    try:
        store = fsspec.filesystem(place.kind, skip_instance_cache=True)
    except ImportError as error:
        extra = f'pip install "adapter-server[{place.kind}]"'
        raise AdapterUnavailable(f"{place.label}: its client is not installed: {extra}") from error
    with store.open(f"{place.folder}/{file}", "rb") as opened_file:
        yield iter(lambda: opened_file.read(CHUNK), b"")


@contextmanager
def _told(place: Place, file: str) -> Iterator[None]:
    """Whatever a client library raises, in our words."""
    try:
        yield
    except AdapterServerError:
        raise
    except FileNotFoundError as error:
        raise AdapterNotFound(f"{place.label}: there is no {file}: check the name, and the right to read it") from error
    except Exception as error:  # each client has errors of its own
        said = " ".join(str(error).split())[:200]
        raise AdapterUnavailable(
            f"{place.label}: {file} cannot be read ({type(error).__name__}: {said}): check network and credentials"
        ) from error
