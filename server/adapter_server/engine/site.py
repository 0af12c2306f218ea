"""Sites: the modules of the base that take patches, and how a step's adapters run there.

A `Site` replaces a module's `forward` (never the module) and holds no adapter. Linears that read the same input form a
`LinearGroup` (q/k/v, gate/up, or one alone): the base once for everybody, then each primitive once for all adapters.

    y = x · Wᵀ + b                 one product for the group, all tokens
    y = y + mul ⊙ y + add          gathered vectors: DoRA, IA3, biases      (x ← in_scale ⊙ x before, IA3 feed-forward)
    y = y + w · B (A x)            low rank, `lowrank.py`
    y[segment] += w · ΔW x         sparse, spectral, Kronecker, circulant changes; mirrored outputs of the base
    y[segment] += w · W (x R − x)  turned inputs: one product for all that turn theirs
    y[segment] = x · W'ᵀ + b'      replaced weights: saved modules, merged snapshots
    y[segment] = f(y[segment], r)  bottleneck adapters, r the residual stream, which a `Tap` has noted
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_server.engine.lowrank import Adder, LowRank, add_large
from adapter_server.engine.routing import Routing, Segment, Use, add_to, current
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, AnyPatch, BlockPatch, GatedPrompt, ParamPatch, Patch, linear_params
from adapter_server.families.deltas import Delta, Mirror, TensorFields, Turn
from adapter_server.families.quantised import is_quantised

if TYPE_CHECKING:
    from adapter_server.engine.tree import Tree

Part = TypeVar("Part", Delta, Mirror, "Turned")


@dataclass(frozen=True, slots=True)
class Dtypes:
    """What the base computes in, and what adapters are held and added in, before one rounding to the base's.

    PEFT's rule (`autocast_adapter_dtype`): adapters in float32 over a base in fewer bits.
    """

    base: torch.dtype
    adapters: torch.dtype


class Product:
    """y = x Wᵀ + b in the fastest form at hand: on the CPU in float32, oneDNN's packed weights beside the plain ones.

    A single token takes the plain form: a matrix-vector product gains nothing from packing.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, pack: bool) -> None:
        self.weight, self.bias = weight, bias
        can = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if pack and can else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] → y [T, out], a new tensor."""
        if self.packed is None or x.shape[0] == 1:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    @property
    def bytes(self) -> int:
        own = self.weight.numel() * self.weight.element_size()
        return own * (1 if self.packed is None else 2) + (0 if self.bias is None else self.bias.nbytes)


class Separate:
    """A quantised group's base: each member's own product, side by side. Its weights are read where one is replaced."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._forwards = tuple(module.forward for module in modules)  # before they become sites

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] → y [T, outs], a new tensor."""
        return torch.cat([forward(x) for forward in self._forwards], -1)

    @property
    def weight(self) -> Tensor:
        return torch.cat([linear_params(module)[0] for module in self._modules])

    @property
    def bias(self) -> Tensor | None:
        params = [linear_params(module) for module in self._modules]
        return _joined_biases([b for _, b in params], [w for w, _ in params])


@dataclass(frozen=True, slots=True, eq=False)
class Turned(TensorFields):
    """One member's turned input, and what scales its outputs."""

    member: int
    turn: Turn
    scale: Tensor | None = None  # [out]


