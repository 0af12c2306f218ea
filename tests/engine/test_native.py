"""The kernels in C: changes of a weight against the matrices that they stand for, products against plain ones."""

from __future__ import annotations

import ctypes
import gc
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from adapter_server.core import Spec
from adapter_server.engine import added, native
from adapter_server.engine.added import Native
from adapter_server.engine.placed import OneDnn, Placed, Product
from adapter_server.engine.routing import Routing, Step, route, running
from adapter_server.engine.site import LinearGroup
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, Patch
from adapter_server.families.bottleneck import Bottleneck
from adapter_server.families.deltas import (
    SIDE,
    Circulant,
    Delta,
    Kronecker,
    Mirror,
    Rows,
    Scaled,
    Sparse,
    Spectral,
    Turn,
    held_bytes,
)

OUT, IN = 70, 90


def sparse(out: int, inp: int, count: int) -> Sparse:
    places = torch.randint(out, (count,)), torch.randint(inp, (count,))
    return Sparse.of(*places, torch.randn(count), (out, inp))


def near(n: int) -> int:
    """The factor next to its root: the product of such is no low rank."""
    return max(m for m in range(1, int(n**0.5) + 1) if n % m == 0)


def deltas(out: int, inp: int) -> dict[str, Delta]:
    """One of each; sizes have a factor of 2."""
    return {
        "nothing": sparse(out, inp, 0),
        "sparse": sparse(out, inp, 900),
        "spectral": Spectral(sparse(out, inp, 90)),
        "kronecker": Kronecker(torch.randn(near(out), near(inp)), torch.randn(out // near(out), inp // near(inp))),
        "circulant": Circulant.of(torch.randn(out // 2, inp // 2, 2)),
        "one block": Circulant.of(torch.randn(1, 1, out)),
        "rows": Rows(torch.randperm(out)[:5], torch.randn(5, inp), out),
        "scaled": Scaled(
            torch.randn(6, inp + 2)[:, :inp], torch.randn(6), Scaled.blocks(torch.randn(out, 6)), torch.randn(out)
        ),
    }


@pytest.mark.parametrize("kind", list(deltas(2, 2)))
@pytest.mark.parametrize(("out", "inp"), [(70, 90), (64, 44), (512, 512)])
def test_a_change_is_its_matrix(kind: str, out: int, inp: int) -> None:
    """Whoever else is there: a row's numbers are its own, bit by bit."""
    delta = deltas(out, inp)[kind]
    if kind == "one block":
        inp = out
    module = torch.nn.Linear(inp, out).requires_grad_(False)
    group = LinearGroup(0, {"m": module}, Native(kernel()), pack=True, head=False)
    adapter = Adapter(Spec("a", "0" * 12, "", "X", {}, 0), {"m": Patch(delta=delta)})
    placed = Placed(adapter, {0: group.place(adapter.patches)}, {})
    x = torch.randn(37, inp)
    [y, last] = [run(group, placed, part) for part in (x, x[-1:])]
    scale = delta.dense().norm() + 1
    assert torch.allclose(y, module(x) + x @ delta.dense().T, atol=float(1e-5 * scale))
    assert torch.allclose(y, module(x) + delta.apply(x), atol=float(1e-5 * scale))
    assert torch.equal(y[-1:], last)
    assert held_bytes(placed.tensors()) == held_bytes(delta.tensors())


def run(group: LinearGroup, placed: Placed, x: torch.Tensor) -> torch.Tensor:
    routing = route([(len(x), ((placed, 1.0),))], torch.device("cpu"))
    with running(Step(routing, Routing(1))):
        return group.apart(x)[0]


def test_two_adapters_on_the_same_tokens_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many units as threads, each of as much work: at once, some of what they add would be lost."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # the tests' own is one
    modules = {f"m{i}": torch.nn.Linear(512, 512).requires_grad_(False) for i in range(3)}
    group = LinearGroup(0, modules, Native(kernel()), pack=True, head=False)
    adapters = []
    for name in ("a", "b"):
        patches = {m: Patch(A=torch.randn(16, 512) / 20, B=torch.randn(512, 16) / 20) for m in modules}
        adapter = Adapter(Spec(name, "0" * 12, "", "X", {}, 0), patches)
        adapters.append(Placed(adapter, {0: group.place(patches)}, {}))
    uses = tuple((placed, 1.0) for placed in adapters)
    changes = [torch.cat([p.B @ p.A for p in placed.adapter.patches.values()]) for placed in adapters]
    for _ in range(100):
        x = torch.randn(16, 512)
        with running(Step(route([(16, uses)], torch.device("cpu")), Routing(1))):
            y = group.apart(x)[0]
        want = torch.cat([module(x) for module in modules.values()], 1) + x @ sum(changes).T
        assert torch.allclose(y, want, atol=1e-4)


def test_a_length_with_a_large_prime_factor_is_left_to_torch() -> None:
    assert added.plan_of(2 * 67) is None
    delta, x = Spectral(sparse(134, 10, 30)), torch.randn(3, 10)
    group = LinearGroup(0, {"m": torch.nn.Linear(10, 134)}, Native(kernel()), pack=True, head=False)
    adapter = Adapter(Spec("a", "0" * 12, "", "X", {}, 0), {"m": Patch(delta=delta)})
    placed = Placed(adapter, {0: group.place(adapter.patches)}, {})
    with torch.inference_mode():
        want = group.base(x) + x @ delta.dense().T
        assert torch.allclose(run(group, placed, x), want, atol=1e-5)


def test_what_modules_share_is_held_once() -> None:
    A, B = torch.randn(6, 200), Scaled.blocks(torch.randn(200, 6))
    parts = [Scaled(A[:, :n], torch.randn(6), B[: -(-n // SIDE)], torch.randn(n)) for n in (200, 130)]
    apart = sum(t.nbytes for part in parts for t in part.tensors())
    held = held_bytes(t for part in parts for t in part.tensors())
    assert held == A.nbytes + B.nbytes + 4 * (6 + 200 + 6 + 130) < apart


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 13, 32, 300])
@pytest.mark.parametrize(("out", "inp"), [(8, 64), (10, 37), (3, 5), (48, 256), (513, 300)])
def test_a_product_from_panels_is_the_plain_one(out: int, inp: int, tokens: int) -> None:
    """Rows of x and columns that fill no tile; a row's numbers are its own, whoever stands beside it."""
    x, weight, bias = torch.randn(tokens, inp), torch.randn(out, inp), torch.randn(out)
    panels = native.Panels(kernel(), weight)
    y = panels(x, bias)
    assert torch.allclose(y, x @ weight.T + bias, atol=1e-4)
    assert torch.allclose(panels(x, None), x @ weight.T, atol=1e-4)
    for t in range(0, tokens, max(1, tokens // 32)):
        assert torch.equal(panels(x[t:], bias)[0], y[t])


def test_a_product_of_part_of_a_wider_input() -> None:
    x, weight = torch.randn(5, 2 * IN)[:, IN:], torch.randn(OUT, IN)
    assert torch.allclose(native.Panels(kernel(), weight)(x, None), x @ weight.T, atol=1e-4)


def test_packed_weights_are_a_second_copy_where_they_are_faster() -> None:
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    product, x = Product(weight, bias, pack=True), torch.randn(3, IN)
    assert isinstance(product.packed, native.Panels)
    assert torch.allclose(product(x), x @ weight.T + bias, atol=1e-4)
    assert product.bytes > 2 * weight.nbytes
    assert Product(weight, bias, pack=False).packed is None
    assert Product(weight.bfloat16(), None, pack=True).packed is None


def test_without_a_compiler_weights_are_packed_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    product = Product(weight, bias, pack=True)
    assert isinstance(product.packed, OneDnn)
    for rows in (1, OneDnn.MOST_ROWS, OneDnn.MOST_ROWS + 1):
        x = torch.randn(rows, IN)
        assert torch.allclose(product(x), x @ weight.T + bias, atol=1e-4)


def test_functions_are_called_as_they_are_declared() -> None:
    """In C a pointer has a star, and the rest are what TYPES says of their letters."""
    letters = {"float": "f", "i64": "n", "int": "i"}
    found = {}
    for path in native.SOURCES:
        for name, given in re.findall(r"^(?:void|i64) (\w+)\(([^)]*)\)", path.read_text(), re.MULTILINE):
            if name not in native.SIGNATURES:
                continue
            each = [re.sub(r"\bconst\b", "", argument).split() for argument in given.split(",")]
            found[name] = "".join("p" if "*" in "".join(words) else letters[words[0]] for words in each)
    assert {name: found[name] for name in native.SIGNATURES} == native.SIGNATURES


def test_a_machine_without_a_compiler_is_told_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    caplog.set_level("WARNING")
    assert native.library.__wrapped__() is None
    assert "install gcc" in caplog.text


def test_groups_that_some_adapters_touch_have_their_own_units() -> None:
    """Of different numbers of members; the first adapters met touch fewer groups than the last."""
    form = Native(kernel())
    shapes = [("q", "k", "v"), ("o",), ("gate", "up")]
    modules = {name: torch.nn.Linear(IN, OUT).requires_grad_(False) for names in shapes for name in names}
    groups = [LinearGroup(i, {n: modules[n] for n in names}, form, True, False) for i, names in enumerate(shapes)]
    touched = [("o",), ("q", "v"), ("gate", "o"), ("up", "k", "o"), tuple(modules)]
    adapters = []
    for i, names in enumerate(touched):
        patches = {n: Patch(A=torch.randn(3 + i, IN) / 9, B=torch.randn(OUT, 3 + i) / 9) for n in names}
        adapter = Adapter(Spec(f"a{i}", "0" * 12, "", "X", {}, 0), patches)
        own = {g.index: g.place(patches) for g in groups if set(g.paths) & patches.keys()}
        adapters.append(Placed(adapter, own, {}))
    for count in range(1, len(adapters) + 1):
        rows = [(3, ()), *((1 + 9 * i, ((placed, 1.0),)) for i, placed in enumerate(adapters[:count]))]
        routing, x = route(rows, torch.device("cpu")), torch.randn(sum(n for n, _ in rows), IN)
        assert form.special(routing) == []
        with running(Step(routing, Routing(1))):
            got = {n: y for g in groups for n, y in zip(g.paths, g.apart(x)[0].split(g.outs, 1), strict=True)}
        for name, module in modules.items():
            patches = [uses[0][0].adapter.patches.get(name) if uses else None for _, uses in rows]
            each = zip(x.split([n for n, _ in rows]), patches, strict=True)
            want = [module(part) if patch is None else patch.apply(part, module) for part, patch in each]
            assert torch.allclose(got[name], torch.cat(want), atol=1e-4), (name, count)


def test_whoever_alone_knows_of_a_group_may_stand_in_pieces() -> None:
    """What is asked first is whether somebody in one piece acts there; nobody that was ever laid out has that group."""
    form = Native(kernel())
    modules = [torch.nn.Linear(IN, OUT).requires_grad_(False) for _ in range(2)]
    groups = [LinearGroup(i, {f"m{i}": m}, form, pack=True, head=False) for i, m in enumerate(modules)]
    patches = {f"m{i}": Patch(A=torch.randn(3, IN) / 9, B=torch.randn(OUT, 3) / 9) for i in range(2)}
    [one, both] = [
        Placed(Adapter(Spec(name, "0" * 12, "", "X", {}, 0), patches), {g.index: g.place(patches) for g in own}, {})
        for name, own in (("one", groups[:1]), ("both", groups))
    ]
    rows, x = [(1, ((both, 1.0),)), (2, ((one, 1.0),)), (1, ((both, 1.0),))], torch.randn(4, IN)
    with running(Step(route(rows, torch.device("cpu")), Routing(1))):
        y = [group.apart(x)[0] for group in groups]
    for i, module in enumerate(modules):
        want = patches[f"m{i}"].apply(x, module)
        assert torch.allclose(y[i][[0, 3]], want[[0, 3]], atol=1e-4)
        assert torch.allclose(y[i][1:3], (want if i == 0 else module(x))[1:3], atol=1e-4)


WIDEN = """
#include "vectors.h"
void widen(float *to, const uint16_t *from, i64 count, int format) {
    for (i64 i = 0; i < count; i += LANES)
        *(vector *)(to + i) = format == BFLOAT16 ? widened(from + i, BFLOAT16) : widened(from + i, FLOAT16);
}
"""


@pytest.mark.parametrize("flags", [[], ["-U__F16C__"]], ids=["as here", "without instructions for it"])
def test_every_number_of_16_bits_widens_without_loss(flags: list[str], tmp_path: Path) -> None:
    kernel()
    (tmp_path / "widen.c").write_text(WIDEN)
    own = [flag for flag in native.FLAGS if flag != "-c"]
    command = ["cc", *own, *flags, "-shared", f"-I{native.SOURCES[0].parent}", "widen.c", "-o", "widen.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    widen = ctypes.CDLL(str(tmp_path / "widen.so")).widen
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
        found, want = torch.empty(1 << 16), every.view(dtype).float()
        address = ctypes.c_void_p(found.data_ptr()), ctypes.c_void_p(every.data_ptr())
        widen(*address, ctypes.c_int64(1 << 16), added.FORMATS.index(dtype))
        finite = torch.isfinite(want)
        assert torch.equal(found[finite].view(torch.int32), want[finite].view(torch.int32)), dtype


EXTREMES = torch.tensor([0.0, -0.0, 6e-8, -3.1e-5, 6.1e-5, 65504.0, -65504.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("inp", "out", "rank"), [(90, 70, 5), (7, 9, 3), (64, 256, 8)])
def test_factors_of_16_bits_are_read_as_they_are(
    inp: int, out: int, rank: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest and the largest numbers too; by one thread and several, scaled, and of tokens in pieces. To the bit
    what float32 gives, but for the ends of rows that are no whole vectors.
    """
    for module in (native, added):
        monkeypatch.setattr(module, "SERIAL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    form, base = Native(kernel()), torch.nn.Linear(inp, out).requires_grad_(False)
    group = LinearGroup(0, {"m": base}, form, pack=True, head=False)
    A, B = (torch.randn(size).to(dtype) for size in ((rank, inp), (out, rank)))
    A.view(-1)[: len(EXTREMES)] = EXTREMES.to(dtype)
    found = []
    for patch in (Patch(A=A, B=B), Patch(A=A.float(), B=B.float())):
        placed = Placed(Adapter(Spec("a", "0" * 12, "", "X", {}, 0), {}), {0: group.place({"m": patch})}, {})
        assert placed.groups[0].A is not None
        found.append((placed, placed.groups[0].A.dtype))
    assert [held for _, held in found] == [dtype, torch.float32]
    assert found[0][0].bytes * 2 == found[1][0].bytes
    x = torch.randn(40, inp)
    for rows in ([3, 6, 19], [1], [40]):
        for pieces in (False, True):
            ours, theirs = (_answers(group, placed, x, rows, pieces) for placed, _ in found)
            if inp % 16:
                assert torch.allclose(ours, theirs, rtol=1e-5, atol=0.01), (rows, pieces)
            else:
                assert torch.equal(ours, theirs), (rows, pieces)


def _answers(group: LinearGroup, placed: Placed, x: torch.Tensor, counts: list[int], pieces: bool) -> torch.Tensor:
    """The adapter's rows of so many tokens, of which each other one is the base's where it stands in pieces."""
    rows = [(n, ((placed, 1.0 - i / 4),)) for i, n in enumerate(counts)]
    rows = [each for row in rows for each in (row, (1, ()))] if pieces else rows
    total = sum(n for n, _ in rows)
    with running(Step(route(rows, torch.device("cpu")), Routing(1))):
        return group.run(x[:total].clone() if total <= len(x) else x.repeat(2, 1)[:total])


def test_what_is_kept_of_an_adapter_goes_with_it() -> None:
    """However often it runs after it was let go of."""
    form, patch = Native(kernel()), patches()["low rank"]
    group = LinearGroup(0, {"m": torch.nn.Linear(IN, OUT)}, form, pack=True, head=False)
    placed = Placed(Adapter(Spec("a", "0" * 12, "", "X", {}, 0), {"m": patch}), {0: group.place({"m": patch})}, {})
    form.forget(placed)
    run(group, placed, torch.randn(2, IN))
    assert len(form._records) == 1
    del placed
    gc.collect()
    assert len(form._records) == 0


def patches() -> dict[str, Patch]:
    """Those that the tables say all of come first."""
    return {
        "low rank": Patch(A=torch.randn(2, IN), B=torch.randn(OUT, 2), gain=torch.rand(OUT)),
        "vectors": Patch(out_scale=torch.rand(OUT), bias=torch.randn(OUT)),
        "sparse": Patch(delta=sparse(OUT, IN, 9)),
        "mirror": Patch(mirror=Mirror(torch.randperm(OUT), torch.randn(OUT))),
        "a delta of torch's": Patch(delta=Circulant.of(torch.randn(1, 1, 2 * 67))),
        "shift": Patch(in_scale=torch.rand(IN)),
        "turn": Patch(turn=Turn(torch.randn(1, 5, 5))),
        "weight": Patch(weight=torch.randn(OUT, IN)),
    }


@pytest.mark.parametrize(("name", "special"), [(name, i > 3) for i, name in enumerate(patches())])
def test_who_is_looked_at_group_by_group(name: str, special: bool) -> None:
    """Whom the tables do not say all of; whoever shares tokens, or has gaps between them."""
    form, patch = Native(kernel()), patches()[name]
    out, inp = (OUT, IN) if patch.delta is None else patch.delta.dense().shape
    group = LinearGroup(0, {"m": torch.nn.Linear(inp, out)}, form, pack=True, head=False)
    adapters = [Adapter(Spec(each, "0" * 12, "", "X", {}, 0), {"m": patch}) for each in "ab"]
    one, other = ((Placed(each, {0: group.place({"m": patch})}, {}), 0.5) for each in adapters)
    alone, *others = [
        route(rows, torch.device("cpu"))
        for rows in ([(3, (one,)), (1, ())], [(2, (one, other))], [(1, (one,)), (1, ()), (1, (one,))])
    ]
    assert [s.placed for s in form.special(alone)] == special * [one[0]]
    assert all(list(form.special(routing)) == list(routing.segments) for routing in others)


def kernel() -> ctypes.CDLL:
    found = native.library()
    if found is None:
        pytest.skip("no C compiler")
    return found


@pytest.mark.parametrize("act", ["relu", "silu", "gelu", "gelu_pytorch_tanh", "tanh", "mish"])
@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=4)), ids=str)
def test_a_network_behind_a_block_is_its_formula(flags: tuple[bool, ...], act: str) -> None:
    """Whatever it reads, and how often the stream is added; an activation that C has not is left to torch."""
    parallel, joins, own, adds = flags
    down, up = torch.randn(8, OUT) / 8, torch.randn(OUT, 8) / 8
    block = Bottleneck(
        "norm", act, down, torch.randn(8), up, torch.randn(OUT), None, None, parallel, joins, own, adds=adds
    )
    module = torch.nn.Linear(IN, OUT).requires_grad_(False)
    group = LinearGroup(0, {"m": module}, Native(kernel()), pack=True, head=False)
    placed = Placed(
        Adapter(Spec("a", "0" * 12, "", "X", {}, 0), {}, blocks={"m": block}), {0: group.place_block(block)}, {}
    )
    x, r = torch.randn(37, IN), torch.randn(1, 37, OUT)
    routing = route([(2, ()), (35, ((placed, 1.0),))], torch.device("cpu"))
    with running(Step(routing, Routing(1), streams={"norm": r})):
        y = group.apart(x)[0]
    plain = module(x)
    assert torch.allclose(y[:2], plain[:2], atol=1e-5)
    assert torch.allclose(y[2:], block.apply(plain[2:], r[0, 2:]), atol=1e-4)
    assert bool(placed.groups[0].entry.done) == (act in added.ACTS)


def test_an_index_outside_the_weight_is_refused() -> None:
    """Kernels read and write where they are told: a family of somebody else's may not have looked."""
    group = LinearGroup(0, {"m": torch.nn.Linear(IN, OUT)}, Native(kernel()), pack=True, head=False)
    few = sparse(OUT, IN, 5)
    for delta in (
        Rows(torch.tensor([0, OUT]), torch.randn(2, IN), OUT),
        Rows(torch.tensor([-1]), torch.randn(1, IN), OUT),
        Sparse(few.starts, few.columns + IN, few.values, IN),
        Spectral(Sparse(few.starts, few.columns - IN, few.values, IN)),
    ):
        with pytest.raises(AdapterRefused, match="outside the weight"):
            group.place({"m": Patch(delta=delta)})


def test_a_kronecker_product_runs_as_whichever_is_less_work() -> None:
    """A small factor beside a large one of low rank is the low rank that it was."""
    form = Native(kernel())
    even = Patch(delta=Kronecker(torch.randn(16, 16), torch.randn(32, 8), None, torch.randn(8, 32)))
    uneven = Patch(delta=Kronecker(torch.randn(2, 2), torch.randn(256, 4), None, torch.randn(4, 256)))
    assert even.rank == 128
    assert form.laid(even).A is None
    assert form.laid(uneven).delta is None
    for patch in (even, uneven):
        assert patch.delta is not None
        x, laid = torch.randn(3, 512), form.laid(patch)
        want = x @ patch.delta.dense().T
        got = x @ laid.A.T @ laid.B.T if laid.A is not None and laid.B is not None else laid.delta.apply(x)
        assert torch.allclose(got, want, atol=1e-2)


def test_no_more_threads_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans outlive a change of torch's threads."""
    asked: list[int] = []
    group = LinearGroup(0, {"m": torch.nn.Linear(512, 512)}, Native(kernel()), pack=True, head=False)
    adapter = Adapter(Spec("a", "0" * 12, "", "X", {}, 0), {"m": Patch(delta=sparse(512, 512, 9))})
    placed, x = Placed(adapter, {0: group.place(adapter.patches)}, {}), torch.randn(9, 512)
    routing = route([(9, ((placed, 1.0),))], torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch.inference_mode(), running(Step(routing, Routing(1))):
        before = group.apart(x)[0]
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        panels = group.base.packed
        assert isinstance(panels, native.Panels)
        call = panels._call
        monkeypatch.setattr(panels, "_call", lambda *args: (asked.append(args[-1]), call(*args))[1])
        assert torch.equal(group.apart(x)[0], before)
    assert asked == [1]
