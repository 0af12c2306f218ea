"""Each kernel against its line of torch, in Triton's interpreter where there is no CUDA device."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rig
from adapter_server.core import Spec
from adapter_server.engine import forms, proofs
from adapter_server.engine.grouped import LARGE, Grouped
from adapter_server.engine.lowrank import Banked
from adapter_server.engine.placed import Dtypes, Placed
from adapter_server.engine.routing import Routing, Step, Use, route, running
from adapter_server.engine.site import LinearGroup
from adapter_server.families.base import Adapter, Patch
from test_site import OUTS, Case, close

kernels = pytest.importorskip("adapter_server.engine.kernels", reason="Triton is not installed")
lowrank = sys.modules["adapter_server.engine.kernels.lowrank"]

CPU = torch.device("cpu")
Form = kernels.Form
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}  # of values about 1; the interpreter cuts to bfloat16
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.soak)]
KINDS = ("lora", "dora", "scale", "bias", "override", "delta_more", "mirror", "turn_more", "shift")


def grouped() -> Grouped:
    return Grouped(kernels, CPU)


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("outs", [OUTS, (10,)])
@pytest.mark.parametrize("most", [1, 20])
def test_any_mix_is_the_formula(composed: bool, outs: tuple[int, ...], most: int) -> None:
    case = Case(most, outs, KINDS, form=grouped())
    for _ in range(3):  # the table lives on from step to step
        assert close(*case.run(case.rows(most, composed)))


def test_adapters_come_and_go() -> None:
    form = grouped()
    case = Case(1, kinds=("lora",), n=5, form=form)
    for step in range(6):
        gone = case.random.choice(list(case.patches))
        form.forget(gone)
        del case.patches[gone]
        case.add(f"new{step}", "lora")
        chosen = case.random.sample(list(case.patches), 3)
        assert close(*case.run([(1, ((placed, 1.0),)) for placed in chosen])), step
    assert len(form.table.places) + len(form.table.free) <= 5


def test_who_runs_on_after_it_was_forgotten_leaves_its_row_at_the_end() -> None:
    """As a task's mix of skills does whose rows are not done: it takes a row again, of which nobody is told."""
    form = grouped()
    case = Case(1, kinds=("lora",), n=2, form=form)
    placed = next(iter(case.patches))
    for _ in range(2):
        assert close(*case.run([(1, ((placed, 1.0),))]))
        form.forget(placed)
    assert close(*case.run([(1, ((placed, 1.0),))]))
    assert (len(form.table.places), form.table.free) == (1, [])
    del case.patches[placed], placed
    gc.collect()
    assert (len(form.table.places), form.table.free) == (0, [0])
    assert close(*case.run([(1, ((next(iter(case.patches)), 1.0),))]))
    assert list(form.table.places.values()) == [0]


def test_vectors_of_who_is_alone_go_with_the_products() -> None:
    """DoRA, biases and scales need no pass of their own over y; under composition they keep it."""
    case = Case(3, kinds=("lora", "dora", "scale", "bias"), n=8, form=grouped())
    each: list[tuple[int, tuple[Use, ...]]] = [(1 + i, ((placed, 1.0),)) for i, placed in enumerate(case.patches)]
    first, dora, *_ = case.patches
    for rows, alone in ((each, True), ([*each, (2, ((first, 0.5), (dora, 2.0)))], False)):
        assert close(*case.run(rows))
        plan = case.group.plan(routed := route(rows, CPU), routed.tokens)
        assert (plan.mul is None, plan.narrow) == (alone, alone)
    assert close(*case.run([(2, ((placed, -0.5),)) for placed in case.patches]))


def test_a_long_segment_keeps_its_vectors() -> None:
    case = Case(5, kinds=("dora",), n=2, form=grouped())
    long, short = case.patches
    assert close(*case.run([(LARGE + 1, ((long, 1.0),)), (2, ((short, 1.0),))]))


def test_who_else_is_in_the_step_changes_no_bit() -> None:
    case = Case(5, kinds=("lora",), n=6, form=grouped())
    mine, *others = case.patches
    x = torch.randn(3, 12)
    alone = low_rank(case, [(3, mine)], x)
    more = [(2, others[0]), (30, others[1]), (40, mine)]  # a long row of its own adapter too
    mixed = low_rank(case, [*more, (3, mine)], torch.cat([torch.randn(72, 12), x]))
    assert torch.equal(alone, mixed[-3:])


