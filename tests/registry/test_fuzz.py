"""Bytes and JSON that nobody thought of: the parsers give a value or a typed refusal, and nothing else."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import files
import zoo
from adapter_server.errors import AdapterRefused, AdapterServerError
from adapter_server.families import find, known
from adapter_server.families.base import Shapes
from adapter_server.families.facts import describe
from adapter_server.registry import guard, versions
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Store

FUZZ = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
ROOT = Path(__file__).parents[2]
SOURCES = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "server", ROOT / "tests")))}
SOUND = files.safetensors(files.tensors())
CONFIG = json.dumps(files.CONFIG).encode()

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars | st.sampled_from([1 << 70, -(1 << 63), 1e308, "LORA", "F32", "\ud800", "(" * 50, ".*", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
offsets = st.lists(st.integers(-8, 300) | st.integers(), min_size=0, max_size=3)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F64", "", "f32"]) | values,
        "shape": st.lists(st.integers(-2, 9) | st.integers(), max_size=10) | values,
        "data_offsets": offsets | values,
    },
    optional={"more": values},
)
headers = st.dictionaries(st.text(max_size=12) | st.just("__metadata__"), entries | values, max_size=5)


def refused_or(check: Callable[[], object]) -> None:
    """The check passes, or refuses in words that can be shown."""
    refusal = None
    try:
        check()
    except AdapterServerError as error:
        refusal = error
    if refusal:
        assert isinstance(refusal, AdapterRefused)
        assert refusal.message.isprintable()
        assert len(refusal.message) < 1000


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A sound file with some bytes replaced, cut out or put in."""
    place = st.integers(0, len(whole))
    cut = st.builds(lambda at, to, new: whole[:at] + new + whole[to:], place, place, st.binary(max_size=12))
    near = st.integers(0, min(200, len(whole)))
    poke = st.builds(lambda at, new: whole[:at] + new + whole[at + len(new) :], near, st.binary(min_size=1, max_size=4))
    return cut | poke


def whole_file(data: bytes) -> None:
    header = guard.parse_header(data)
    assert max(span.end for span in header.values()) == len(data)
    guard.check_finite(data, header)


@FUZZ
@given(st.binary(max_size=400) | damaged(CONFIG) | values.map(lambda v: json.dumps(v).encode()))
@example(b"\xff\xfe{\x00}\x00")
@example(b'{"peft_type":"LORA","a":' + b"1" * 5000 + b"}")
def test_any_config(data: bytes) -> None:
    refused_or(lambda: guard.parse_config(data))


@FUZZ
@given(st.binary(max_size=400) | damaged(SOUND))
def test_any_weights(data: bytes) -> None:
    refused_or(lambda: whole_file(data))


@FUZZ
@given(st.binary(max_size=300), st.binary(max_size=40))
def test_any_header_bytes(header: bytes, body: bytes) -> None:
    refused_or(lambda: whole_file(files.frame(header, body)))


@FUZZ
@given(headers, st.binary(max_size=64))
def test_any_header_object(header: dict[str, Any], body: bytes) -> None:
    refused_or(lambda: whole_file(files.frame(header, body)))


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_atheris_finds_nothing_but_refusals(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    script = Path(files.__file__).with_name("fuzzed.py")
    words = (sys.executable, script, tmp_path, "-max_total_time=240", "-max_len=4096", f"-artifact_prefix={tmp_path}/")
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | SOURCES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr


@FUZZ
@given(st.text(max_size=140) | st.characters().map(lambda c: f"a{c}"))
def test_any_name(name: str) -> None:
    refused_or(lambda: guard.check_name(name))


@FUZZ
@given(st.binary(max_size=300) | values.map(lambda v: json.dumps(v).encode()))
def test_any_manifest(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = versions.shelf(Path(root), "a") / ("0" * 12)
        folder.mkdir(parents=True)
        (folder / versions.MANIFEST).write_bytes(data)
        assert versions.listed(Path(root), "a") == []


@FUZZ
@given(st.binary(max_size=60) | damaged(CONFIG), st.binary(max_size=60) | damaged(SOUND))
def test_any_upload(config: bytes, weights: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        publisher = Publisher(Store(Path(root)))
        refused_or(lambda: publisher.publish("a", config, io.BytesIO(weights)))


@functools.cache
def shapes() -> Shapes:
    return describe(zoo.tiny_base("llama"))


@functools.cache
def saved(peft_type: str) -> dict[str, Any]:
    """The config of a sound adapter of this kind, as far as the zoo has one."""
    base = zoo.tiny_base("llama")
    for case in zoo.ADAPTERS.values():
        if "llama" in case.archs and (config := case(base).to_dict())["peft_type"] == peft_type:
            return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {}


@pytest.mark.parametrize("peft_type", known())
@settings(FUZZ, max_examples=20)
@given(st.data())
def test_any_option_of_any_kind(peft_type: str, data: st.DataObject) -> None:
    config = {"peft_type": peft_type, "target_modules": ["q_proj"]} | saved(peft_type)
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(config)) | st.text(max_size=6), values, max_size=3))
    raw = json.dumps(config | changes | {"peft_type": peft_type}, default=str).encode()
    names = data.draw(st.frozensets(st.sampled_from(sorted(files.SHAPES)) | st.text(max_size=20), max_size=4))

    def check() -> None:
        parsed = guard.parse_config(raw)
        for name, shape in (find(peft_type).expected(parsed, shapes(), names) or {}).items():  # None: PEFT alone knows
            assert isinstance(name, str)
            assert all(type(size) is int and size >= 0 for size in shape)

    refused_or(check)
