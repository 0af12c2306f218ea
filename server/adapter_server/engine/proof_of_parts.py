"""What adapters do beyond low rank and vectors, by the kernels and as `LinearGroup` does it by itself: the largest
difference on random input, for the proof at start and the tests. And norms' weights by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_server.core import Spec
from adapter_server.engine.grouped import Grouped
from adapter_server.engine.parts import Parts, weighable
from adapter_server.engine.placed import Dtypes, GroupPatch, Placed
from adapter_server.engine.proofs import draws
from adapter_server.engine.routing import Routing, Step, route, running
from adapter_server.engine.site import LinearGroup, Plan
from adapter_server.families.base import Adapter, Network, Patch
from adapter_server.families.deltas import Mirror, Sparse, Spectral, TensorFields, Turn

INP, OUTS = 288, (80, 48)  # more than one program's columns
STREAM = "stream"
WEIGHTS = (1.0, 0.5, -0.7)
COUNTS = (1, 5)  # tokens of adapters, in turn: in tiles of few and of many
ACTS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}
Draw = Callable[..., Tensor]


@torch.inference_mode()
def parts_error(found: ModuleType, device: torch.device, given: torch.dtype, held: torch.dtype) -> float:
    """`given`: the base's dtype, and x's; `held`: the adapters'."""
    draw, form = draws(device), Grouped(found, device)
    groups = [
        LinearGroup(i, _linears(draw, outs, given), form, pack=False, head=False, dtypes=Dtypes(given, held))
        for i, outs in enumerate((OUTS, (INP,)))
    ]
    made = [(groups[0], groups[0].place(patches)) for patches in _of_two(draw)]
    made += [(groups[1], patch) for patch in _of_one(groups[1], draw)]
    adapters = [_placed(group, patch) for group, patch in made]
    rows = [(COUNTS[i % 2], ((each, WEIGHTS[i % 3] if weighable(each) else 1.0),)) for i, each in enumerate(adapters)]
    routing = route([(1, ()), *rows], device)
    x, r = (draw(routing.tokens, INP).to(given) for _ in range(2))
    return max(
        *(_error(form, group, routing, x, r) for group in groups), _norm_error(form, routing, draw(INP).to(given))
    )


def _error(form: Grouped, group: LinearGroup, routing: Routing, x: Tensor, r: Tensor) -> float:
    listed = form.listed(routing, everything=True)
    tiles, owners = form.on_device(listed), form.owners(listed, routing.tokens)
    parts = {part for s in routing.segments for part in form.parts(s.placed) or () if part.group == group.index}
    plan = Plan(small=[Parts(form, group, parts, tiles, owners, form.table.hidden)])
    by_kernels, alone = Routing(routing.tokens, plans={group.index: plan}), routing
    found = []
    for each in (by_kernels, alone):
        with running(Step(each, each, streams={STREAM: r[None]})):
            found.append(group.run(x).float())
    return (found[0] - found[1]).abs().max().item()


def _norm_error(form: Grouped, routing: Routing, weight: Tensor) -> float:
    """Of norms' weights by token: the last adapter has one of its own, at a column that stands for a norm's."""
    listed, own = form.listed(routing, everything=True), weight.flip(0).contiguous()
    owners = form.owners(listed, routing.tokens)
    owners.table[:, 0] = 0
    owners.table[listed.slots[-1], 0] = own.data_ptr()
    got = form.kernels.own_rows(weight, owners, 0, weight.dtype).float()
    mine, w = (owners.rows == listed.slots[-1])[:, None], owners.weights[:, None]
    want = torch.where(mine, weight.float() + w * (own.float() - weight.float()), weight.float())
    return float((got - want).abs().max())


def _linears(draw: Draw, outs: Sequence[int], dtype: torch.dtype) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    for out in outs:
        linear = nn.Linear(INP, out, device="meta")
        weight, bias = draw(out, INP) / INP**0.5, draw(out)
        linear.weight, linear.bias = (nn.Parameter(t.to(dtype), requires_grad=False) for t in (weight, bias))
        made[f"m{len(made)}"] = linear
    return made


def _placed(group: LinearGroup, patch: GroupPatch) -> Placed:
    return Placed(Adapter(Spec("probe", "0" * 12, "", "LORA", {}, 0)), {group.index: patch}, {})


def _of_two(draw: Draw) -> list[Mapping[str, Patch]]:
    """What a member may have, such that products are about 1: of one member, or of both."""
    return [
        {"m0": Patch(turn=Turn(draw(1, 8, 8) / 3))},
        {"m0": Patch(turn=Turn(draw(INP // 16, 16, 16) / 4)), "m1": Patch(delta=_sparse(draw, 48, 0.3))},
        {"m0": Patch(mirror=Mirror(torch.arange(OUTS[0]).flip(0), draw(OUTS[0]).cpu()))},
        {"m0": Patch(weight=draw(80, INP) / INP**0.5), "m1": Patch(weight=draw(48, INP) / INP**0.5, bias=draw(48))},
        {"m1": Patch(delta=Spectral(_sparse(draw, 48, 3.0)))},
    ]


def _of_one(group: LinearGroup, draw: Draw) -> list[GroupPatch]:
    """What a Linear that is alone may have: a scaled input, and networks behind it."""
    scaled = group.place({"m0": Patch(in_scale=1 + draw(INP) / 2)})
    return [scaled, *(group.place_block(_block(draw, n)) for n in range(3))]


def _sparse(draw: Draw, out: int, size: float) -> Sparse:
    places = torch.arange(0, out * INP, 97)
    return Sparse.of(places // INP, places % INP, size * draw(len(places)).cpu(), (out, INP))


@dataclass(frozen=True, slots=True, eq=False)
class Block(TensorFields):
    """A network behind a block."""

    net: Network
    reads: str = STREAM

    def network(self) -> Network:
        return self.net

    def apply(self, y: Tensor, r: Tensor) -> Tensor:
        """y, r [T, hidden] → y'."""
        net, z = self.net, {"y": y, "r": r, "y + r": y + r}[self.net.reads]
        h = ACTS[net.act](F.linear(z, net.down, net.down_bias))
        return y + F.linear(h, net.up, net.up_bias) + net.again * r


def _block(draw: Draw, n: int) -> Block:
    d = (3, 16, 70)[n]
    down, up = draw(d, INP) / INP**0.5, draw(INP, d) / d**0.5
    act, reads = ("silu", "gelu", "tanh")[n], ("y", "y + r", "r")[n]
    return Block(Network(down, draw(d), up, draw(INP), act, reads, again=(0, 1, -1)[n]))  # type: ignore[arg-type]