def low_rank(case: Case, rows: list[tuple[int, Placed]], x: Tensor) -> Tensor:
    """The sum of w · B (A x) alone, of the rows in this order [T, outs]."""
    routing = route([(n, ((placed, 1.0),)) for n, placed in rows], CPU)
    [adder], large = case.form.plan(case.group, routing, routing.segments)
    assert not large
    y = torch.zeros(routing.tokens, sum(case.group.outs))
    adder.add(y, x)
    return y


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_a_base_is_added_to_in_place_and_rounded_once(dtype: torch.dtype) -> None:
    """Float32 adapters, x and y in the base's dtype: at most one unit in the last place off plain torch's float32."""
    found = []
    for form in (grouped(), Banked()):
        torch.manual_seed(0)
        modules = {f"m{i}": nn.Linear(12, out).to(dtype).requires_grad_(False) for i, out in enumerate(OUTS)}
        group = LinearGroup(0, modules, form, pack=False, head=False, dtypes=Dtypes(dtype, torch.float32))
        patches = {f"m{i}": Patch(A=torch.randn(3, 12), B=torch.randn(out, 3)) for i, out in enumerate(OUTS)}
        spec = Spec("a", "0" * 12, "", "LORA", {}, 0)
        placed = Placed(Adapter(spec, patches), {0: group.place(patches)}, {})
        routing = route([(2, ()), (3, ((placed, 0.5),))], CPU)
        with running(Step(routing, Routing(1))):
            found.append(group.run(torch.randn(5, 12).to(dtype)))
        assert routing.plans[0].narrow == isinstance(form, Grouped)
    ours, theirs = found
    assert ours.dtype == dtype
    assert torch.equal(ours[:2], theirs[:2])
    assert torch.allclose(ours.float(), theirs.float(), rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("held", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
def test_low_rank_by_dtype(given: torch.dtype, held: torch.dtype) -> None:
    """Sums over several splits, ranks in several blocks, columns in several blocks: one rounding each."""
    error = proofs.low_rank_error(kernels, CPU, given, held)
    assert error < max(TOLERANCE[given], TOLERANCE[held])


def test_which_program_has_a_block_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for programs in (lowrank.PROGRAMS, 1):
        monkeypatch.setattr(lowrank, "PROGRAMS", programs)
        found.append(proofs.low_rank_error(kernels, CPU, torch.float32, torch.float32))
    assert found[0] == found[1] < TOLERANCE[torch.float32]


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("sunk", [False, True])
def test_attention_with_every_option(window: int | None, cap: float | None, sunk: bool) -> None:
    sinks = torch.randn(4) if sunk else None
    assert proofs.attention_error(kernels, Form(0.3, cap, window, sinks), (2, 24, 16), 4, CPU, torch.float32) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "heads"), [((1, 64, 64), 8), ((3, 80, 80), 3), ((1, 192, 128), 2)])
def test_attention_by_shape_and_dtype(shape: tuple[int, int, int], heads: int, dtype: torch.dtype) -> None:
    error = proofs.attention_error(kernels, Form(shape[1] ** -0.5), shape, heads, CPU, dtype)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("more", [{}, {"cap": 5.0, "sinks": True}])
@pytest.mark.parametrize(("shape", "heads"), [((2, 16, 16), 8), ((3, 24, 20), 3)])
def test_rows_with_several_new_tokens(
    shape: tuple[int, int, int], heads: int, more: dict[str, Any], window: int | None, dtype: torch.dtype
) -> None:
    """Behind a past and without one, in one tile and in several, each token over the keys up to its own."""
    more = {**more, "sinks": torch.linspace(-1, 1, heads)} if more else more
    error = proofs.prefill_error(kernels, Form(0.3, window=window, **more), shape, heads, CPU, dtype)
    assert error < TOLERANCE[dtype]


def test_a_long_row_has_no_more_chunks_than_fit() -> None:
    """Beyond MOST_CHUNKS · CHUNK keys chunks grow; a short row beside it reads as it does alone."""
    lengths = [kernels.MOST_CHUNKS * kernels.CHUNK + 77, 3]
    assert proofs.attention_error(kernels, Form(0.3), (1, 16, 16), 1, CPU, torch.float32, lengths) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [8, 1040, 16384])
def test_norms(n: int, centred: bool, dtype: torch.dtype) -> None:
    assert proofs.norm_error(kernels, CPU, dtype, n, centred=centred) < TOLERANCE[dtype]


def test_a_norm_keeps_its_inputs_shape_and_takes_no_rows() -> None:
    x, weight = torch.randn(2, 3, 4, 16)[:, :, 1:3], torch.randn(16)
    assert close_to(kernels.rms_norm(x, weight, 1e-6), nn.functional.rms_norm(x, (16,), weight, 1e-6))
    assert kernels.rms_norm(x[:0], weight, 1e-6).shape == (0, 3, 2, 16)
    with pytest.raises(ValueError, match="wider"):
        kernels.rms_norm(torch.zeros(1, 16385), torch.zeros(16385), 1e-6)


