"""Every row of hostile input that the registry must refuse, each with a message that names the file and the fault."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import files
from adapter_server.errors import AdapterRefused
from adapter_server.registry import guard

A, B = files.SHAPES


def refuses(fault: str, check: Callable[[], object]) -> None:
    with pytest.raises(AdapterRefused) as refused:
        check()
    assert re.search(fault, refused.value.message), refused.value.message
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 600


# Names


@pytest.mark.parametrize("name", ["a", "A9", "my-adapter_v1.2", "0", "x" * 128])
def test_plain_names_pass(name: str) -> None:
    guard.check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "a\0", "a\n", "a b", ".hidden", "-rf", "é", "x" * 129, "x" * 300],
)
def test_names_outside_the_grammar_are_refused(name: str) -> None:
    refuses("is not allowed: 1 to 128", lambda: guard.check_name(name))


@pytest.mark.parametrize("name", ["base", "BASE", "My-Model"])
def test_reserved_names_are_refused_in_any_case(name: str) -> None:
    refuses("is reserved", lambda: guard.check_name(name, reserved=["my-model"]))


# The config


def test_a_config_is_a_dictionary() -> None:
    assert guard.parse_config(json.dumps(files.CONFIG).encode()) == files.CONFIG


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b'{"peft_type": "LORA"} trailing', "no valid JSON"),
        (b"[1, 2]", "a JSON object is needed, this is a list"),
        (b'{"peft_type": "LORA", "x": "' + b"y" * (64 << 10) + b'"}', "bytes, allowed are 65,536"),
        (b'{"peft_type": "LORA", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested deeper than 32"),
        (b'{"a":' * 9_000, "nested deeper than 32"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is no number"),
        (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity is no number"),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "too large"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 9_000 + b"}", "no valid JSON"),
        (b'{"peft_type": "LORA", "r": 1, "r": 2}', "occurs twice"),
        (b'{"peft_type": "LORA", "x": "\xff"}', "no valid JSON"),
        (b'{"peft_type": "LORA", "x": "\\ud800"}', "lone surrogate"),
        (b'\xef\xbb\xbf{"peft_type": "LORA"}', "no valid JSON"),
        (b'{"r": 1}', '"peft_type" is None'),
        (b'{"peft_type": 7}', '"peft_type" is 7'),
        (b'{"peft_type": "../../os"}', '"peft_type" is'),
        (b'{"peft_type": "LORA\\n"}', '"peft_type" is'),
    ],
)
def test_broken_configs_are_refused(data: bytes, fault: str) -> None:
    refuses(f"^adapter_config.json: .*{fault}", lambda: guard.parse_config(data))


def test_brackets_inside_text_are_no_nesting() -> None:
    text = '[{"' * 1_000
    assert guard.parse_config(json.dumps({"peft_type": "LORA", "x": text}).encode())["x"] == text


def test_hostile_quotes_cost_one_pass() -> None:
    started = time.perf_counter()
    refuses("no valid JSON", lambda: guard.parse_header(files.frame(b'"' + b'\\"' * (4 << 20))))
    assert time.perf_counter() - started < 5


# The header


def test_a_header_gives_every_tensor_its_bytes() -> None:
    arrays = files.tensors()
    data = files.safetensors(arrays)
    header = guard.parse_header(data)
    assert {name: span.shape for name, span in header.items()} == files.SHAPES
    assert all(data[s.begin : s.end] == arrays[n].tobytes() for n, s in header.items())


def test_a_header_may_hold_metadata_and_empty_tensors() -> None:
    entries = {
        "__metadata__": {"format": "pt"},
        "e": files.entry("F32", (0, 4), 0, 0),
        "x": files.entry("F16", (2,), 0, 4),
    }
    assert set(guard.parse_header(files.frame(entries, b"1234"))) == {"e", "x"}


def test_a_header_can_be_checked_against_a_size_alone() -> None:
    data = files.safetensors(files.tensors())
    start = guard.header_bytes(data, len(data))
    assert guard.parse_header(data[:start], len(data)) == guard.parse_header(data)


X4 = {"x": files.entry("F32", (1,), 0, 4)}


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\0" * 7, "7 bytes are no safetensors file"),
        ((99 << 20).to_bytes(8, "little") + b" ", "a header of 103,809,024 bytes"),
        (b"\xff" * 8, "a header of"),
        ((100).to_bytes(8, "little") + b"{}", "ends inside its header"),
        (files.frame(b""), "no valid JSON"),
        (files.frame(b" " * 1000), "no valid JSON"),
        (files.frame([]), "a JSON object is needed"),
        (files.frame({}), "no tensors"),
        (files.frame({"__metadata__": {"format": "pt"}}), "no tensors"),
        (files.frame(b"[" * 10_000 + b"]" * 10_000), "nested deeper than 3"),
        (files.frame({"__metadata__": {"a": 1}} | X4, b"1234"), "__metadata__ must map"),
        (files.frame({"__metadata__": "x"} | X4, b"1234"), "__metadata__ must map"),
        (files.frame(b'{"x":{},"x":{}}'), "occurs twice"),
        (files.frame({"x": 1}), "needs dtype, shape and data_offsets"),
        (files.frame({"x": X4["x"] | {"more": 1}}, b"1234"), "and nothing else"),
        (files.frame({"x": {"dtype": "F32", "shape": [1]}}), "needs dtype"),
        (files.frame({"x": files.entry("F64", (1,), 0, 8)}, b"8" * 8), "dtype 'F64'.*convert it"),
        (files.frame({"x": files.entry("I8", (4,), 0, 4)}, b"1234"), "dtype 'I8'"),
        (files.frame({"x": X4["x"] | {"dtype": ["F32"]}}, b"1234"), "dtype"),
        (files.frame({"x": X4["x"] | {"shape": "1"}}, b"1234"), "shape that is none"),
        (files.frame({"x": X4["x"] | {"shape": [-1]}}, b"1234"), "shape that is none"),
        (files.frame({"x": X4["x"] | {"shape": [True]}}, b"1234"), "shape that is none"),
        (files.frame({"x": X4["x"] | {"shape": [1.0]}}, b"1234"), "shape that is none"),
        (files.frame({"x": X4["x"] | {"shape": [1] * 9}}, b"1234"), "shape that is none"),
        (files.frame({"x": X4["x"] | {"shape": [10**4000] * 8}}, b"1234"), "shape that is none"),
        (files.frame({"x": files.entry("F32", (1 << 40, 1 << 40), 0, 4)}, b"1234"), "where its shape needs"),
        (files.frame({"x": X4["x"] | {"data_offsets": [0]}}, b"1234"), "data_offsets that are none"),
        (files.frame({"x": X4["x"] | {"data_offsets": [-4, 0]}}, b"1234"), "data_offsets that are none"),
        (files.frame({"x": files.entry("F32", (1,), 4, 0)}, b"1234"), "-4 bytes where its shape needs 4"),
        (files.frame({"x": files.entry("F32", (2,), 0, 4)}, b"1234"), "4 bytes where its shape needs 8"),
        (files.frame(X4 | {"y": files.entry("F32", (1,), 2, 6)}, b"123456"), "'y' overlaps"),
        (files.frame(X4 | {"y": X4["x"]}, b"1234"), "overlaps"),
        (files.frame(X4 | {"y": files.entry("F32", (1,), 6, 10)}, b"1" * 10), "'y' leaves a gap"),
        (files.frame({"x": files.entry("F32", (1,), 4, 8)}, b"1" * 8), "leaves a gap"),
        (files.frame({"x": files.entry("F32", (1,), 1 << 60, (1 << 60) + 4)}, b"1234"), "leaves a gap"),
        (files.frame(X4, b"123"), "1 bytes are missing"),
        (files.frame(X4, b"12345"), "1 bytes too many"),
        (files.frame({"x\n\x1b[2J": X4["x"]}, b"1234"), r"tensor name 'x\\n.*is not allowed"),
        (files.frame({"x" * 600: X4["x"]}, b"1234"), "tensor name"),
        (files.frame({"\ud800": X4["x"]}, b"1234"), "tensor name"),
    ],
)
def test_broken_headers_are_refused(data: bytes, fault: str) -> None:
    refuses(f"^adapter_model.safetensors: .*{fault}", lambda: guard.parse_header(data))


@pytest.mark.parametrize("kind", ["tensors", "brackets"])
def test_a_header_of_300_000_things_is_refused_before_it_is_parsed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = b",".join(b'"%d":{"shape":[[]]}' % i for i in range(300_000))
    data = files.frame(b"{" + entries + b"}" if kind == "tensors" else b"[]" * 300_001)
    monkeypatch.setattr(guard.json, "loads", None)
    refuses("brackets, allowed are 600,000", lambda: guard.parse_header(data))


def test_the_tensor_count_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_TENSORS", 1)
    guard._parsed.cache_clear()
    refuses("2 tensors, allowed are 1|brackets", lambda: guard.parse_header(files.safetensors(files.tensors())))


def test_what_is_remembered_of_a_header_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the same header of a shorter file passes, nor can who was given it change it."""
    data = files.safetensors(files.tensors())
    header = guard.parse_header(data)
    assert guard.parse_header(data) is header
    with pytest.raises(TypeError):
        header["x"] = next(iter(header.values()))  # type: ignore[index]
    refuses("bytes are missing", lambda: guard.parse_header(data, len(data) - 1))
    monkeypatch.setattr(guard, "REMEMBERED", 8)
    assert guard.parse_header(data) == header
    assert guard.parse_header(data) is not header