@dataclass(frozen=True, eq=False)
class GroupPatch:
    """An adapter's patches at one group, laid out for the run.

    A [Σ r, in] of all members; `pairs` per member: its rows of A [r, in] and Bt [r, out], or None.
    """

    A: Tensor | None = None
    pairs: tuple[tuple[Tensor, Tensor] | None, ...] = ()
    mul: Tensor | None = None  # [outs], times the base's output
    add: Tensor | None = None  # [outs]
    shift: Tensor | None = None  # [in], in_scale − 1: x + shift ⊙ x
    deltas: tuple[tuple[slice, Delta], ...] = ()  # each at a member's columns
    mirrors: tuple[tuple[slice, Mirror], ...] = ()
    turns: tuple[Turned, ...] = ()
    product: Product | None = None  # replaces the base's, and all the above
    block: BlockPatch | None = None  # alone

    @functools.cached_property
    def addresses(self) -> tuple[int, ...]:
        """A and R, and per member Bt and its rank, as `lowrank.c` takes them; 0 for none."""
        pairs = [(0, 0) if pair is None else (pair[1].data_ptr(), pair[1].shape[0]) for pair in self.pairs]
        A = (0, 0) if self.A is None else (self.A.data_ptr(), self.A.shape[0])
        return (*A, *(value for pair in pairs for value in pair))

    @functools.cached_property
    def numbers(self) -> int:
        """In A and all Bt: the multiplications of one token."""
        return sum(t.numel() for t in (self.A, *(pair[1] for pair in self.pairs if pair)) if t is not None)

    @property
    def bytes(self) -> int:
        vectors = [self.A, self.mul, self.add, self.shift, *(pair[1] for pair in self.pairs if pair)]
        for _, delta in self.deltas:
            vectors += delta.tensors()
        for part in (*(mirror for _, mirror in self.mirrors), *self.turns):
            vectors += part.tensors()
        vectors += self.block.tensors() if self.block else ()
        return sum(t.nbytes for t in vectors if t is not None) + (self.product.bytes if self.product else 0)


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """An adapter laid out on the device: per group, per other module, and what stands before its rows' prompts."""

    adapter: Adapter
    groups: Mapping[int, GroupPatch]
    others: Mapping[str, AnyPatch]
    prefixes: dict[int | None, Prefix] = field(default_factory=dict)  # by task id
    gated: Mapping[int, GatedPrompt] = field(default_factory=dict)  # by layer
    tasks: dict[int, Placed] = field(default_factory=dict)  # what skills are for a task, the last used at the end
    tree: Tree | None = None  # what PEFT runs, in its own lane

    @property
    def rank(self) -> int:
        ranks = (pair[0].shape[0] for patch in self.groups.values() for pair in patch.pairs if pair)
        return max(ranks, default=0)

    @property
    def acts(self) -> bool:
        """Whether it changes what a token meets on its way, rather than what stands before it alone."""
        return bool(self.groups or self.others or self.gated)

    @property
    def replaces(self) -> bool:
        """Whether it has weights of its own wherever it touches a Linear, as a snapshot does."""
        return bool(self.groups) and all(patch.product is not None for patch in self.groups.values())

    @property
    def bytes(self) -> int:
        others = sum(t.nbytes for patch in self.others.values() for t in patch.tensors())
        others += sum(t.nbytes for prompt in self.gated.values() for t in prompt.tensors())
        before = sum(t.nbytes for t in (self.adapter.embeds, *self.adapter.tasks) if t is not None)
        kept = sum(k.nbytes + v.nbytes for prefix in self.prefixes.values() for k, v in prefix.layers)
        mixed = sum(placed.bytes for placed in self.tasks.values()) + (self.tree.bytes if self.tree else 0)
        return sum(patch.bytes for patch in self.groups.values()) + others + before + kept + mixed


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values that exist before the prompt: per layer K, V [n, kv_heads, dim], at positions 0..n-1."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    shifts: bool = True  # whether real tokens' positions begin at n, or at 0 beside it

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[0]


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
    turns: Mapping[int, Sequence[tuple[Segment, Turned]]] = field(default_factory=dict)  # by member
    replaced: Sequence[tuple[Segment, Product]] = ()
    blocks: Sequence[tuple[Segment, BlockPatch]] = ()