def close_to(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=1e-6) and ours.shape == theirs.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", proofs.ACTS)
@pytest.mark.parametrize("n", [24, 1040])
def test_gates(n: int, act: str, dtype: torch.dtype) -> None:
    assert proofs.gated_error(kernels, CPU, dtype, act, n) < TOLERANCE[dtype]


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="relu2"):
        kernels.gated(torch.zeros(1, 4), "relu2")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("normed", "centred"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(4, 2, 64), (3, 3, 80), (8, 1, 96), (5, 1, 128), (2, 1, 256), (14, 2, 8)])
def test_rope_and_the_pool(shape: tuple[int, int, int], normed: bool, centred: bool, dtype: torch.dtype) -> None:
    """A group's output split, normed, turned and stored; padding is written nowhere."""
    assert proofs.rope_error(kernels, CPU, dtype, shape, normed, centred) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 4096, 9001])
def test_the_first_of_the_greatest_is_picked(vocab: int, dtype: torch.dtype) -> None:
    assert proofs.pick_error(kernels, CPU, dtype, vocab) == 0


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device, in the interpreter. That kernels are right is for the tests above, and for test_forms.py."""
    monkeypatch.setattr(forms, "usable", lambda device: True)
    monkeypatch.setattr(forms, "_agrees", lambda *_: True)


NAMES = [
    *["_shrink_few", "_expand_few"] * 3, "_shrink_many", "_expand_many", "_attend", "_prefill", "_combine",
    "_rms_norm", "_gated", "_gated", "_gated", "_rope_write", "_rope_write", "_pick", "_picked",
    *["_aim", "_narrow"] * 3, "_weigh", "_count", "_place", "_few_rows", "_few_rows", "_few_rows",
    "_own_rows", "_inputs", "_add_sparse", "_mirrored", *["_own_product", "_hidden", "_add_hidden"] * 2,
]  # fmt: skip
KERNELLED = ("lora", "dora", "prefix", "ia3", "lora_saved")


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("arch", "names", "graphs"),
    [
        ("gemma2", KERNELLED[:2], False),
        pytest.param("gemma2", KERNELLED[:3], True, marks=pytest.mark.soak),
        pytest.param("llama", KERNELLED, True, marks=pytest.mark.soak),
    ],
)
def test_the_engine_with_kernels_is_peft(arch: str, names: tuple[str, ...], graphs: bool) -> None:
    """GQA over pages, in Gemma 2 with windows and soft caps, each as PEFT alone; padded to buckets with `graphs`."""
    served = rig.engine(arch, names, kv_layout="pages", page_tokens=4, graphs=graphs)
    assert isinstance(served.model.lowrank, Grouped)
    assert served.kv.kernels is kernels
    digest = served.model.digest()
    asked = [rig.ask(served, name, rig.PROMPTS[i % 3], max_new_tokens=2) for i, name in enumerate((None, *names))]
    for i, (name, answer) in enumerate(zip((None, *names), rig.run(served, asked, timeout_s=240), strict=True)):
        ids, logprobs = rig.peft_alone(arch, name, rig.PROMPTS[i % 3], 2)
        assert tuple(answer.ids) == ids, name
        assert (answer.matrix() - logprobs).abs().max().item() < 1e-4, name
    assert served.model.digest() == digest
    served.close()


@pytest.mark.parametrize(
    ("arch", "options", "forms"),
    [
        (90, "bf16", "one"),
        *(pytest.param(*card, "each", marks=pytest.mark.soak) for card in [(90, "bf16"), (90, "fp32"), (80, "fp16")]),
    ],
)
def test_kernels_compile_for_cuda_without_a_device(arch: int, options: str, forms: str, tmp_path: Path) -> None:
    """To machine code by the compiler that Triton brings: what the interpreter takes, a GPU may not."""
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiling.py")), str(arch), options, forms],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == (NAMES if forms == "each" else list(dict.fromkeys(NAMES)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_still_to_be_added(dtype: torch.dtype) -> None:
    """What adding in place gives; where it is not live, nothing is read."""
    assert proofs.more_error(kernels, CPU, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tiling", "rows", "biased"), list(zip(kernels.TILINGS, (1, 17, 32), (False, True, True), strict=True))
)
def test_products_with_few_rows(tiling: object, rows: int, biased: bool, dtype: torch.dtype) -> None:
    assert proofs.few_rows_error(kernels, CPU, dtype, tiling, rows, biased) < TOLERANCE[dtype]


@pytest.mark.parametrize("held", [DTYPES[0], *(pytest.param(t, marks=pytest.mark.soak) for t in HALVES)], ids=str)
@pytest.mark.parametrize(("few", "apart"), [(1, False), (2, False), (1, True), (2, True), (4, True)])
def test_low_rank_in_tiles_of_any_size_and_apart(few: int, apart: bool, held: torch.dtype) -> None:
    assert proofs.low_rank_error(kernels, CPU, held, held, few, apart) < TOLERANCE[held]
