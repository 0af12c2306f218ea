"""What adapters do beyond low rank and vectors, by kernels, in Triton's interpreter where there is no CUDA device.

At a group against the formula, and in captured steps against PEFT alone; `captured.py` says what stands in there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import beyond
import rig
import zoo
from adapter_server.engine import capture, cpu, forms, kernels, native
from adapter_server.engine.capture import Captures
from adapter_server.engine.grouped import Grouped, GroupedSmall
from adapter_server.engine.parts import Part, Parts, weighable
from adapter_server.engine.placed import Placed
from adapter_server.engine.proof_of_parts import parts_error
from adapter_server.engine.proofs import TOLERANCE
from adapter_server.engine.routing import Routing, Step, route, running
from adapter_server.engine.site import Plan
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Patch
from adapter_server.families.deltas import Mirror, Sparse
from captured import as_on_cuda, ask, right, served, uncaptured  # noqa: F401 - a fixture
from test_site import IN, OUTS, Case, close

CPU = torch.device("cpu")
KINDS = (
    *("lora", "dora", "scale", "bias", "override", "shift", "shift_rank", "sparse", "turn", "mirror", "turn_more"),
    *("mirror_more", "delta_more", "delta_override", "spectral", "rows", "scaled"),
)


def parts_of(form: Grouped, placed: list[Placed]) -> set[Part]:
    found: set[Part] = set()
    for each in placed:
        parts = form.parts(each)
        assert parts is not None
        found |= parts
    return found


def planned(case: Case, routing: Routing, x: Tensor) -> Tensor:
    """What the group gives where its adapters are data: by the tables alone, as a captured step does."""
    form, group = case.form, case.group
    assert isinstance(form, Grouped)
    parts, listed = parts_of(form, list(case.patches)), form.listed(routing, everything=True)
    tiles, owners = form.on_device(listed), form.owners(listed, routing.tokens)
    small = GroupedSmall(form, group, tiles, frozenset())
    made = Parts(form, group, parts, tiles, owners, form.table.hidden, small)
    blind = Routing(routing.tokens, plans={group.index: Plan(small=[made])})
    with running(Step(blind, Routing(1))):
        return group.run(x)


@pytest.mark.parametrize(
    ("most", "outs"), [(1, OUTS), (1, (10,)), (20, (10,)), pytest.param(20, OUTS, marks=pytest.mark.soak)]
)
def test_any_mix_is_the_formula(outs: tuple[int, ...], most: int) -> None:
    """Whoever is alone on its tokens, with any weight."""
    case = Case(most, outs, KINDS, n=len(KINDS), form=Grouped(kernels, CPU))
    for _ in range(3):
        drawn = case.rows(most, composed=False)
        rows = [(n, tuple((placed, weight(case, placed)) for placed, _ in uses)) for n, uses in drawn]
        rows = [rows[i] for i in case.form.arrange(rows)]
        routing, x = route(rows, CPU), torch.randn(sum(n for n, _ in rows), IN)
        if routing.plain:
            continue
        each = zip(x.split([n for n, _ in rows]), rows, strict=True)
        assert close(planned(case, routing, x), torch.cat([case.formula(part, uses) for part, (_, uses) in each]))


def weight(case: Case, placed: Placed) -> float:
    return case.random.choice([1.0, 0.5, -2.0]) if weighable(placed) else 1.0


@pytest.mark.parametrize(
    ("given", "held"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
)
def test_by_dtype(given: torch.dtype, held: torch.dtype) -> None:
    """Over several programs' columns, in tiles of few tokens and of many, networks of every input among them."""
    assert parts_error(kernels, CPU, given, held) < 2 * max(TOLERANCE[given], TOLERANCE[held])


def test_what_kernels_do_not_do_is_said() -> None:
    case = Case(0, (10,), ("circulant", "rows", "kronecker_low"), n=3, form=Grouped(kernels, CPU))
    assert [case.form.parts(each) for each in case.patches] == [None, frozenset(), frozenset()]


@pytest.mark.parametrize(
    "patch",
    [
        Patch(mirror=Mirror(torch.tensor([0, 10] * 5), torch.randn(10))),
        Patch(delta=Sparse(torch.tensor([0] + [1] * 10).int(), torch.tensor([IN]).int(), torch.ones(1), IN)),
    ],
)
def test_an_index_outside_the_weight_is_refused(patch: Patch) -> None:
    case = Case(0, (10,), ("lora",), n=1, form=Grouped(kernels, CPU))
    with pytest.raises(AdapterRefused, match="outside"):
        case.group.place({"m0": patch})


KERNELLED = (
    "lora",
    "ia3",
    "ia3_saved",
    "lora_saved",
    "lora_embed",
    "lora_tokens",
    "lora_head",
    "lora_tokens_head",
    "ln_tuning",
)
MORE = ("road", "oft", "boft", "fourierft", "waveft", "shira", "lokr", "vera", "glora", "hira", "randlora")