class LinearGroup:
    """Linears that read the same input. `columns[m]` is where member m's outputs stand in the group's [T, outs]."""

    def __init__(
        self,
        index: int,
        modules: Mapping[str, nn.Module],
        lowrank: LowRank,
        pack: bool,
        head: bool,
        dtypes: Dtypes = Dtypes(torch.float32, torch.float32),
    ) -> None:
        self.index, self.lowrank, self.pack, self.head = index, lowrank, pack, head
        self.base_dtype, self.dtype = dtypes.base, dtypes.adapters
        self.paths = tuple(modules)
        params = [linear_params(module) for module in modules.values()]
        self.outs = tuple(weight.shape[0] for weight, _ in params)
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
        step = current()
        routing = None if step is None else step.head if self.head else step.routing
        if routing is None or routing.plain:
            return self.base(x)
        plan = routing.plans.get(self.index)
        if plan is None:
            plan = routing.plans[self.index] = self.plan(routing, x.shape[0])
        return plan.whole(x) if plan.whole else self._mixed(x.contiguous(), plan, routing)

    def _mixed(self, x: Tensor, plan: Plan, routing: Routing) -> Tensor:
        narrow, x = x, x.to(self.dtype)
        y = self.base(narrow if plan.in_scale is None else (x * routing.by_token(plan.in_scale)).to(narrow.dtype))
        y = y.to(self.dtype)
        plain = self.base(narrow).to(self.dtype) if routing.composed and plan.in_scale is not None else y
        added = [(s, at, mirror.apply(plain[s.tokens, at])) for s, at, mirror in plan.mirrors]
        added += [(s, at, delta.apply(x[s.tokens])) for s, at, delta in plan.deltas]
        after = [(segment, _after_block(plain, _stream(block.reads), segment, block)) for segment, block in plan.blocks]
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
        for member, turns in plan.turns.items():
            self._turn(y[:, self.columns[member]], x, self.base.weight[self.columns[member]], turns)
        for segment, product in plan.replaced:
            self._replace(y, narrow, segment, product)
        for segment, delta in after:
            add_to(y, segment, delta)
        return y.to(narrow.dtype)

    def _turn(self, y: Tensor, x: Tensor, W: Tensor, turns: Sequence[tuple[Segment, Turned]]) -> None:
        """One product with the member's weight for all adapters that turn its input."""
        each = [(s, t, x[s.tokens]) for s, t in turns]
        moved = F.linear(torch.cat([t.turn.apply(part) - part for _, t, part in each]).to(W.dtype), W).to(y.dtype)
        for (segment, turned, _), part in zip(each, torch.split(moved, [s.count for s, *_ in each]), strict=True):
            part = part if turned.scale is None else part * turned.scale
            add_to(y, segment, part if segment.weights is None else part * segment.weights)

    def _replace(self, y: Tensor, x: Tensor, segment: Segment, product: Product) -> None:
        part = product(x[segment.tokens])
        if _is_alone(segment):
            y[segment.tokens] = part.to(y.dtype)
            return
        delta = (part - self.base(x[segment.tokens])).to(y.dtype)
        delta = delta if segment.weights is None else delta * segment.weights
        add_to(y, segment, delta)

    def plan(self, routing: Routing, tokens: int) -> Plan:
        """How this group runs under a routing. O(adapters of the step); made once, kept while the routing is."""
        if tokens != routing.tokens:
            raise RuntimeError(f"{self.paths[0]} saw {tokens} tokens where the step has {routing.tokens}")
        here = [(s, patch) for s in routing.segments if (patch := s.placed.groups.get(self.index))]
        replaced = [(s, patch.product) for s, patch in here if patch.product is not None]
        if len(replaced) == 1 and replaced[0][0].count == routing.tokens and _is_alone(replaced[0][0]):
            return Plan(whole=replaced[0][1])
        small, large = self.lowrank.plan(self, routing, [s for s, patch in here if patch.A is not None])
        return Plan(
            in_scale=None if (shift := self._vectors(routing, "shift")) is None else shift + 1,
            mul=self._vectors(routing, "mul"),
            add=self._vectors(routing, "add"),
            small=small,
            large=large,
            deltas=[(s, *delta) for s, patch in here for delta in patch.deltas],
            mirrors=[(s, *mirror) for s, patch in here for mirror in patch.mirrors],
            turns=self._turns(here),
            replaced=replaced,
            blocks=[(s, patch.block) for s, patch in here if patch.block is not None],
        )

    def _turns(self, here: Sequence[tuple[Segment, GroupPatch]]) -> dict[int, list[tuple[Segment, Turned]]]:
        found: dict[int, list[tuple[Segment, Turned]]] = {}
        for segment, patch in here:
            for turned in patch.turns:
                found.setdefault(turned.member, []).append((segment, turned))
        return found

    def span(self, run: range) -> slice:
        """Where the outputs of neighbouring members stand."""
        return slice(self.columns[run.start].start, self.columns[run.stop - 1].stop)

    def _vectors(self, routing: Routing, name: str) -> Tensor | None:
        """[uses, width]: Σ wᵢ vᵢ for each distinct set of adapters; None where no adapter of the step has one."""
        rows = [[(getattr(p.groups.get(self.index), name, None), w) for p, w in uses] for uses in routing.uses]
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
        mine = [patches.get(path) for path in self.paths]
        if any(p is not None and self._is_override(p) for p in mine):
            return GroupPatch(pairs=(None,) * len(mine), product=self._override(mine))
        A, pairs = self._low_rank(mine)
        members = [(at, p) for at, p in zip(self.columns, mine, strict=True) if p is not None]
        return GroupPatch(
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

    def place_block(self, block: BlockPatch) -> GroupPatch:
        """The same for a block's patch, which needs the group's output for itself. Raises AdapterRefused."""
        if len(self.paths) > 1:
            raise AdapterRefused(f"{self.paths[0]} is no block's last Linear: it shares its input with others")
        return GroupPatch(pairs=(None,), block=block.to(self.device, self.dtype))

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
        joined = _joined_biases(biases, weights)
        joined = None if joined is None else joined.to(self.device, self.base_dtype)
        return Product(torch.cat(weights).to(self.device, self.base_dtype), joined, self.pack)

    def _low_rank(self, mine: Sequence[Patch | None]) -> tuple[Tensor | None, tuple[tuple[Tensor, Tensor] | None, ...]]:
        """A [Σ r, in] of all members, and per member (its rows of A, Bt [r, out])."""
        parts = [p.A for p in mine if p is not None and p.A is not None]
        if not parts:
            return None, (None,) * len(mine)
        A, at = torch.cat([self._cast(part) for part in parts]), 0
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for p in mine:
            if p is None or p.A is None or p.B is None:
                pairs.append(None)
                continue
            B = p.B if p.out_scale is None else p.B * p.out_scale[:, None]
            pairs.append((A[at : at + p.rank], self._cast(B).T.contiguous()))
            at += p.rank
        return A, tuple(pairs)

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

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype).contiguous()


