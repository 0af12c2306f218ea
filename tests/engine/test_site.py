"""A group's run against the formula, token by token: any mix of kinds, ranks, weights, counts and orders."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adapter_server.core import Spec
from adapter_server.engine import added, native
from adapter_server.engine.added import Native
from adapter_server.engine.lowrank import SMALL, Banked, LowRank, rank_class
from adapter_server.engine.placed import Placed
from adapter_server.engine.routing import Routing, Step, Use, route, running
from adapter_server.engine.site import LinearGroup
from adapter_server.families.base import Adapter, Patch
from adapter_server.families.deltas import Circulant, Kronecker, Mirror, Rows, Scaled, Sparse, Spectral, Turn

CPU = torch.device("cpu")
IN, OUTS = 12, (10, 6, 6)
KINDS = (
    *("lora", "dora", "scale", "bias", "override", "shift", "shift_rank"),
    *("sparse", "kronecker", "turn", "mirror", "turn_more", "mirror_more", "delta_more", "delta_override"),
    *("scaled", "spectral", "circulant", "rows", "kronecker_low"),
)


def few(out: int) -> Sparse:
    return Sparse.of(torch.randint(out, (9,)), torch.randint(IN, (9,)), torch.randn(9), (out, IN))


def scaled(out: int) -> Scaled:
    """Of matrices for wider modules."""
    blocks = Scaled.blocks(torch.randn(out + 70, 5))[:1]
    return Scaled(torch.randn(5, IN + 3)[:, :IN], torch.randn(5), blocks, torch.randn(out))


def other(out: int) -> Mirror:
    return Mirror(torch.randperm(out), torch.randn(out))


def patch(kind: str, out: int, rank: int) -> Patch:
    A, B = torch.randn(rank, IN), torch.randn(out, rank)
    return {
        "lora": Patch(A=A, B=B),
        "dora": Patch(A=A, B=B, gain=torch.rand(out) + 0.5),
        "scale": Patch(out_scale=torch.rand(out) + 0.5, bias=torch.randn(out)),
        "bias": Patch(A=A, B=B, bias=torch.randn(out), out_scale=torch.rand(out)),
        "override": Patch(weight=torch.randn(out, IN), bias=torch.randn(out)),
        "shift": Patch(in_scale=torch.rand(IN)),
        "shift_rank": Patch(in_scale=torch.rand(IN), A=A, B=B, gain=torch.rand(out)),
        "sparse": Patch(delta=few(out)),
        "kronecker": Patch(delta=Kronecker(torch.randn(2, 3), torch.randn(out // 2, IN // 3)), A=A, B=B),
        "kronecker_low": Patch(
            delta=Kronecker(torch.randn(2, 1), torch.randn(out // 2, 1), torch.randn(1, 3), torch.randn(1, IN // 3))
        ),
        "scaled": Patch(delta=scaled(out)),
        "spectral": Patch(delta=Spectral(few(out)), bias=torch.randn(out)),
        "circulant": Patch(delta=Circulant.of(torch.randn(out // 2, IN // 2, 2))),
        "rows": Patch(delta=Rows(torch.randperm(out)[:3], torch.randn(3, IN), out)),
        "turn": Patch(turn=Turn(torch.randn(3, 4, 4)), gain=torch.rand(out) + 0.5),
        "mirror": Patch(mirror=other(out), out_scale=torch.rand(out)),
        "turn_more": Patch(turn=Turn(torch.randn(1, 6, 6)), A=A, B=B, bias=torch.randn(out), out_scale=torch.rand(out)),
        "mirror_more": Patch(mirror=other(out), bias=torch.randn(out), A=A, B=B),
        "delta_more": Patch(delta=few(out), A=A, B=B, bias=torch.randn(out), gain=torch.rand(out)),
        "delta_override": Patch(delta=few(out), out_scale=torch.rand(out), turn=Turn(torch.randn(1, 2, 2))),
    }[kind]


class Case:
    """A group with a bias, and adapters that touch some of its members."""

    def __init__(
        self,
        seed: int,
        outs: tuple[int, ...] = OUTS,
        kinds: tuple[str, ...] = KINDS,
        n: int = 9,
        form: LowRank | None = None,
        pack: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.modules = {f"m{i}": nn.Linear(IN, out).requires_grad_(False) for i, out in enumerate(outs)}
        self.form = form or Banked()
        self.group = LinearGroup(0, self.modules, self.form, pack=pack, head=False)
        self.patches: dict[Placed, dict[str, Patch]] = {}
        for i in range(n):
            self.add(f"a{i}", kinds[i % len(kinds)])

    def add(self, name: str, kind: str) -> Placed:
        touched = [m for m in self.modules if self.random.random() < 0.8] or ["m0"]
        rank = self.random.choice([1, 3, 8, 24, 64])
        patches = {m: patch(kind, self.modules[m].out_features, rank) for m in touched}
        adapter = Adapter(Spec(name, "0" * 12, "", "LORA", {}, 0), patches)
        placed = Placed(adapter, {0: self.group.place(patches)}, {})
        self.patches[placed] = patches
        return placed

    def rows(self, most: int, composed: bool) -> list[tuple[int, tuple[Use, ...]]]:
        """Rows of 1 to `most` tokens, each with none, one or (composed) up to three adapters."""
        pool, rows = list(self.patches), []
        for _ in range(self.random.randint(1, 14)):
            chosen = self.random.sample(pool, self.random.choice([0, 1, 1, 1, 2, 3] if composed else [0, 1, 1, 1]))
            weights = [self.random.choice([1.0, 1.0, 0.5, -2.0]) if composed else 1.0 for _ in chosen]
            rows.append((self.random.randint(1, most), tuple(zip(chosen, weights, strict=True))))
        return rows

    def run(self, rows: list[tuple[int, tuple[Use, ...]]]) -> tuple[Tensor, Tensor]:
        """(what the group computes, what the formula says) for the rows in packed order."""
        rows = [rows[i] for i in self.form.arrange(rows)]
        routing = route(rows, CPU)
        x = torch.randn(routing.tokens, IN)
        with running(Step(routing, Routing(1))):
            got = self.group.run(x)
        return got, torch.cat([self.formula(part, uses) for part, (_, uses) in zip(_split(x, rows), rows, strict=True)])

    def formula(self, x: Tensor, uses: tuple[Use, ...]) -> Tensor:
        """y = y₀ + Σ wᵢ (yᵢ − y₀) per member."""
        columns = []
        for name, module in self.modules.items():
            plain = module(x)
            deltas = [w * (p.apply(x, module) - plain) for a, w in uses if (p := self.patches[a].get(name))]
            columns.append(plain + sum(deltas))
        return torch.cat(columns, 1)


def _split(x: Tensor, rows: list[tuple[int, tuple[Use, ...]]]) -> tuple[Tensor, ...]:
    return x.split([n for n, _ in rows])


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, atol=2e-4, rtol=2e-4)


def forms() -> list[Callable[[], LowRank]]:
    """Plain torch, and the kernel where this machine can build it."""
    kernel = native.library()
    return [Banked] if kernel is None else [Banked, functools.partial(Native, kernel)]


@pytest.mark.parametrize("form", forms(), ids=["banked", "native"][: len(forms())])
@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("outs", [OUTS, (10,), (8, 8, 8)])
@pytest.mark.parametrize("most", [1, 3, 3 * SMALL])
def test_any_mix_is_the_formula(form: Callable[[], LowRank], composed: bool, outs: tuple[int, ...], most: int) -> None:
    for seed in range(12):
        case = Case(seed, outs, form=form())
        for _ in range(6):  # the banks live on from step to step
            assert close(*case.run(case.rows(most, composed))), seed


@pytest.mark.parametrize("most", [1, 24, 50])
@pytest.mark.parametrize("outs", [OUTS, (10,)])
@pytest.mark.parametrize("composed", [False, True])
def test_in_the_bases_own_call_and_by_several_threads(
    monkeypatch: pytest.MonkeyPatch, composed: bool, outs: tuple[int, ...], most: int
) -> None:
    """From panels, whose columns are not the members'; tokens of several adapters are nobody's alone."""
    if (kernel := native.library()) is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(added, "SERIAL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for seed in range(6):
        case = Case(seed, outs, form=Native(kernel), pack=True, n=len(KINDS))
        for _ in range(6):
            assert close(*case.run(case.rows(most, composed))), seed


@pytest.mark.parametrize("form", forms(), ids=["banked", "native"][: len(forms())])
def test_64_adapters_at_once_are_64_steps_of_one(form: Callable[[], LowRank]) -> None:
    case = Case(0, kinds=("lora", "dora", "bias"), n=64, form=form())
    rows = [(1 + i % 3, ((placed, 1.0),)) for i, placed in enumerate(case.patches)]
    assert close(*case.run(rows))


def test_banks_follow_who_comes_and_goes() -> None:
    form = Banked()
    case = Case(1, kinds=("lora",), n=12, form=form)
    for step in range(40):
        if step % 5 == 4:
            gone = case.random.choice(list(case.patches))
            form.forget(gone)
            del case.patches[gone]
            case.add(f"new{step}", "lora")
        chosen = case.random.sample(list(case.patches), case.random.randint(1, 8))
        assert close(*case.run([(1, ((placed, 1.0),)) for placed in chosen])), step
        assert all(len(bank.slots) <= 2 * 8 for bank in form.banks.values())


def test_a_step_of_one_snapshot_skips_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, kinds=("override",), n=1)
    [placed] = case.patches
    monkeypatch.setattr(case.group, "base", None)
    routing = route([(3, ((placed, 1.0),)), (1, ((placed, 1.0),))], CPU)
    with running(Step(routing, Routing(1))):
        assert case.group.run(torch.randn(4, IN)).shape == (4, sum(OUTS))


def test_tokens_that_are_not_the_steps_are_refused() -> None:
    case = Case(3, n=1)
    [placed] = case.patches
    with running(Step(route([(3, ((placed, 1.0),))], CPU), Routing(1))), pytest.raises(RuntimeError, match="tokens"):
        case.group.run(torch.randn(5, IN))


def test_a_routing_copies_nothing_that_it_may_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits for the device: a step that is launched ahead would wait for the one before it."""
    first, second = Case(3, n=2).patches
    with monkeypatch.context() as patched:
        patched.setattr(torch, "tensor", None)
        routing = route([(2, ((first, 1.0),)), (1, ()), (1, ((second, 1.0),))], CPU)
    assert routing.use_of(CPU).tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize(("rank", "padded"), [(1, 4), (4, 4), (5, 8), (8, 8), (24, 32), (64, 64), (65, 128), (0, 0)])
def test_rank_classes(rank: int, padded: int) -> None:
    assert rank_class(rank) == padded


@pytest.mark.parametrize("form", forms(), ids=["banked", "native"][: len(forms())])
def test_an_input_that_is_a_part_of_a_wider_tensor(form: Callable[[], LowRank]) -> None:
    case = Case(4, kinds=("lora", "dora"), n=5, form=form())
    rows = [(1 + i, ((placed, 1.0),)) for i, placed in enumerate(case.patches)]
    rows = [rows[i] for i in case.form.arrange(rows)]
    routing = route(rows, CPU)
    x = torch.randn(routing.tokens, 3 * IN)[:, IN : 2 * IN]
    with running(Step(routing, Routing(1))):
        got = case.group.run(x)
    want = torch.cat([case.formula(part, uses) for part, (_, uses) in zip(_split(x, rows), rows, strict=True)])
    assert close(got, want)