@pytest.fixture
def fused(as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811 - the fixture
    """With the fused modules, by C's kernels: norms are among them."""
    if native.library() is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(forms, "between", lambda *_: cpu)
    monkeypatch.setattr(cpu, "Layers", None)  # as on CUDA


@pytest.mark.usefixtures("fused")
def test_every_kind_in_captured_steps_is_peft_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one batch, with prompts of several tokens and rows that end one after another; none runs without."""
    names = (*KERNELLED, *MORE)
    engine = served(names, fuse=True, max_rows=32)
    digest = engine.model.digest()
    rig.run(engine, [ask(engine, name, new=1) for name in names])  # so that no row waits for its adapter
    without = uncaptured(engine, monkeypatch)
    order = [None, *names, None, *reversed(names)]
    asked = [ask(engine, name, i % 4, 2 + i % 4, logprobs=(i % 2) * zoo.VOCAB) for i, name in enumerate(order)]
    for (i, name), answer in zip(enumerate(order), rig.run(engine, asked, stagger=1), strict=True):
        ids, logprobs = rig.peft_alone("llama", name, rig.PROMPTS[i % 4], 2 + i % 4)
        assert tuple(answer.ids) == ids, name
        if i % 2:
            assert (answer.matrix() - logprobs).abs().max().item() < 1e-4, name
    assert without == []
    assert engine.model.digest() == digest
    engine.close()


@pytest.mark.usefixtures("fused")
def test_kinds_beyond_peft_in_captured_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bottlenecks before and behind a block, beside it and behind its sum, in one batch with LoRA and the base."""
    kinds = [kind for kind, case in beyond.KINDS.items() if "llama" in case.archs]
    for kind in kinds:
        beyond.KINDS[kind].save("llama", tmp_path / kind)
    shutil.copytree(rig.saved("llama", "lora"), tmp_path / "lora")
    engine = beyond.engine("llama", tmp_path, kv_layout="pages", page_tokens=4, max_rows=32)
    names: list[str | None] = [*kinds, "lora", None]
    rig.run(engine, [beyond.ask(engine, {name: 1.0} if name else {}, (5,), max_new_tokens=1) for name in names])
    without = uncaptured(engine, monkeypatch)
    asked = [beyond.ask(engine, {name: 1.0} if name else {}, rig.PROMPTS[i % 4]) for i, name in enumerate(names)]
    for (i, name), answer in zip(enumerate(names), rig.run(engine, asked, stagger=1), strict=True):
        case, prompt = beyond.KINDS.get(name or ""), rig.PROMPTS[i % 4]
        beyond.hold(answer, case.judge("llama", prompt) if case else rig.peft_alone("llama", name, prompt))
    assert without == []
    engine.close()


@pytest.mark.usefixtures("as_on_cuda")
def test_a_part_that_nobody_has_any_more_leaves_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some steps: until then a mix that comes and goes has one graph."""
    monkeypatch.setattr(capture, "LATELY", 6)
    engine = served(("ia3", "lora"))
    assert engine.graphs is not None

    def parts() -> set[str]:
        """Of the step that was captured last."""
        *_, key = engine.graphs.captured  # type: ignore[union-attr]
        return {part.name for part in key.added.parts} if key.added else set()

    rig.run(engine, [ask(engine, "ia3", new=3)])
    assert parts() == {"in_scale"}
    rig.run(engine, [ask(engine, "lora", 1, new=3)])
    before = set(engine.graphs.captured)
    assert all(key.added.parts for key in before)
    rig.run(engine, [ask(engine, "lora", 1, new=12)])
    assert parts() == set()
    engine.close()


@pytest.mark.usefixtures("fused")
def test_weights_and_a_table_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows weighted by half, backwards and wholly, as without graphs; the table is laid out anew under graphs."""
    monkeypatch.setattr("adapter_server.engine.grouped.FEWEST", 1)
    names = ("ia3_saved", "lora_saved", "lora_embed", "lora_tokens", "road", "oft", "fourierft", "shira", "ln_tuning")
    found, weights = [], (0.5, -0.7, 1.0)
    for graphs in (True, False):
        engine = served(names, fuse=True, max_rows=32, graphs=graphs, prefix_cache_bytes=0)
        without, answers = uncaptured(engine, monkeypatch), []
        for turn in range(2):
            weighed = [(name, weights[(i + turn) % 3], rig.PROMPTS[(i + turn) % 4]) for i, name in enumerate(names)]
            asked = [rig.ask(engine, name, prompt, weight=w, max_new_tokens=3) for name, w, prompt in weighed]
            answers += rig.run(engine, asked, stagger=1)
        found.append(answers)
        assert bool(without) != graphs
        engine.close()
    for ours, theirs in zip(*found, strict=True):
        assert ours.ids == theirs.ids
        assert (ours.matrix() - theirs.matrix()).abs().max().item() < 1e-4


@pytest.mark.usefixtures("as_on_cuda")
def test_a_part_that_cannot_be_captured_leaves_the_others_their_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its adapters run without from now on, and whoever shares their steps; LoRA as before."""
    capture_, tried = Captures._capture, []

    def fails(self: Captures[Any], key: Any) -> Any:
        if key.added and key.added.parts:
            tried.append(key)
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture_(self, key)

    monkeypatch.setattr(Captures, "_capture", fails)
    engine = served(("ia3", "lora"))
    with caplog.at_level("WARNING"):
        for name in ("ia3", "lora", "ia3", None):
            assert rig.run(engine, [ask(engine, name)])[0].ids == right(name)
    assert len(tried) == 1
    assert "those with more than low ranks run without" in caplog.text
    without = uncaptured(engine, monkeypatch)
    rig.run(engine, [ask(engine, "lora"), ask(engine, None, 1)])
    assert without == []
    engine.close()