class ModuleSite:
    """A module that is no Linear (embedding, norm, experts): its own forward for everybody, patched segments over it.

    `axis` is the tokens' in its input and output: norms of single heads see [1, heads, T, dim] in some models.
    """

    def __init__(self, path: str, module: nn.Module, axis: int) -> None:
        self.path, self.module, self.axis = path, module, axis
        self.base = module.forward
        module.forward = self.forward

    def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        step, more = current(), (*args, *kwargs.values())
        if step is None or step.routing.plain:
            plain: Tensor | tuple[Tensor, ...] = self.base(x, *args, **kwargs)
            return plain
        routing = step.routing
        here = [(s, patch) for s in routing.segments if (patch := s.placed.others.get(self.path))]
        if len(here) == 1 and here[0][0].count == routing.tokens and _is_alone(here[0][0]):
            return here[0][1].apply(x, self.module, *more)
        y: Tensor | tuple[Tensor, ...] = self.base(x, *args, **kwargs)
        if not here:
            return y
        return self._routed(x, y, routing) if isinstance(y, tuple) else self._patched(x, y, here, more)

    def _patched(self, x: Tensor, y: Tensor, here: list[tuple[Segment, AnyPatch]], more: tuple[Tensor, ...]) -> Tensor:
        out = y.clone()
        xs, ys, outs = (self._by_token(t) for t in (x, y, out))
        for segment, patch in here:
            rest = (self._by_token(t)[segment.tokens] for t in more)
            delta = patch.apply(xs[segment.tokens], self.module, *rest) - ys[segment.tokens]
            if segment.weights is not None:
                delta = delta * segment.weights.view(-1, *[1] * (delta.dim() - 1))
            add_to(outs, segment, delta)
        return out

    def _routed(self, x: Tensor, y: tuple[Tensor, ...], routing: Routing) -> tuple[Tensor, ...]:
        """A router's outputs [T, …] are choices, which no sum of differences mixes: its parameters are mixed."""
        xs, outs = self._by_token(x), tuple(t.clone() for t in y)
        for i, uses in enumerate(routing.uses):
            if (params := self._mixed(uses)) and routing.use_of is not None:
                tokens = (routing.use_of == i).nonzero()[:, 0]
                for out, part in zip(outs, ParamPatch(params).apply(xs[tokens], self.module), strict=True):
                    out.index_copy_(0, tokens, part)
        return outs

    def _mixed(self, uses: Sequence[Use]) -> dict[str, Tensor]:
        """W + Σ wᵢ (Wᵢ − W) for each parameter that some adapter replaces."""
        mixed: dict[str, Tensor] = {}
        for placed, weight in uses:
            patch = placed.others.get(self.path)
            for name, value in patch.params.items() if isinstance(patch, ParamPatch) else ():
                own = self.module.get_parameter(name)
                mixed[name] = mixed.get(name, own) + weight * (value - own)
        return mixed

    def _by_token(self, t: Tensor) -> Tensor:
        """A view with all tokens first: [1, T, …] or, of rows with one token each, [T, 1, …]."""
        if self.axis == 0:
            return t
        t = t.movedim(self.axis, 0)
        return t[:, 0] if t.shape[1] == 1 else t[0]


