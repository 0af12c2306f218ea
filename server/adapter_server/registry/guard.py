"""What an adapter's folder must satisfy before a byte of it is believed: every file is taken for hostile.

Pure functions that raise `AdapterRefused`, the message saying what is wrong, in which file, and what to do. Sizes and
nesting are capped before anything is parsed; shapes come from the header, before anything is allocated.

safetensors:  | n: u64 LE | n bytes of JSON: {name: {dtype, shape, data_offsets}} | the tensors, end to end |
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from adapter_server.config import ServerConfig
from adapter_server.errors import AdapterRefused

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTERHUB = "adapter.safetensors"  # what AdapterHub calls them
PICKLES = ("adapter_model.bin", "pytorch_adapter.bin")

MAX_CONFIG_BYTES = 64 << 10
MAX_CONFIG_DEPTH = 32
MAX_HEADER_BYTES = 10 << 20
REMEMBERED = 256 << 10  # bytes of a header that is worth keeping
MAX_TENSORS = 100_000
PIECE = 4 << 20  # bytes that are read at once, and hashed as one
MAX_BYTES = ServerConfig().max_adapter_bytes  # of one weights file
MAX_DIMENSIONS = 8
MAX_DIMENSION = 1 << 40
MAX_TENSOR_NAME = 512
SHOWN = 4  # names that a message lists before it counts

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESERVED = frozenset({"base"})
COMMIT = re.compile(r"[0-9a-f]{40}")
PEFT_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# Possessive, and with an optional end: one pass, whatever the bytes.
JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))


class _Dtype(NamedTuple):
    word: str  # numpy's type of the bits
    exponent: int  # the exponent's bits; all of them set is an infinity or no number. 0: an integer


FLOATS = {"F32": _Dtype("<u4", 0x7F80_0000), "F16": _Dtype("<u2", 0x7C00), "BF16": _Dtype("<u2", 0x7F80)}
INTEGERS = {"U8": _Dtype("u1", 0), "I16": _Dtype("<i2", 0), "I32": _Dtype("<i4", 0), "I64": _Dtype("<i8", 0)}
DTYPES = FLOATS | INTEGERS


class Span(NamedTuple):
    """One tensor in the file: `data[begin:end]`, counted from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


Header = Mapping[str, Span]
Expected = Mapping[str, tuple[int, ...]]
# (config, tensor names) → keys, over some base; None where only PEFT knows them, and takes them or refuses
Expect = Callable[[Mapping[str, Any], frozenset[str]], Expected | None]
Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class Incomplete(AdapterRefused):
    """A file is missing or shorter than it says: a copy may be under way."""


class Unreadable(AdapterRefused):
    """The system did not let us read. It may the next time."""


# Names


def check_name(name: str, reserved: Iterable[str] = ()) -> None:
    """The grammar and the reserved names. Folders whose names differ by case only are the store's matter."""
    if not NAME.fullmatch(name):
        raise AdapterRefused(
            f"adapter name {show(name)} is not allowed: 1 to 128 of A-Z a-z 0-9 . _ -, first a letter or a digit"
        )
    if name.casefold() in {r.casefold() for r in (*RESERVED, *reserved)}:
        raise AdapterRefused(f"adapter name {show(name)} is reserved: choose another")


# The config


