"""The parsers under atheris, which steers by coverage. Run as a script; it ends with status 0 if nothing but refusals.

python fuzzed.py CORPUS -runs=100000        (libFuzzer's options; CORPUS is a folder that it fills)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adapter_server.registry", "json"]):
    import adapter_server.registry.guard as guard
    import adapter_server.registry.versions as versions

import files
from adapter_server.errors import AdapterRefused


def config(data: bytes) -> None:
    assert isinstance(guard.parse_config(data)["peft_type"], str)


def weights(data: bytes) -> None:
    header = guard.parse_header(data)
    assert max(span.end for span in header.values()) == len(data)
    guard.check_finite(data, header)
    guard.check_keys(header, {name: span.shape for name, span in header.items()})


def framed(data: bytes) -> None:
    """The bytes as a header whose length is right, which chance would seldom find."""
    raw, _, body = data.partition(b"\n")
    weights(files.frame(raw, body))


def name(data: bytes) -> None:
    word = data.decode("utf-8", "surrogateescape")
    guard.check_name(word)
    assert word.isascii()
    assert len(word) <= 128
    assert versions.linked(Path("/nowhere"), word) == ""


PARSERS = (config, weights, framed, name)


def one(data: bytes) -> None:
    """The first byte chooses the parser."""
    said = ""
    try:
        (PARSERS[data[0] % len(PARSERS)] if data else config)(data[1:])
    except AdapterRefused as refused:
        said = refused.message
    assert not said or said.isprintable()
    assert len(said) < 1000


def seed(corpus: Path) -> None:
    """Sound inputs to begin with."""
    sound = files.safetensors(files.tensors())
    header = sound[8 : 8 + int.from_bytes(sound[:8], "little")]
    begins = (json.dumps(files.CONFIG).encode(), sound, header + b"\n" + sound[8 + len(header) :], b"my-adapter")
    for kind, data in enumerate(begins):
        (corpus / f"sound{kind}").write_bytes(bytes([kind]) + data)


if __name__ == "__main__":
    seed(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