def test_total_bytes_are_capped() -> None:
    refuses("bytes, allowed are 100:", lambda: guard.parse_header(files.safetensors(files.tensors()), max_bytes=100))


# Keys


def headed(shapes: dict[str, tuple[int, ...]]) -> guard.Header:
    return {name: guard.Span("F32", shape, 0, 0) for name, shape in shapes.items()}


def test_the_exact_keys_pass() -> None:
    guard.check_keys(headed(files.SHAPES), files.SHAPES)


@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        ({A: (2, 8)}, "1 tensors missing .*lora_B"),
        (files.SHAPES | {"model.layers.0.mlp.down_proj.weight": (8, 8)}, "1 tensors unexpected .*down_proj"),
        (files.SHAPES | {f"{files.PREFIX}.lora_B.good.weight": (8, 2)}, "1 tensors unexpected .*lora_B.good"),
        (files.SHAPES | {f"{files.PREFIX}.base_layer.weight": (8, 8)}, "1 tensors unexpected .*base_layer"),
        (files.SHAPES | {A: (4096, 8)}, r"1 tensors of the wrong shape .*\[4096, 8\], not \[2, 8\]"),
        (files.SHAPES | {f"x{i}": (1,) for i in range(100)}, "100 tensors unexpected .*'x3' and 96 more"),
    ],
)
def test_any_other_keys_are_refused(shapes: dict[str, tuple[int, ...]], fault: str) -> None:
    refuses(fault, lambda: guard.check_keys(headed(shapes), files.SHAPES))