def parse_config(data: Buffer) -> dict[str, Any]:
    """adapter_config.json as a dictionary whose `peft_type` is a plain word."""
    check_size(CONFIG, len(data), MAX_CONFIG_BYTES)
    config = _json_object(CONFIG, bytes(data), MAX_CONFIG_DEPTH, brackets=MAX_CONFIG_BYTES)
    try:
        json.dumps(config, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise AdapterRefused(f"{CONFIG}: text that is no Unicode (a lone surrogate): save the adapter again") from error
    if "peft_type" not in config and isinstance(config.get("config"), dict):
        config["peft_type"] = adapterhub_kind(config["config"])
    kind = config.get("peft_type")
    if not isinstance(kind, str) or not PEFT_TYPE.fullmatch(kind):
        _refuse(CONFIG, f'"peft_type" is {show(kind)}: it must name a PEFT type, such as "LORA"')
    return config


def adapterhub_kind(config: Mapping[str, Any]) -> str:
    """AdapterHub's files name no kind: it is in the shape of their inner config."""
    members = config.get("configs")
    found = [m for m in (members if isinstance(members, list) else [config]) if isinstance(m, dict)]
    methods = [m.get("architecture") for m in found]
    if any(m.get("use_gating") for m in found) or ("lora" in methods and len(methods) > 1):
        return "ADAPTERHUB_UNIPELT"
    if "lora" in methods:
        return "ADAPTERHUB_LORA"
    return "ADAPTERHUB_PREFIX" if "prefix_tuning" in methods else "ADAPTERHUB"


@dataclass(frozen=True, slots=True)
class Base:
    """The names that the served base goes by, and its commit where it is of a hub; no names: nothing is compared."""

    names: tuple[str, ...] = ()
    commit: str | None = None


def check_base(config: Mapping[str, Any], base: Base) -> None:
    """Refuses an adapter that names another base. A folder's name is enough: the path before it says nothing."""
    named, revision = config.get("base_model_name_or_path", config.get("model_name")), config.get("revision")
    if not isinstance(named, str) or not named or not base.names:
        return
    if _last(named) not in map(_last, base.names):
        _refuse(CONFIG, f"it was trained on {show(named)}, and {show(base.names[0])} is served")
    pinned = isinstance(revision, str) and COMMIT.fullmatch(revision)
    if pinned and base.commit and revision != base.commit:
        _refuse(CONFIG, f"it was trained on revision {show(revision)} of the base, and {show(base.commit)} is served")


def _last(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def _json_object(file: str, data: bytes, depth: int, brackets: int) -> dict[str, Any]:
    """A JSON object of strict UTF-8 without duplicate keys, NaN or infinities, its nesting capped before parsing."""
    _check_nesting(file, data, depth, brackets)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float)
    except ValueError as error:
        raise AdapterRefused(f"{file}: no valid JSON ({_clip(str(error))}): save the adapter again") from error
    if not isinstance(value, dict):
        _refuse(file, f"a JSON object is needed, this is a {type(value).__name__}")
    return value


def _check_nesting(file: str, data: bytes, depth: int, brackets: int) -> None:
    marks = JSON_STRING.sub(b"", data).translate(None, NOT_BRACKETS)
    if len(marks) > brackets:
        _refuse(file, f"{len(marks):,} brackets, allowed are {brackets:,}")
    level = 0
    for mark in marks:
        level += 1 if mark in b"[{" else -1
        if level > depth:
            _refuse(file, f"nested deeper than {depth} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {show(twice)} occurs twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{_clip(text)} is too large for a number")
    return value


# The header


def header_bytes(first: Buffer, size: int, max_bytes: int = MAX_BYTES) -> int:
    """How many bytes the length and the header take, from the file's first 8 bytes and its size."""
    check_size(WEIGHTS, size, max_bytes)
    if size < 8 or len(first) < 8:
        raise Incomplete(f"{WEIGHTS}: {size} bytes are no safetensors file: copy it again")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(WEIGHTS, f"a header of {length:,} bytes, allowed are {MAX_HEADER_BYTES:,}: is it a safetensors file?")
    if 8 + length > size:
        raise Incomplete(f"{WEIGHTS}: ends inside its header ({size:,} of {8 + length:,} bytes): copy it again")
    return 8 + length


def parse_header(data: Buffer, size: int | None = None, max_bytes: int = MAX_BYTES) -> Header:
    """The header of a safetensors file, proved to describe exactly `size` bytes (default: all of `data`)."""
    size = len(data) if size is None else size
    text = bytes(data[8 : header_bytes(data[:8], size, max_bytes)])
    return _parsed(text, size) if len(text) <= REMEMBERED else _parsed.__wrapped__(text, size)


@functools.lru_cache(maxsize=16)
def _parsed(text: bytes, size: int) -> Header:
    """Adapters of one making have one header, and each is read more than once."""
    start, entries = 8 + len(text), _json_object(WEIGHTS, text, depth=3, brackets=6 * MAX_TENSORS)
    _check_metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        _refuse(WEIGHTS, f"{len(entries):,} tensors, allowed are {MAX_TENSORS:,}")
    if not entries:
        _refuse(WEIGHTS, "no tensors: save the adapter again")
    header = {name: _span(name, entry, start) for name, entry in entries.items()}
    _check_layout(header, start, size)
    return MappingProxyType(header)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(WEIGHTS, "__metadata__ must map text to text")


def _span(name: str, entry: object, start: int) -> Span:
    """One entry of the header, its fields of the right types and its bytes as many as its shape says."""
    if not name.isprintable() or not 0 < len(name) <= MAX_TENSOR_NAME:
        _refuse(WEIGHTS, f"tensor name {show(name)} is not allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(WEIGHTS, f"tensor {show(name)} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(WEIGHTS, f"tensor {show(name)} has dtype {show(dtype)}: convert it to {', '.join(FLOATS)}")
    if not _naturals(shape, MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        _refuse(WEIGHTS, f"tensor {show(name)} has a shape that is none: {show(shape)}")
    if not _naturals(offsets, 1 << 62) or len(offsets) != 2:
        _refuse(WEIGHTS, f"tensor {show(name)} has data_offsets that are none: {show(offsets)}")
    span = Span(dtype, tuple(shape), start + offsets[0], start + offsets[1])
    needed = math.prod(shape) * _itemsize(dtype)
    if span.end - span.begin != needed:
        _refuse(WEIGHTS, f"tensor {show(name)} has {span.end - span.begin} bytes where its shape needs {needed}")
    return span


def _naturals(value: object, most: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= most for n in value)


def _itemsize(dtype: str) -> int:
    return int(np.dtype(DTYPES[dtype].word).itemsize)


def _check_layout(header: Header, start: int, size: int) -> None:
    """The tensors lie end to end, from the header's end to the file's."""
    at = start
    for name, span in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != at:
            what = "overlaps the one before it" if span.begin < at else "leaves a gap before it"
            _refuse(WEIGHTS, f"tensor {show(name)} {what}: save the adapter again")
        at = span.end
    if at > size:
        raise Incomplete(f"{WEIGHTS}: {at - size:,} bytes are missing at its end: copy it again")
    if at < size:
        _refuse(WEIGHTS, f"{size - at:,} bytes too many at its end: save the adapter again")


# Keys and numbers


def check_keys(header: Header, expected: Expected | None) -> None:
    """Exactly the tensors that the family expects, in exactly these shapes, and integers where it expects them."""
    if expected is None:
        return
    swapped = [
        f"{show(k)} is {header[k].dtype}"
        for k, s in expected.items()
        if k in header and (header[k].dtype in INTEGERS) != getattr(s, "integer", False)
    ]
    wrong = [
        f"{show(k)} is {list(header[k].shape)}, not {list(s)}"
        for k, s in expected.items()
        if k in header and header[k].shape != tuple(s)
    ]
    faults = [
        _listed("missing", [show(k) for k in expected if k not in header]),
        _listed("unexpected", [show(k) for k in header if k not in expected]),
        _listed("of the wrong shape", wrong),
        _listed("of the wrong dtype", swapped),
    ]
    if any(faults):
        found = "; ".join(f for f in faults if f)
        _refuse(WEIGHTS, f"{found}: the adapter does not fit its config or this base model")


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{len(names):,} tensors {what} ({', '.join(names[:SHOWN])}{more})" if names else ""


def check_finite(data: Buffer, header: Header) -> None:
    """No NaN and no infinity in any tensor: an exponent of all ones is looked for in the bits.

    The tensors lie end to end: neighbours of one dtype are looked at as one, and by name only where one is at fault.
    """
    scratch = {"<u4": np.empty(1 << 18, "<u4"), "<u2": np.empty(1 << 18, "<u2")}
    floats = [(name, span) for name, span in header.items() if span.dtype in FLOATS]
    for run in _runs([span for _, span in floats]):
        if _finite(data, run, scratch[DTYPES[run.dtype].word]):
            continue
        inside = [(name, span) for name, span in floats if run.begin <= span.begin and span.end <= run.end]
        at_fault = (n for n, span in inside if not _finite(data, span, scratch[DTYPES[span.dtype].word]))
        name = next(at_fault)
        _refuse(WEIGHTS, f"tensor {show(name)} holds NaN or infinity: the training went wrong, save a sound step")


def _runs(spans: Iterable[Span]) -> list[Span]:
    """Neighbours of one dtype as one flat span each."""
    runs: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.begin, s.end)):
        last = runs[-1] if runs else None
        if last is not None and (last.dtype, last.end) == (span.dtype, span.begin):
            runs.pop()
            span = Span(span.dtype, (last.shape[0] + math.prod(span.shape),), last.begin, span.end)
        runs.append(Span(span.dtype, (math.prod(span.shape),), span.begin, span.end))
    return runs


def _finite(data: Buffer, span: Span, scratch: npt.NDArray[Any]) -> bool:
    word, exponent = DTYPES[span.dtype]
    bits = np.frombuffer(data, word, math.prod(span.shape), span.begin) if span.end > span.begin else scratch[:0]
    for i in range(0, bits.size, scratch.size):
        piece = bits[i : i + scratch.size]
        if np.bitwise_and(piece, scratch.dtype.type(exponent), out=scratch[: piece.size]).max() == exponent:
            return False
    return True


# Files


def check_files(folder: Path) -> None:
    """Both files are there; pickled weights are refused with the command that converts them."""
    for file in (CONFIG, WEIGHTS):
        if not _missing(folder / file):
            continue
        pickle = next((p for p in PICKLES if file == WEIGHTS and not _missing(folder / p)), None)
        if pickle:
            _refuse(
                pickle,
                f"a pickle can run code, so it is never read. If you trust it, run in its folder: {convert(pickle)}",
            )
        if file == WEIGHTS and not _missing(folder / ADAPTERHUB):
            _refuse(ADAPTERHUB, f"the weights are read from {WEIGHTS} alone: rename it")
        raise Incomplete(f"{file}: missing. Save the adapter with save_pretrained, or copy the file here")


def _missing(path: Path) -> bool:
    """Whether there is certainly no such file; one that the system will not show is for `open_regular` to report."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def convert(pickle: str) -> str:
    """The command that turns pickled weights into safetensors."""
    return (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.clone().contiguous() for k, v in torch.load('{pickle}', weights_only=True).items()}}, "
        f"'{WEIGHTS}')\""
    )


def open_regular(path: Path, root: Path) -> io.FileIO:
    """The file, if it is a regular one that lies inside root once its links are followed. Never blocks on a FIFO."""
    try:
        real, inside = os.path.realpath(path, strict=True), os.path.realpath(root)
        if not Path(real).is_relative_to(inside):
            _refuse(path.name, "a link leads out of the adapters folder: copy the file instead")
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Incomplete(f"{path.name}: missing") from error
    except OSError as error:
        raise Unreadable(f"{path.name}: cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        _refuse(path.name, "not a regular file: copy the file itself here")
    return io.FileIO(fd, "rb")


def check_size(file: str, size: int, most: int) -> None:
    """Before anything is read or allocated."""
    if size > most:
        what = "raise --max-adapter-bytes, or shrink it" if file == WEIGHTS else "remove what PEFT did not write"
        _refuse(file, f"{size:,} bytes, allowed are {most:,}: {what}")


def read_private(path: Path, root: Path, most: int) -> memoryview:
    """The whole file in one buffer of our own: never mapped, so that nobody can change it after it was checked."""
    with open_regular(path, root) as file:
        return read_open(file, path.name, most)


def read_open(
    file: io.FileIO, name: str, most: int, each: Callable[[memoryview], None] = lambda piece: None
) -> memoryview:
    """The same of a file that is open, whatever its name stands for by now. `each` is given every piece, once read."""
    size = os.fstat(file.fileno()).st_size
    check_size(name, size, most)
    data = memory(size)
    for at in range(0, size, PIECE):
        piece = data[at : at + PIECE]
        fill(file, piece, name)
        each(piece)
    if file.read(1):
        raise Incomplete(f"{name}: grew while it was read")
    return data


def memory(size: int) -> memoryview:
    """Bytes of our own; many of them in large pages, where the system has them: small ones take long to touch."""
    if size < PIECE:
        return memoryview(bytearray(size))
    own = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # of systems that have none
        own.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(own)


def fill(file: io.FileIO, view: memoryview, name: str) -> None:
    """Reads until the view is full."""
    at = 0
    while at < len(view):
        try:
            got = file.readinto(view[at:])
        except OSError as error:
            raise Unreadable(f"{name}: cannot be read ({error.strerror})") from error
        if not got:
            raise Incomplete(f"{name}: shrank while it was read")
        at += got


# The report


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule and what it says of a folder. `ok` None: not looked at, since something that it needs is missing."""

    rule: str
    ok: bool | None
    message: str


def report(folder: Path, expected: Expect | None = None) -> list[Finding]:
    """Every rule on one folder. `expected` is what the family expects of a config and tensor names over some base."""
    found: list[Finding] = []
    folder = folder.absolute()
    _try(found, "name", lambda: check_name(folder.name))
    _try(found, "files", lambda: check_files(folder))
    config = _try(found, "config", lambda: _config(folder))
    weights = _try(found, "header", lambda: _weights(folder))
    data, header = weights or (b"", {})
    if config and weights and expected:
        _try(found, "keys", lambda: check_keys(header, expected(config, frozenset(header))))
    else:
        found.append(Finding("keys", None, "not looked at: needs a sound config, a sound header and a base model"))
    if weights:
        _try(found, "finite", lambda: check_finite(data, header))
    else:
        found.append(Finding("finite", None, "not looked at: needs a sound header"))
    return found


def _try(found: list[Finding], rule: str, check: Callable[[], T]) -> T | None:
    """What the check gives; None, and the finding says why, when it refuses."""
    try:
        value = check()
    except AdapterRefused as refused:
        found.append(Finding(rule, False, refused.message))
        return None
    found.append(Finding(rule, True, "ok"))
    return value


def _config(folder: Path) -> dict[str, Any]:
    return parse_config(read_private(folder / CONFIG, folder.parent, MAX_CONFIG_BYTES))


def _weights(folder: Path) -> tuple[memoryview, Header]:
    data = read_private(folder / WEIGHTS, folder.parent, MAX_BYTES)
    return data, parse_header(data)


# Messages


def _refuse(file: str, what: str) -> NoReturn:
    raise AdapterRefused(f"{file}: {what}")


def show(value: object) -> str:
    """A hostile value as short, printable ASCII."""
    return _clip(ascii(value))


def _clip(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
