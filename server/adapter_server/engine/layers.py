"""The layers of a base on the CPU in float32 in one call (`layers.c`); where prompts are read, in two halves each.

`fused.py` has found the layers and their parts, and accepts this by a proof of its own. A step is taken whose adapters
act in the products' own calls alone; of any other, layers run one by one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adapter_server.engine import native
from adapter_server.engine.added import NativeBeside
from adapter_server.engine.attention import attend
from adapter_server.engine.kv import Decodes, KvPool, KvStep
from adapter_server.engine.native import Panels
from adapter_server.engine.routing import Routing, Step

if TYPE_CHECKING:
    from adapter_server.engine.fused import FusedAttention, FusedLayer, FusedMlp, FusedNorm
    from adapter_server.engine.operands import Norm
    from adapter_server.engine.placed import Product, Separate
    from adapter_server.engine.site import LinearGroup, Plan

KEPT = 256  # tokens of a step whose working memory is kept for the next
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


class NormFields(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("eps", ctypes.c_float), ("centred", ctypes.c_int32)]


class LinearFields(ctypes.Structure):
    _fields_ = [("panels", POINTER), ("bias", POINTER), ("inp", NUMBER), ("out", NUMBER), ("more", POINTER)]


class LayerFields(ctypes.Structure):
    _fields_ = [
        *((name, NormFields) for name in ("first", "second", "of_q", "of_k")),
        *((name, LinearFields) for name in ("mixed", "outward", "both", "down")),
        *((name, POINTER) for name in ("keys", "values")),
        *((name, NUMBER) for name in ("heads", "kv_heads", "dim", "act", "window")),
        ("sinks", POINTER),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
    ]


class StepFields(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER),
        ("tokens", NUMBER),
        *((name, POINTER) for name in ("stream", "x", "mixed", "q", "seen", "both", "inner", "y", "room", "scores")),
        *((name, POINTER) for name in ("cos", "sin", "places", "table", "lengths", "asking")),
        *((name, NUMBER) for name in ("pages", "rows", "most", "page")),
    ]


class Link(NamedTuple):
    """What a group's product reads in the steps of one routing: addresses, 0 for none."""

    panels: int
    bias: int
    more: int = 0  # a table of `added.h`
    most: int = sys.maxsize  # threads that it has room for


class Parts(NamedTuple):
    """A layer's, all of them fused."""

    layer: FusedLayer
    attending: FusedAttention
    gating: FusedMlp

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.attending.mixed, self.attending.out, self.gating.both, self.gating.down