class Whole(tuple[int, ...]):
    integer = True


@pytest.mark.parametrize("dtype", ["U8", "I16", "I32", "I64"])
def test_integers_pass_only_where_they_are_expected(dtype: str) -> None:
    header = {"x": guard.Span(dtype, (3,), 0, 0), "y": guard.Span("F32", (3,), 0, 0)}
    guard.check_keys(header, {"x": Whole((3,)), "y": (3,)})
    refuses(f"1 tensors of the wrong dtype .*'x' is {dtype}", lambda: guard.check_keys(header, {"x": (3,), "y": (3,)}))
    both = {"x": Whole((3,)), "y": Whole((3,))}
    refuses("1 tensors of the wrong dtype .*'y' is F32", lambda: guard.check_keys(header, both))


def test_integers_are_not_looked_at_for_infinities() -> None:
    data = files.safetensors({"x": np.full(3, -1, np.int64)}, "I64")
    guard.check_finite(data, guard.parse_header(data))


# Numbers

BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
BAD = {
    "F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
    "F16": [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF],
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF],
}
LARGEST = {"F32": 0x7F7FFFFF, "F16": 0x7BFF, "BF16": 0x7F7F}


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("size", [1, 1000, (1 << 18) + 1])
def test_nan_and_infinity_are_found_wherever_they_are(dtype: str, size: int) -> None:
    for bits in BAD[dtype]:
        for at in (0, size - 1):
            array = np.full(size, LARGEST[dtype], BITS[dtype])
            array[at] = bits
            data = files.safetensors({"ok": np.zeros(3, BITS[dtype]), "bad": array}, dtype)
            refuses("'bad' holds NaN or infinity", lambda data=data: guard.check_finite(data, guard.parse_header(data)))


@pytest.mark.parametrize("dtype", list(BITS))
def test_finite_numbers_pass(dtype: str) -> None:
    arrays = {"edge": np.array([0, 1, LARGEST[dtype]], BITS[dtype]), "empty": np.zeros((0, 3), BITS[dtype])}
    data = files.safetensors(arrays, dtype)
    guard.check_finite(data, guard.parse_header(data))


@pytest.mark.parametrize("pad", range(4))
def test_numbers_need_no_alignment(pad: int) -> None:
    for value, finite in ((1.0, True), (np.inf, False)):
        body = b"\0\0" + np.float32(value).tobytes()
        entries = {"a": files.entry("F16", (1,), 0, 2), "b": files.entry("F32", (1,), 2, 6)}
        data = files.frame(json.dumps(entries).encode() + b" " * pad, body)
        if finite:
            guard.check_finite(data, guard.parse_header(data))
        else:
            refuses("'b' holds NaN", lambda data=data: guard.check_finite(data, guard.parse_header(data)))