class Tap:
    """Notes a module's input: the residual stream, where bottleneck adapters of the step read it."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.base = path, module.forward
        module.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        step = current()
        if step is not None and not step.routing.plain:
            step.streams[self.path] = x
        y: Tensor = self.base(x)
        return y


def _stream(path: str) -> Tensor:
    """What the step's tap at a path has noted."""
    step = current()
    if step is None or path not in step.streams:
        raise RuntimeError(f"{path} was not called before the block that it leads into")
    return step.streams[path]


def _after_block(y: Tensor, r: Tensor, segment: Segment, block: BlockPatch) -> Tensor:
    """w (y' − y) of a segment's tokens. y is the base's own, r [1, T, hidden] the stream."""
    r = r.reshape(y.shape).to(y.dtype)
    part = y[segment.tokens]
    delta = block.apply(part, r[segment.tokens]) - part
    return delta if segment.weights is None else delta * segment.weights


class AttentionSite:
    """An attention that adapters add to behind its last Linear: what they add was found with its queries."""

    def __init__(self, layer: int, module: nn.Module) -> None:
        self.layer, self.base = layer, module.forward
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        y, *rest = self.base(*args, **kwargs)
        step = current()
        added = None if step is None else step.added.pop(self.layer, None)
        return (y if added is None else y + added, *rest)


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
    return weight, _joined_biases([b for _, b in params], [w for w, _ in params])


def _joined_biases(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    if all(b is None for b in biases):
        return None
    each = [torch.zeros_like(w[:, 0]) if b is None else b for b, w in zip(biases, weights, strict=True)]
    return torch.cat(each).detach()


def _runs_alike(outs: Sequence[int]) -> list[range]:
    """Neighbouring members of one output width: (8, 4, 4) → 0..0, 1..2."""
    starts = [m for m in range(len(outs)) if m == 0 or outs[m] != outs[m - 1]]
    return [range(a, b) for a, b in itertools.pairwise([*starts, len(outs)])]


def _scale(patch: Patch) -> Tensor | None:
    """What multiplies the base's product."""
    scales = [s for s in (patch.gain, patch.out_scale) if s is not None]
    return torch.stack(scales).prod(0) if scales else None


def _mul(patch: Patch) -> Tensor | None:
    scale = _scale(patch)
    return None if scale is None else scale - 1


def _is_alone(segment: Segment) -> bool:
    return segment.sole and segment.weights is None