class Layers:
    """All layers of one base, in their order."""

    def __init__(self, parts: Sequence[Parts]) -> None:
        self.parts, self.kernels = parts, parts[0].layer.first.kernels
        self.groups = [group for part in parts for group in part.groups]
        self.own = [link for group in self.groups if (link := _link(group.base)) is not None]  # `of` has seen to all
        self.fields = (LayerFields * len(parts))()
        self.linears = [linear for at in self.fields for linear in (at.mixed, at.outward, at.both, at.down)]
        self.kept: list[Tensor] = []  # whose addresses are named
        for fields, part in zip(self.fields, parts, strict=True):
            self._fill(fields, part)
        self.call = StepFields(layers=ctypes.addressof(self.fields))
        self.widths = self._widths()
        self.memory, self.scores = torch.empty(0), torch.empty(0)
        self.largest = max(sum(group.outs) * group.inp for group in self.groups)
        self.run_halves = native.library().layers_run  # type: ignore[union-attr]
        self._linked: Sequence[Link] = ()
        self._most = 0
        self._pool: KvPool | None = None  # whose places the fields name

    @classmethod
    def of(cls, layers: Sequence[FusedLayer]) -> Layers | None:
        """None where some part of a layer is not fused, layers differ in size, or a product has no panels."""
        parts = [Parts(at, at.attending, at.gating) for at in layers if at.attending and at.gating]
        if [part.attending.layer for part in parts] != list(range(len(layers))):
            return None
        sizes = {(part.attending.shape, *(group.outs for group in part.groups)) for part in parts}
        packed = all(_link(group.base) for part in parts for group in part.groups)
        return cls(parts) if packed and len(sizes) == 1 else None

    def _fill(self, fields: LayerFields, part: Parts) -> None:
        attending, (kv_heads, dim, _) = part.attending, part.attending.shape
        norms = part.layer.first, part.layer.second, *attending.norms
        fields.first, fields.second, fields.of_q, fields.of_k = map(self._norm, norms)
        for group, linear in zip(part.groups, (fields.mixed, fields.outward, fields.both, fields.down), strict=True):
            linear.inp, linear.out = group.inp, sum(group.outs)
        form = attending.scores.form(self.kernels)
        fields.heads, fields.kv_heads, fields.dim = attending.heads, kv_heads, dim
        fields.act, fields.window = self.kernels.ACTS[part.gating.act], form.window or 0
        fields.sinks = 0 if form.sinks is None else self._at(form.sinks.float().contiguous())
        fields.scale, fields.cap = form.scale, form.cap or 0.0

    def _norm(self, norm: FusedNorm | Norm | None) -> NormFields:
        return NormFields() if norm is None else NormFields(self._at(norm.weight), norm.eps, norm.centred)

    def _at(self, t: Tensor) -> int:
        self.kept.append(t)
        return t.data_ptr()

    def _widths(self) -> dict[str, int]:
        """Numbers of a token in each of the step's tensors."""
        (mixed, out, both, down), dim = self.parts[0].groups, self.parts[0].attending.shape[1]
        wide = {"mixed": sum(mixed.outs), "q": out.inp, "seen": out.inp, "both": sum(both.outs), "inner": down.inp}
        return {"x": mixed.inp, "y": mixed.inp, "room": dim, **wide}

    def links(self, routing: Routing, cos: Tensor) -> Sequence[Link] | None:
        """What each group's product reads; None for a step that is not taken."""
        if cos.shape[-1] != self.widths["room"]:  # not all of a head is turned
            return None
        if routing.plain:
            return self.own
        if "layers" not in routing.shared:
            routing.shared["layers"] = None if routing.inside else self._links(routing)
        found: Sequence[Link] | None = routing.shared["layers"]
        return found

    def _links(self, routing: Routing) -> Sequence[Link] | None:
        found: list[Link] = []
        for group, own in zip(self.groups, self.own, strict=True):
            link = _planned(group.planned(routing, routing.tokens), own)
            if link is None:
                return None
            found.append(link)
        return found

    def run(self, step: Step, kv: KvStep, links: Sequence[Link], x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """x [1, T, hidden], cos and sin [1, T, dim] → the stream [1, T, hidden] before its last sum, which is left in
        `Step.carry` for the norm that reads it.
        """
        stream = x.clone(memory_format=torch.contiguous_format)
        cos, sin = (each.contiguous() for each in places)
        made = self._within(x.shape[1])
        call = self.call
        call.tokens, call.stream, call.cos, call.sin = x.shape[1], stream.data_ptr(), cos.data_ptr(), sin.data_ptr()
        call.places = kv.places.data_ptr()
        self._link(links)
        self._pool_of(kv)
        threads = 1 if x.shape[1] * self.largest < native.SERIAL else min(torch.get_num_threads(), self._most)
        if kv.decodes is not None and kv.pool.kernels is self.kernels and not kv.prefills and kv.chunks is None:
            self._decode(kv, kv.decodes)
            self.run_halves(ctypes.byref(call), 0, 2 * len(self.parts), threads)
        else:
            self._by_halves(step, kv, made["q"], threads)
        step.carry = stream, made["y"].view(x.shape), None
        return stream

    def _by_halves(self, step: Step, kv: KvStep, q: Tensor, threads: int) -> None:
        """With attention in between."""
        call = self.call
        call.rows = 0
        for i, (_, attending, _) in enumerate(self.parts):
            self.run_halves(ctypes.byref(call), max(0, 2 * i - 1), 2 * i + 1, threads)
            heads, dim = attending.heads, attending.shape[1]
            asked = q.view(-1, heads, dim).transpose(0, 1)[None]
            seen = attend(step, kv, attending.layer, asked, dim, attending.scores)
            call.seen = seen.data_ptr()
        self.run_halves(ctypes.byref(call), 2 * len(self.parts) - 1, 2 * len(self.parts), threads)

    def _within(self, tokens: int) -> dict[str, Tensor]:
        """The step's tensors [T, width], one behind another."""
        needed = tokens * sum(self.widths.values())
        memory = self.memory if needed <= self.memory.numel() else torch.empty(needed)
        if tokens <= KEPT:
            self.memory = memory
        parts = torch.split(memory[:needed], [tokens * width for width in self.widths.values()])
        made = {name: part.view(tokens, -1) for name, part in zip(self.widths, parts, strict=True)}
        for name, tensor in made.items():
            setattr(self.call, name, tensor.data_ptr())
        return made

    def _link(self, links: Sequence[Link]) -> None:
        if links is self._linked:
            return
        for linear, link in zip(self.linears, links, strict=True):
            linear.panels, linear.bias, linear.more = link.panels, link.bias, link.more
        self._linked, self._most = links, min(link.most for link in links)

    def _pool_of(self, kv: KvStep) -> None:
        if kv.pool is self._pool:
            return
        for fields, part in zip(self.fields, self.parts, strict=True):
            fields.keys = kv.pool.keys[part.attending.layer].data_ptr()
            fields.values = kv.pool.values[part.attending.layer].data_ptr()
        self._pool = kv.pool

    def _decode(self, kv: KvStep, decodes: Decodes) -> None:
        call, rows, table = self.call, len(decodes.tokens), decodes.table
        if table is None:
            raise RuntimeError("rows that decode by kernels have no table of their pages")
        needed = rows * self.parts[0].attending.heads * decodes.context
        if needed > self.scores.numel():
            self.scores = torch.empty(2 * needed)
        call.scores, call.rows, call.most, call.page = self.scores.data_ptr(), rows, decodes.context, kv.pool.page
        call.table, call.pages = table.data_ptr(), table.stride(0)
        call.lengths, call.asking = decodes.lengths.data_ptr(), decodes.tokens.data_ptr()


def _link(base: Product | Separate) -> Link | None:
    """A product's alone; None where it has no panels."""
    if not isinstance(base.packed, Panels):
        return None
    return Link(base.packed.memory.data_ptr(), 0 if base.bias is None else base.bias.data_ptr())


def _planned(plan: Plan, own: Link) -> Link | None:
    """What a group's plan comes to; None where it is more than a product and what stands in its call."""
    if plan.whole is not None:
        return _link(plan.whole)
    if isinstance(plan.beside, NativeBeside):
        return own._replace(more=ctypes.addressof(plan.beside.small.table), most=plan.beside.small.most)
    return own if plan.narrow and not plan.small else None
