"""What an adapter is once it is laid out on the device: per group of Linears, and before its rows' prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_server.engine import native
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, AnyPatch, BlockPatch, GatedPrompt, linear_params
from adapter_server.families.deltas import Delta, Mirror, TensorFields, Turn, held_bytes

if TYPE_CHECKING:
    from adapter_server.engine.added import Entry
    from adapter_server.engine.parts import Entry as PartsEntry
    from adapter_server.engine.tree import Tree


@dataclass(frozen=True, slots=True)
class Dtypes:
    """What the base computes in, and what adapters are held and added in, before one rounding to the base's.

    PEFT's rule (`autocast_adapter_dtype`): adapters in float32 over a base in fewer bits.
    """

    base: torch.dtype
    adapters: torch.dtype


FLOAT32 = Dtypes(torch.float32, torch.float32)
Few = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]  # (x, weight, bias) → y, or None for another form's


class Product:
    """y = x Wᵀ + b in the fastest form at hand: on the CPU in float32 from packed weights beside the plain ones."""

    def __init__(self, weight: Tensor, bias: Tensor | None, pack: bool, few: Few | None = None) -> None:
        """`few`: what is asked first, where there are few rows."""
        self.weight, self.bias, self.few = weight, bias, few
        self.packed = _packed(weight) if pack else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] → y [T, out], a new tensor."""
        if self.few is not None and (found := self.few(x, self.weight, self.bias)) is not None:
            return found
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return self.packed(x, self.bias)

    @property
    def bytes(self) -> int:
        packed = None if self.packed is None else self.packed.memory
        return sum(t.nbytes for t in (self.weight, self.bias, packed) if t is not None)


class OneDnn:
    """A weight [out, in] once more, as oneDNN packs it: where there is no C compiler."""

    MOST_ROWS = 128  # beyond, the plain weight's product is as fast, and nothing is compiled for each number of rows

    def __init__(self, weight: Tensor) -> None:
        self.plain = weight
        self.memory = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → x · Wᵀ + b [T, out]."""
        if len(x) > self.MOST_ROWS:
            return F.linear(x, self.plain, bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.memory, bias, "none", [], "")
        return y


def _packed(weight: Tensor) -> native.Panels | OneDnn | None:
    """None where nothing is faster than the plain weight."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if (library := native.library()) is not None:
        return native.Panels(library, weight.contiguous())
    return OneDnn(weight) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


class Separate:
    """A quantised group's base: each member's own product, side by side. Its weights are read where one is replaced."""

    packed = None

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
        return joined_biases([b for _, b in params], [w for w, _ in params])


@dataclass(frozen=True, slots=True, eq=False)
class Turned(TensorFields):
    """One member's turned input, and what scales its outputs."""

    member: int
    turn: Turn
    scale: Tensor | None = None  # [out]


@dataclass(frozen=True, eq=False)
class GroupPatch:
    """An adapter's patches at one group, laid out for the run.

    A [Σ r, in] of all members; `pairs` per member: its rows of A [r, in] and Bt [r, out], or None. All of them
    are in one format, the group's or the 16 bits of the adapter's file.
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
    entry: Entry | PartsEntry | None = None  # what the kernels' tables say of it

    def tensors(self) -> Iterator[Tensor]:
        """All but the product's."""
        vectors = (self.A, self.mul, self.add, self.shift, *(pair[1] for pair in self.pairs if pair))
        yield from (t for t in vectors if t is not None)
        for parts in ((delta for _, delta in self.deltas), (mirror for _, mirror in self.mirrors), self.turns):
            yield from itertools.chain.from_iterable(part.tensors() for part in parts)
        yield from self.block.tensors() if self.block else ()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Placed:
    """An adapter laid out on the device: per group, per other module, and what stands before its rows' prompts."""

    adapter: Adapter
    groups: Mapping[int, GroupPatch]
    others: Mapping[str, AnyPatch]
    prefixes: dict[int | None, Prefix] = field(default_factory=dict)  # by task id
    gated: Mapping[int, GatedPrompt] = field(default_factory=dict)  # by layer
    tasks: dict[int, Placed] = field(default_factory=dict)  # what skills are for a task, the last used at the end
    tree: Tree | None = None  # what PEFT runs, in its own lane
    unfused: bool = False  # whether some of it acts where fused modules do not look

    @property
    def rank(self) -> int:
        ranks = (pair[0].shape[0] for patch in self.groups.values() for pair in patch.pairs if pair)
        return max(ranks, default=0)

    @property
    def acts(self) -> bool:
        """Whether it changes what a token meets on its way, rather than what stands before it alone."""
        return bool(self.groups or self.others or self.gated)

    @property
    def acts_inside(self) -> bool:
        """Whether it touches more than what Linears give: norms, attention, blocks, the residual stream."""
        return bool(self.others or self.gated) or any(patch.block is not None for patch in self.groups.values())

    @property
    def replaces(self) -> bool:
        """Whether it has weights of its own wherever it touches a Linear, as a snapshot does."""
        return bool(self.groups) and all(patch.product is not None for patch in self.groups.values())

    @property
    def bytes(self) -> int:
        mixed = sum(placed.bytes for placed in self.tasks.values()) + (self.tree.bytes if self.tree else 0)
        products = sum(patch.product.bytes for patch in self.groups.values() if patch.product is not None)
        return held_bytes(self.tensors()) + products + mixed

    def tensors(self) -> Iterator[Tensor]:
        """What it holds but for products and what is made for single tasks."""
        for parts in (self.groups, self.others, self.gated):
            yield from itertools.chain.from_iterable(part.tensors() for part in parts.values())
        for prefix in self.prefixes.values():
            yield from itertools.chain.from_iterable(prefix.layers)
        yield from (t for t in (self.adapter.embeds, *self.adapter.tasks) if t is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values that exist before the prompt: per layer K, V [n, kv_heads, dim], at positions 0..n-1."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    shifts: bool = True  # whether real tokens' positions begin at n, or at 0 beside it

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[0]


def check_index(index: Tensor, size: int) -> None:
    """Kernels read and write where they are told. Raises AdapterRefused."""
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise AdapterRefused("an index of what it changes lies outside the weight")


def joined_biases(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    if all(b is None for b in biases):
        return None
    each = [torch.zeros_like(w[:, 0]) if b is None else b for b, w in zip(biases, weights, strict=True)]
    return torch.cat(each).detach()
