"""Sites: the modules of the base that take patches, and how a step's adapters run there.

A `Site` replaces a module's `forward` (never the module) and holds no adapter. Linears that read the same input form a
`LinearGroup` (q/k/v, gate/up, or one alone): the base once for everybody, then each primitive once for all adapters.

    y = x · Wᵀ + b                 one product for the group, all tokens
    y = y + mul ⊙ y + add          gathered vectors: DoRA, IA3, biases      (x ← in_scale ⊙ x before, IA3 feed-forward)
    y = y + w · B (A x)            low rank, `lowrank.py`; on CUDA in one pass with the vectors of who is alone
    y[segment] += w · ΔW x         sparse, spectral, Kronecker, circulant changes; mirrored outputs of the base
    y[segment] += w · (W x R − W x)  turned inputs: one product for all that turn theirs
    y[segment] = x · W'ᵀ + b'      replaced weights: saved modules, merged snapshots
    y[segment] = f(y[segment], r)  bottleneck adapters, r the residual stream, which a `Tap` has noted

On the CPU all of it but the replaced weights comes in the base's own call (`added.py`), where no tokens are shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_server.engine.lowrank import Adder, Apart, LowRank, add_large
from adapter_server.engine.modules import stream
from adapter_server.engine.placed import FLOAT32, Dtypes, GroupPatch, Placed, Product, Separate, Turned, joined_biases
from adapter_server.engine.routing import Routing, Segment, add_to, current
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import BlockPatch, Patch, linear_params
from adapter_server.families.deltas import Delta, Mirror
from adapter_server.families.quantised import is_quantised

if TYPE_CHECKING:
    from adapter_server.engine.operands import More

Part = TypeVar("Part", Delta, Mirror, Turned)
Added = tuple[Segment, slice, Tensor]  # what is added at a segment's tokens and a member's columns
FEW_TURNED = 64  # turned inputs of all members together


@dataclass(slots=True, eq=False)
class Plan:
    """What one group does in the steps of one routing."""

    whole: Product | None = None  # every token is of one adapter that replaces the weights
    in_scale: Tensor | None = None  # [uses, in]
    mul: Tensor | None = None  # [uses, outs]
    add: Tensor | None = None  # [uses, outs]
    small: Sequence[Adder] = ()
    large: Sequence[Segment] = ()
    deltas: Sequence[tuple[Segment, slice, Delta]] = ()
    mirrors: Sequence[tuple[Segment, slice, Mirror]] = ()
    turns: Sequence[tuple[Segment, Turned]] = ()
    replaced: Sequence[tuple[Segment, Product]] = ()
    blocks: Sequence[tuple[Segment, BlockPatch]] = ()
    beside: Apart | None = None  # the same as `small`, with the base's product
    narrow: bool = field(init=False)  # nothing is added but what needs no wider x and y than the base's

    def __post_init__(self) -> None:
        others = (self.in_scale, self.mul, self.add)
        more = (self.large, self.deltas, self.mirrors, self.turns, self.replaced, self.blocks)
        alone = all(v is None for v in others) and not any(more)
        self.narrow = alone and all(small.narrow for small in self.small)


class LinearGroup:
    """Linears that read the same input. `columns[m]` is where member m's outputs stand in the group's [T, outs]."""

    def __init__(
        self,
        index: int,
        modules: Mapping[str, nn.Module],
        lowrank: LowRank,
        pack: bool,
        head: bool,
        dtypes: Dtypes = FLOAT32,
    ) -> None:
        self.index, self.lowrank, self.pack, self.head = index, lowrank, pack, head
        self.base_dtype, self.dtype = dtypes.base, dtypes.adapters
        self.paths = tuple(modules)
        params = [linear_params(module) for module in modules.values()]
        self.outs = tuple(weight.shape[0] for weight, _ in params)
        lowrank.meet(index, len(self.outs))
        self.inp, self.device = params[0][0].shape[1], params[0][0].device
        ends = torch.tensor(self.outs).cumsum(0).tolist()
        self.columns = tuple(slice(end - out, end) for end, out in zip(ends, self.outs, strict=True))
        self.runs = _runs_alike(self.outs)
        self.biases = tuple(bias for _, bias in params)
        self.base: Product | Separate
        if any(is_quantised(module) for module in modules.values()):
            self.base = Separate(list(modules.values()))
        else:
            self.base = Product(*_joined(modules, params), pack=pack)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        for m, module in enumerate(modules.values()):
            module.forward = self._site(m)

    def _site(self, m: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return self.forward(m, x)

        return forward

    def forward(self, m: int, x: Tensor) -> Tensor:
        """Member m's output. The first member called computes all; the others take theirs by the input's identity."""
        if self._input is x and (kept := self._outputs[m]) is not None:
            self._outputs[m] = None
            if not any(y is not None for y in self._outputs):
                self._input = None
            return kept
        y = self.run(x.reshape(-1, self.inp)).view(*x.shape[:-1], -1)
        if len(self.outs) == 1:
            return y
        outputs = [y[..., columns] for columns in self.columns]
        self._input, self._outputs = x, [*outputs[:m], None, *outputs[m + 1 :]]
        return outputs[m]

    def run(self, x: Tensor) -> Tensor:
        """x [T, in] → y [T, outs] for all tokens of the step."""
        routing = self._routing()
        if routing is None or routing.plain:
            return self.base(x)
        plan = self.planned(routing, x.shape[0])
        if plan.beside is not None and plan.beside.whole:
            return plan.beside.run(self.base, x.contiguous(), sum(self.outs))[0]
        return plan.whole(x) if plan.whole else self._mixed(x.contiguous(), plan, routing)

    def apart(self, x: Tensor) -> tuple[Tensor, More | None]:
        """As `run`; but what adapters add may come apart from y, for whoever reads y to add."""
        routing = self._routing()
        beside = None if routing is None or routing.plain else self.planned(routing, x.shape[0]).beside
        return (self.run(x), None) if beside is None else beside.run(self.base, x.contiguous(), sum(self.outs))

    def _routing(self) -> Routing | None:
        step = current()
        return None if step is None else step.head if self.head else step.routing

    def planned(self, routing: Routing, tokens: int) -> Plan:
        """The plan under a routing, made when it is first asked for."""
        plan: Plan | None = routing.plans.get(self.index)
        if plan is None:
            plan = routing.plans[self.index] = self.plan(routing, tokens)
        return plan

    def _mixed(self, x: Tensor, plan: Plan, routing: Routing) -> Tensor:
        if plan.narrow:
            y = self._base(plan, x)
            for small in plan.small:
                small.add(y, x)
            return y.to(x.dtype)
        narrow, x = x, x.to(self.dtype)
        read = narrow if plan.in_scale is None else (x * routing.by_token(plan.in_scale)).to(narrow.dtype)
        y = self._base(plan, read).to(self.dtype)
        plain = self.base(narrow).to(self.dtype) if routing.composed and plan.in_scale is not None else y
        added: list[Added] = [(s, at, mirror.apply(plain[s.tokens, at])) for s, at, mirror in plan.mirrors]
        added += [(s, at, delta.apply(x[s.tokens])) for s, at, delta in plan.deltas]
        added += self._turned(x, plain, plan.turns) if plan.turns else []
        after = [(segment, _after_block(plain, stream(block.reads), segment, block)) for segment, block in plan.blocks]
        if plan.mul is not None:
            y.addcmul_(plain, routing.by_token(plan.mul))
        if plan.add is not None:
            y.add_(routing.by_token(plan.add))
        for small in plan.small:
            small.add(y, x)
        for segment in plan.large:
            add_large(y, x, segment, self)
        for segment, columns, part in added:
            add_to(y[:, columns], segment, part if segment.weights is None else part * segment.weights)
        for segment, product in plan.replaced:
            self._replace(y, narrow, segment, product)
        for segment, delta in after:
            add_to(y, segment, delta)
        return y.to(narrow.dtype)

    def _base(self, plan: Plan, x: Tensor) -> Tensor:
        return plan.small[0].base(self.base, x) if plan.small else self.base(x)

    def _turned(self, x: Tensor, plain: Tensor, turns: Sequence[tuple[Segment, Turned]]) -> list[Added]:
        """What turned inputs change: W (x R) − W x. A few go through the group's own product, each for one member's
        columns, which costs less than a product of the member's; many do not.
        """
        moved = [turned.turn.apply(x[segment.tokens]).to(self.base_dtype) for segment, turned in turns]
        if len(self.outs) == 1 or sum(map(len, moved)) <= FEW_TURNED:
            products = torch.split(self.base(torch.cat(moved)), [len(part) for part in moved])
            outputs = [y[:, self.columns[t.member]] for y, (_, t) in zip(products, turns, strict=True)]
        else:
            outputs = [self.of_member(part, t.member) for part, (_, t) in zip(moved, turns, strict=True)]
        added: list[Added] = []
        for (segment, turned), y in zip(turns, outputs, strict=True):
            columns = self.columns[turned.member]
            part = y.to(self.dtype) - plain[segment.tokens, columns]
            added.append((segment, columns, part if turned.scale is None else part * turned.scale))
        return added

    def of_member(self, x: Tensor, member: int) -> Tensor:
        """x [T, in] → a member's own product [T, out]."""
        columns, bias = self.columns[member], self.base.bias
        return F.linear(x, self.base.weight[columns], None if bias is None else bias[columns])

    def _replace(self, y: Tensor, x: Tensor, segment: Segment, product: Product) -> None:
        part = product(x[segment.tokens])
        if segment.alone:
            y[segment.tokens] = part.to(y.dtype)
            return
        delta = (part - self.base(x[segment.tokens])).to(y.dtype)
        delta = delta if segment.weights is None else delta * segment.weights
        add_to(y, segment, delta)

    def plan(self, routing: Routing, tokens: int) -> Plan:
        """How this group runs under a routing; made once, kept while the routing is. O(adapters of the step), but of
        those alone that are special to the form in which low ranks run.
        """
        if tokens != routing.tokens:
            raise RuntimeError(f"{self.paths[0]} saw {tokens} tokens where the step has {routing.tokens}")
        here = [(s, patch) for s in self.lowrank.special(routing) if (patch := s.placed.groups.get(self.index))]
        replaced = [(s, patch.product) for s, patch in here if patch.product is not None]
        if len(replaced) == 1 and replaced[0][0].count == routing.tokens and replaced[0][0].alone:
            return Plan(whole=replaced[0][1])
        small, large = self.lowrank.plan(self, routing, [s for s, _ in here])
        plan = self._special(routing, here, small, large) if here else Plan(small=small)
        if plan.narrow and len(small) == 1:
            plan.beside = small[0].beside(routing)
        return plan

    def _special(
        self,
        routing: Routing,
        here: Sequence[tuple[Segment, GroupPatch]],
        small: Sequence[Adder],
        large: Sequence[Segment],
    ) -> Plan:
        """With what special segments do beyond `small`."""
        done = frozenset[Placed]().union(*(adder.vectors for adder in small))
        scaled = frozenset[Placed]().union(*(adder.scaled for adder in small))
        run = frozenset[int]().union(*(adder.done for adder in small))
        return Plan(
            in_scale=None if (shift := self._vectors(routing, here, "shift", scaled)) is None else shift + 1,
            mul=self._vectors(routing, here, "mul", done),
            add=self._vectors(routing, here, "add", done),
            small=small,
            large=large,
            deltas=[(s, *delta) for s, patch in here for delta in patch.deltas if id(delta[1]) not in run],
            mirrors=[(s, *mirror) for s, patch in here for mirror in patch.mirrors if id(mirror[1]) not in run],
            turns=[(s, turned) for s, patch in here for turned in patch.turns if id(turned) not in run],
            replaced=[(s, patch.product) for s, patch in here if patch.product is not None],
            blocks=[(s, patch.block) for s, patch in here if patch.block and id(patch.block) not in run],
        )

    def span(self, run: range) -> slice:
        """Where the outputs of neighbouring members stand."""
        return slice(self.columns[run.start].start, self.columns[run.stop - 1].stop)

    def _vectors(
        self, routing: Routing, here: Sequence[tuple[Segment, GroupPatch]], name: str, done: frozenset[Placed]
    ) -> Tensor | None:
        """[uses, width]: Σ wᵢ vᵢ for each distinct set of adapters but those `done`; None where none has one."""
        mine = {s.placed for s, patch in here if getattr(patch, name) is not None} - done
        if not mine:
            return None
        left = [[(p, w) for p, w in uses if p in mine] for uses in routing.uses]
        rows = [[(getattr(p.groups.get(self.index), name, None), w) for p, w in uses] for uses in left]
        return self._stacked(rows, self.inp if name == "shift" else sum(self.outs))

    def _stacked(self, rows: list[list[tuple[Tensor | None, float]]], width: int) -> Tensor | None:
        if not any(v is not None for row in rows for v, _ in row):
            return None
        out = torch.zeros(len(rows), width, dtype=self.dtype, device=self.device)
        for i, row in enumerate(rows):
            for v, w in row:
                if v is not None:
                    out[i].add_(v, alpha=w)
        return out

    def place(self, patches: Mapping[str, Patch]) -> GroupPatch:
        """Lay an adapter's patches at this group's sites out for the run. Called on a loader's thread."""
        mine = [None if (p := patches.get(path)) is None else self.lowrank.laid(p) for path in self.paths]
        if any(p is not None and self._is_override(p) for p in mine):
            return self.lowrank.prepared(
                GroupPatch(pairs=(None,) * len(mine), product=self._override(mine)), self.columns
            )
        A, pairs = self._low_rank(mine)
        members = [(at, p) for at, p in zip(self.columns, mine, strict=True) if p is not None]
        made = GroupPatch(
            A=A,
            pairs=pairs,
            mul=self._joined_vectors([None if p is None else _mul(p) for p in mine]),
            add=self._joined_vectors(
                [None if p is None else self._add(b, p) for b, p in zip(self.biases, mine, strict=True)]
            ),
            shift=next((self._cast(p.in_scale - 1) for p in mine if p and p.in_scale is not None), None),
            deltas=tuple((at, self._moved(p.delta)) for at, p in members if p.delta is not None),
            mirrors=tuple((at, self._moved(p.mirror)) for at, p in members if p.mirror is not None),
            turns=tuple(
                self._moved(Turned(m, p.turn, _scale(p))) for m, p in enumerate(mine) if p and p.turn is not None
            ),
        )
        return self.lowrank.prepared(made, self.columns)

    def place_block(self, block: BlockPatch) -> GroupPatch:
        """The same for a block's patch, which needs the group's output for itself. Raises AdapterRefused."""
        if len(self.paths) > 1:
            raise AdapterRefused(f"{self.paths[0]} is no block's last Linear: it shares its input with others")
        made = GroupPatch(pairs=(None,), block=block.to(self.device, self.dtype))
        return self.lowrank.prepared(made, self.columns)

    @property
    def folded_bytes(self) -> int:
        """Of a snapshot's weights here."""
        packed = isinstance(self.base, Product) and self.base.packed is not None
        return sum(self.outs) * self.inp * self.base_dtype.itemsize * (2 if packed else 1)

    def _moved(self, part: Part) -> Part:
        return part.to(self.device, self.dtype)

    def _is_override(self, patch: Patch) -> bool:
        """Replaced weights, and what only acts alone where it stands beside more: folded into weights of their own."""
        if patch.weight is not None or (patch.turn is not None and isinstance(self.base, Separate)):
            return True
        inner = [v is not None for v in (patch.A, patch.delta, patch.gain, patch.turn)]
        outer = [v is not None for v in (patch.out_scale, patch.mirror)]
        return (
            (patch.in_scale is not None and (len(self.paths) > 1 or any(inner) or any(outer)))
            or (patch.mirror is not None and any(inner))
            or (patch.delta is not None and any(outer))
        )

    def _override(self, mine: Sequence[Patch | None]) -> Product:
        weights, biases = [], []
        weight, bias = self.base.weight, self.base.bias
        for columns, patch in zip(self.columns, mine, strict=True):
            params = {"weight": weight[columns].float()}
            if bias is not None:
                params["bias"] = bias[columns].float()
            params = params if patch is None else patch.fold(params)
            weights.append(params["weight"])
            biases.append(params.get("bias"))
        joined = joined_biases(biases, weights)
        joined = None if joined is None else joined.to(self.device, self.base_dtype)
        few = self.base.few if isinstance(self.base, Product) else None
        return Product(torch.cat(weights).to(self.device, self.base_dtype), joined, self.pack, few)

    def _low_rank(self, mine: Sequence[Patch | None]) -> tuple[Tensor | None, tuple[tuple[Tensor, Tensor] | None, ...]]:
        """A [Σ r, in] of all members, and per member (its rows of A, Bt [r, out])."""
        factors = [None if p is None else _factors(p) for p in mine]
        dtype = self._held(factors)
        parts = [self._cast(pair[0], dtype) for pair in factors if pair is not None]
        if not parts:
            return None, (None,) * len(mine)
        A, at = torch.cat(parts), 0
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for pair in factors:
            if pair is None:
                pairs.append(None)
                continue
            Bt = self._cast(pair[1], dtype).T.clone(memory_format=torch.contiguous_format)  # of B's view, nothing else
            rank = pair[0].shape[0]  # a tensor's len takes ten times as long
            pairs.append((A[at : at + rank], Bt))
            at += rank
        return A, tuple(pairs)

    def _held(self, factors: Sequence[tuple[Tensor, Tensor] | None]) -> torch.dtype:
        """The format of a group's factors: their own, where that is one and the form reads it."""
        given = {t.dtype for pair in factors if pair is not None for t in pair}
        return given.pop() if len(given) == 1 and given <= self.lowrank.keeps else self.dtype

    def _add(self, base_bias: Tensor | None, patch: Patch) -> Tensor | None:
        """y = out_scale (gain W x + … + b + bias) = (1 + mul) (W x + b) + … + add."""
        b = None if base_bias is None else base_bias.float().cpu()
        bias = patch.bias
        if patch.gain is not None and b is not None:
            bias = (0 if bias is None else bias) + b * (1 - patch.gain)
        return None if bias is None else patch.out(bias)

    def _joined_vectors(self, vectors: Sequence[Tensor | None]) -> Tensor | None:
        if all(v is None for v in vectors):
            return None
        each = [torch.zeros(out) if v is None else v for v, out in zip(vectors, self.outs, strict=True)]
        return self._cast(torch.cat(each))

    def _cast(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """On the device first, whose conversion is the faster one; who lays out waits for the copies at the end."""
        dtype = dtype or self.dtype
        if t.dtype != dtype or t.device != self.device:
            t = t.to(self.device, non_blocking=True).to(dtype)
        return t.contiguous()


def _after_block(y: Tensor, r: Tensor, segment: Segment, block: BlockPatch) -> Tensor:
    """w (y' − y) of a segment's tokens. y is the base's own, r [1, T, hidden] the stream."""
    r = r.reshape(y.shape).to(y.dtype)
    part = y[segment.tokens]
    delta = block.apply(part, r[segment.tokens]) - part
    return delta if segment.weights is None else delta * segment.weights


def group_by_input(calls: Sequence[tuple[str, int]]) -> list[list[str]]:
    """Paths that were called with the same input object, in order. `calls` are (path, identity of the input)."""
    groups: dict[int, list[str]] = {}
    for path, identity in calls:
        groups.setdefault(identity, []).append(path)
    return list(groups.values())


def _joined(
    modules: Mapping[str, nn.Module], params: Sequence[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """The members' weights as one [outs, in]; the modules' own become views of it, so that nothing is held twice."""
    if len(params) == 1:
        return params[0]
    weight = torch.cat([w for w, _ in params]).detach()
    at = 0
    for module, (w, _) in zip(modules.values(), params, strict=True):
        module.get_parameter("weight").data = weight[at : at + len(w)]
        at += len(w)
    return weight, joined_biases([b for _, b in params], [w for w, _ in params])


def _runs_alike(outs: Sequence[int]) -> list[range]:
    """Neighbouring members of one output width: (8, 4, 4) → 0..0, 1..2."""
    starts = [m for m in range(len(outs)) if m == 0 or outs[m] != outs[m - 1]]
    return [range(a, b) for a, b in itertools.pairwise([*starts, len(outs)])]


def _factors(patch: Patch) -> tuple[Tensor, Tensor] | None:
    """A and B, what multiplies the outputs in B."""
    if patch.A is None or patch.B is None:
        return None
    B = patch.B if patch.out_scale is None else patch.B * patch.out_scale.to(patch.B.device)[:, None]
    return patch.A, B


def _scale(patch: Patch) -> Tensor | None:
    """What multiplies the base's product."""
    scales = [s for s in (patch.gain, patch.out_scale) if s is not None]
    return torch.stack(scales).prod(0) if scales else None


def _mul(patch: Patch) -> Tensor | None:
    scale = _scale(patch)
    return None if scale is None else scale - 1