# Files


def test_a_whole_folder_passes(tmp_path: Path) -> None:
    folder = files.write(tmp_path / "a")
    guard.check_files(folder)
    whole = (folder / guard.WEIGHTS).read_bytes()
    assert guard.read_private(folder / guard.WEIGHTS, tmp_path, 1 << 20) == whole


@pytest.mark.parametrize("file", [guard.CONFIG, guard.WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    folder = files.write(tmp_path / "a")
    (folder / file).unlink()
    refuses(f"^{file}: missing", lambda: guard.check_files(folder))


@pytest.mark.parametrize("pickle", guard.PICKLES)
def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path, pickle: str) -> None:
    folder = files.write(tmp_path / "a")
    (folder / guard.WEIGHTS).rename(folder / pickle)
    refuses(f'^{pickle}: .* python -c "import torch;.*{pickle}', lambda: guard.check_files(folder))
    command = shlex.split(guard.convert(pickle))
    compile(command[2], "<command>", "exec")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p)])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / guard.WEIGHTS
    make(path)
    refuses(f"^{guard.WEIGHTS}: ", lambda: guard.read_private(path, tmp_path, 1 << 20))


def test_a_link_out_of_the_root_is_refused_and_one_inside_is_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", files.write(tmp_path / "outside")
    inside = files.write(root / "inside")
    (root / "file").mkdir()
    (root / "file" / guard.WEIGHTS).symlink_to(outside / guard.WEIGHTS)
    (root / "folder").symlink_to(outside)
    (root / "alias").symlink_to(inside)
    for name in ("file", "folder"):
        refuses("leads out", lambda name=name: guard.read_private(root / name / guard.WEIGHTS, root, 1 << 20))
    assert guard.read_private(root / "alias" / guard.WEIGHTS, root, 1 << 20)


def test_a_file_over_its_cap_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / guard.WEIGHTS
    with path.open("wb") as file:
        file.truncate(1 << 40)
    refuses("1,099,511,627,776 bytes, allowed are", lambda: guard.read_private(path, tmp_path, guard.MAX_BYTES))


# The report


def rules(findings: list[guard.Finding]) -> dict[str, bool | None]:
    return {finding.rule: finding.ok for finding in findings}


def test_the_report_has_one_line_per_rule(tmp_path: Path) -> None:
    folder = files.write(tmp_path / "good")
    found = guard.report(folder, lambda config, names: {n: files.SHAPES[n] for n in names})
    assert rules(found) == dict.fromkeys(["name", "files", "config", "header", "keys", "finite"], True)


def test_the_report_goes_on_after_a_refusal(tmp_path: Path) -> None:
    arrays = files.tensors() | {"nan": np.full(1, np.nan, np.float32)}
    folder = files.write(tmp_path / "bad name", config={"r": 1}, weights=files.safetensors(arrays))
    found = guard.report(folder, lambda config, names: {})
    assert rules(found) == {
        "name": False, "files": True, "config": False, "header": True, "keys": None, "finite": False,
    }  # fmt: skip


def test_without_a_base_the_report_says_that_it_did_not_look_at_the_keys(tmp_path: Path) -> None:
    found = guard.report(files.write(tmp_path / "good"))
    assert [(f.rule, f.message) for f in found if not f.ok] == [
        ("keys", "not looked at: needs a sound config, a sound header and a base model")
    ]


def test_the_report_of_nothing_refuses_and_does_not_raise(tmp_path: Path) -> None:
    found = rules(guard.report(tmp_path / "none"))
    assert (found["files"], found["config"], found["header"], found["keys"]) == (False, False, False, None)


@pytest.mark.parametrize(
    ("named", "revision", "fits"),
    [
        ("org/Tiny", None, True), ("/data/models/tiny/", "main", True), (r"C:\models\Tiny", None, True),
        ("tiny", None, True), ("", None, True), (None, None, True), (7, None, True), ("org/Tiny", ["b" * 40], True),
        ("org/Tiny-2", None, False), ("tiny/other", None, False),
        ("org/Tiny", "a" * 40, True), ("org/Tiny", "b" * 40, False),
    ],
)  # fmt: skip
def test_the_base_that_a_config_names(named: object, revision: object, fits: bool) -> None:
    config = {"base_model_name_or_path": named, "revision": revision}
    base = guard.Base(("org/Tiny", "demo"), commit="a" * 40)
    guard.check_base(config, guard.Base())
    guard.check_base({}, base)
    if fits:
        guard.check_base(config, base)
    else:
        with pytest.raises(AdapterRefused, match=r"it was trained on .* is served"):
            guard.check_base(config, base)
