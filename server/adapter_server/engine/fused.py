"""Modules of the base in fewer and larger pieces, found by structure and accepted by proof.

    norm        x · rsqrt(mean x² + ε) · w                                            one kernel for six
    gated MLP   down(act(gate x) · up x)                                              one beside its products
    attention   q, k, v of one product; norms of heads, RoPE and the write to the pool in one kernel
    layer       x + attention(norm x), + MLP(norm …): sums are formed where the next norm reads them
    layers      on the CPU: all of them, one call (`layers.py`)

A module is taken for one of these by what it consists of, never by name, and only if on random input it computes what
the module itself does; one that does not stays as it is. Norms between blocks take adapters' own weights, and note the
residual stream for who reads it. In a step in which some adapter acts where none of these looks (`Routing.unfused`)
every module runs as the base has it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapter_server.engine.attention import Probe, Scores, attend
from adapter_server.engine.kv import Chunk, KvStep, LayerShape, PagePool
from adapter_server.engine.routing import Routing, Step, Use, current, running
from adapter_server.families.base import AnyPatch, ParamPatch

if TYPE_CHECKING:
    from adapter_server.engine.layers import Layers
    from adapter_server.engine.operands import More
    from adapter_server.engine.placed import Placed
    from adapter_server.engine.site import LinearGroup

log = logging.getLogger(__name__)

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest output
WHOLE = 4  # times a module's: what a whole forward may be off
TOKENS, PAGE = 5, 16  # of the proof's input


class FusedNorm:
    """An RMS norm in one launch; where a fused layer has left a sum to form, that too.

    One that stands between blocks runs on adapters' own weights, and notes the stream.
    """

    def __init__(self, kernels: ModuleType, path: str, module: nn.Module, eps: float, centred: bool) -> None:
        self.kernels, self.path, self.base = kernels, path, module.forward
        self.weight: Tensor = module.get_parameter("weight")
        self.eps, self.centred = eps, centred
        self.between = False  # whether it stands between blocks: then its rows are the step's tokens

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            y: Tensor = self.base(x)
            return y
        step = current()
        return self.norm(x) if step is None else self.enter(step, x)[0]

    def norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """`weight`: [n], or [T, n] of each token its own; None: the module's."""
        y: Tensor = self.kernels.rms_norm(x, self.weight if weight is None else weight, self.eps, self.centred)
        return y

    def enter(self, step: Step, x: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the stream, the stream), x being the stream or what a fused layer gave for it."""
        if not _carried(step, x) or step.carry is None:
            return self.norm(x, self._weight(step.routing, x)), self._noted(step, x)
        (total, x, more), step.carry = step.carry, None
        return self.add(step, x, total, more)

    def add(self, step: Step, x: Tensor, total: Tensor, more: More | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        weight = self._weight(step.routing, x)
        y, both = self.kernels.add_rms_norm(x, total, weight, self.eps, self.centred, more)
        return y, self._noted(step, both)

    def _noted(self, step: Step, stream: Tensor) -> Tensor:
        """For bottleneck adapters that read it, if there are some."""
        if self.between and self.path in step.routing.read:
            step.streams[self.path] = stream
        return stream

    def _weight(self, routing: Routing, x: Tensor) -> Tensor:
        """[n], or [T, n] where adapters of the step have weights of their own here."""
        if not self.between or routing.plain or routing.unfused:
            return self.weight
        if self not in routing.shared:
            routing.shared[self] = self._mixed(routing)
        found: Tensor | Callable[[], Tensor] | None = routing.shared[self]
        if found is None:
            return self.weight
        if x.numel() != routing.tokens * len(self.weight):
            raise RuntimeError(f"{self.path} saw {x.numel() // len(self.weight)} rows in a step of {routing.tokens}")
        if not isinstance(found, Tensor):  # of a captured step: found anew each time
            return found()
        return found[0] if routing.sole_use is not None else routing.by_token(found)

    def _mixed(self, routing: Routing) -> Tensor | None:
        """W + Σ wᵢ (Wᵢ − W) of each use [uses, n], or of the sole one: an RMS norm is linear in its weight."""
        if not routing.inside:
            return None
        uses = routing.uses if routing.sole_use is None else routing.uses[routing.sole_use :][:1]
        each = [self._of(use) for use in uses]
        return None if all(weight is self.weight for weight in each) else torch.stack(each)

    def _of(self, uses: Sequence[Use]) -> Tensor:
        own = [(patch.params["weight"], w) for p, w in uses if isinstance(patch := self.patch_of(p), ParamPatch)]
        if len(own) <= 1 and all(w == 1 for _, w in own):
            return own[0][0] if own else self.weight
        base = self.weight.float()
        return (base + sum(w * (weight.float() - base) for weight, w in own)).to(self.weight.dtype)

    def patch_of(self, placed: Placed) -> AnyPatch | None:
        return placed.others.get(self.path)

    def takes(self, patch: AnyPatch) -> bool:
        """Whether what it changes is the weight alone."""
        return self.between and isinstance(patch, ParamPatch) and patch.params.keys() == {"weight"}


def _carried(step: Step, x: Tensor) -> bool:
    return step.carry is not None and step.carry[0] is x


@dataclass(frozen=True, eq=False)
class FusedMlp:
    """down(act(gate x) · up x), gate and up one product."""

    kernels: ModuleType
    base: Callable[[Tensor], Tensor]
    both: LinearGroup
    down: LinearGroup
    act: str

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if _unfused() else self.down.run(self._within(x)).view(*x.shape[:-1], -1)

    def apart(self, x: Tensor) -> tuple[Tensor, More | None]:
        """As `forward`, where what adapters add to it may be left to its reader."""
        y, more = self.down.apart(self._within(x))
        return y.view(*x.shape[:-1], -1), more

    def _within(self, x: Tensor) -> Tensor:
        both, more = self.both.apart(x.reshape(-1, self.both.inp))
        y: Tensor = self.kernels.gated(both, self.act, more)
        return y


@dataclass(frozen=True, eq=False)
class FusedAttention:
    """q, k and v from one product to the pool in one launch; then `attend`, and the last Linear."""

    kernels: ModuleType
    base: Callable[..., Any]
    layer: int
    shape: LayerShape
    scores: Scores
    mixed: LinearGroup
    out: LinearGroup
    norms: tuple[Any, Any]  # of the heads of q and k; None for none

    @property
    def heads(self) -> int:
        return self.out.inp // self.shape[2]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        step, places = current(), kwargs.get("position_embeddings")
        if step is None or step.kv is None or places is None or len(args) > 1 or step.routing.unfused:
            return self.base(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        return self.out.run(self._attended(step, step.kv, x, *places)).view(*x.shape[:-1], -1), None

    def apart(self, step: Step, kv: KvStep, x: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, More | None]:
        """As `forward`, where what adapters add to it may be left to its reader."""
        y, more = self.out.apart(self._attended(step, kv, x, *places))
        return y.view(*x.shape[:-1], -1), more

    def _attended(self, step: Step, kv: KvStep, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1, T, hidden] → what the last Linear reads [T, heads · dim]; k and v are in the pool."""
        pool, (kv_heads, dim, width) = kv.pool, self.shape
        mixed, more = self.mixed.apart(x.reshape(-1, self.mixed.inp))
        q: Tensor = self.kernels.rope_write(
            mixed, cos.reshape(-1, dim), sin.reshape(-1, dim), pool.keys[self.layer], pool.values[self.layer],
            kv.places, self.heads, kv_heads, *self.norms, more,
        )  # fmt: skip
        return attend(step, kv, self.layer, q.transpose(0, 1)[None], width, self.scores).view(-1, self.out.inp)


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """x + attention(norm x), then + rest(norm …). The last sum is left to the norm that reads it, in `Step.carry`."""

    base: Callable[..., Any]
    attention: nn.Module
    rest: nn.Module
    first: FusedNorm
    second: FusedNorm
    attending: FusedAttention | None  # what the modules have been fused to
    gating: FusedMlp | None
    together: Layers | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        step = current()
        if step is None or args or step.routing.unfused or hidden_states.dtype != self.first.weight.dtype:
            return self.base(hidden_states, *args, **kwargs)
        if (found := self._together(step, hidden_states, kwargs)) is not None:
            return found
        x, total = self.first.enter(step, hidden_states)
        y, more = self._attended(step, x, kwargs)
        x, total = self.second.add(step, y, total, more)
        step.carry = (total, *(self.gating.apart(x) if self.gating is not None else (self.rest(x), None)))
        return total

    def _together(self, step: Step, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The stream behind all layers, which the first one runs; None where they run one by one."""
        layers, places = self.together, kwargs.get("position_embeddings")
        if step.ran is not None:
            if places is not step.ran:
                raise RuntimeError("layers that ran as one were given different angles")
            return x
        if layers is None or self.attending is None or self.attending.layer or step.kv is None or places is None:
            return None
        if (links := layers.links(step.routing, places[0])) is None:
            return None
        step.ran = places
        return layers.run(step, step.kv, links, x, places)

    def _attended(self, step: Step, x: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, More | None]:
        places = kwargs.get("position_embeddings")
        if self.attending is None or step.kv is None or places is None:
            return self.attention(hidden_states=x, **kwargs)[0], None
        return self.attending.apart(step, step.kv, x, places)


def _unfused() -> bool:
    step = current()
    return step is not None and step.routing.unfused


class Fuser:
    """Finds and tries; what is accepted has taken its module's `forward`."""

    def __init__(
        self,
        kernels: ModuleType,
        module: PreTrainedModel,
        groups: Mapping[str, LinearGroup],
        seen: Probe,
        dtype: torch.dtype,
    ) -> None:
        self.kernels, self.module, self.groups, self.seen, self.dtype = kernels, module, groups, seen, dtype
        self.modules = dict(module.named_modules())
        self.hidden: int = module.get_input_embeddings().weight.shape[1]
        self.device = next(module.parameters()).device
        self.norms: dict[nn.Module, FusedNorm] = {}
        self.fused: dict[nn.Module, Any] = {}
        self.done: dict[str, int] = {"norm": 0, "mlp": 0, "attention": 0, "layer": 0, "layers": 0}

    @torch.inference_mode()
    def run(self) -> dict[str, int]:
        """How many modules of each structure run fused from now on."""
        for path, module in self.modules.items():
            self._norm(path, module)
        for path, module in self.modules.items():
            self._mlp(path, module)
        callers = {id(caller): layer for layer, caller in self.seen.callers.items()}
        self._between(callers)
        for path, module in self.modules.items():
            if id(module) in callers:
                self._attention(path, module, callers[id(module)])
        self._layers(callers)
        log.info("fused modules: %s", ", ".join(f"{count} of kind {kind}" for kind, count in self.done.items()))
        return self.done

    def _take(self, kind: str, module: nn.Module, fused: FusedNorm | FusedMlp | FusedAttention) -> None:
        module.forward, self.fused[module] = fused.forward, fused
        self.done[kind] += 1

    def _draw(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def _agree(self, base: Callable[[], Tensor], fused: Callable[[], Tensor], slack: int = 1) -> bool:
        """Whether both give the same, as far as rounding allows."""
        try:
            want, got = base().float(), fused().float()
        except Exception as failure:
            log.debug("a fused form does not run: %r", failure)
            return False
        far = (got - want).abs().max() / want.abs().max().clamp(min=1e-6)
        return got.shape == want.shape and bool(far <= slack * TOLERANCE[self.dtype])

    def _norm(self, path: str, module: nn.Module) -> None:
        weight = dict(module.named_parameters()).get("weight")
        alone = weight is not None and weight.dim() == 1 and len(list(module.parameters())) == 1
        if weight is None or not alone or weight.dtype != self.dtype or list(module.children()):
            return
        x = self._draw(3, len(weight)) * 2 + 0.5
        small = {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2}
        for eps, centred in itertools.product(small, (False, True)):
            fused = FusedNorm(self.kernels, path, module, eps, centred)
            if self._agree(lambda: module(x), lambda fused=fused: fused.norm(x)):  # type: ignore[misc]
                self.norms[module] = fused
                self._take("norm", module, fused)
                return

    def _between(self, callers: Mapping[int, int]) -> None:
        """All norms that are as wide as the stream, and no attention's own."""
        of_heads = {child for module in self.modules.values() if id(module) in callers for child in module.modules()}
        for module, norm in self.norms.items():
            norm.between = module not in of_heads and len(norm.weight) == self.hidden

    def _parts(self, path: str) -> list[LinearGroup]:
        """The groups whose Linears all stand below a module, in the order of their calls."""
        inside = {group for p, group in self.groups.items() if p.startswith(f"{path}.")}
        whole = [g for g in inside if all(p.startswith(f"{path}.") for p in g.paths)]
        return sorted(whole, key=lambda group: group.index)

    def _mlp(self, path: str, module: nn.Module) -> None:
        parts = self._parts(path) if path else []
        if len(parts) != 2 or sum(parts[0].outs) != 2 * parts[1].inp or len(parts[1].outs) > 1:
            return
        base, x = module.forward, self._draw(1, TOKENS, parts[0].inp)
        for act in ACTIVATIONS:
            fused = FusedMlp(self.kernels, base, parts[0], parts[1], act)
            if self._agree(lambda: base(x), lambda fused=fused: fused.forward(x)):  # type: ignore[misc]
                self._take("mlp", module, fused)
                return

    def _attention(self, path: str, module: nn.Module, layer: int) -> None:
        shape, parts = self.seen.layers[layer], self._parts(path)
        norms = [norm for child in module.children() if (norm := self.norms.get(child)) is not None]
        if len(parts) != 2 or len(norms) not in (0, 2) or not _is_attention(parts[0], parts[1], shape):
            return
        if any(len(norm.weight) != shape[1] for norm in norms):
            return
        named = [self.kernels.Norm(norm.weight, norm.eps, norm.centred) for norm in norms] or [None, None]
        base = module.forward
        fused = FusedAttention(
            self.kernels, base, layer, shape, self.seen.scores[layer], parts[0], parts[1], (named[0], named[1])
        )
        x, places = self._draw(1, TOKENS, parts[0].inp), self._places(shape[1])

        def run(forward: Callable[..., Any]) -> Tensor:
            with running(self._step({layer: shape})):
                y: Tensor = forward(hidden_states=x, position_embeddings=places, attention_mask=None)[0]
                return y

        if self._agree(lambda: run(base), lambda: run(fused.forward)):
            self._take("attention", module, fused)

    def _places(self, dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin of some angles, twice each, as transformers lays them out."""
        angles = torch.linspace(0, 3, TOKENS * dim // 2).view(1, TOKENS, -1).repeat(1, 1, 2)
        return angles.cos().to(self.device, self.dtype), angles.sin().to(self.device, self.dtype)

    def _step(self, layers: Mapping[int, LayerShape]) -> Step:
        """A prompt of TOKENS tokens over a pool of its own."""
        pool = PagePool(layers, 1, PAGE, self.dtype, self.device)
        lease = pool.start(None)
        if lease is None or not pool.grow(lease, TOKENS):
            raise RuntimeError("a pool of one page has no room for the proof")
        routing = Routing(TOKENS)
        return Step(routing, routing, pool.plan([Chunk(lease, 0, TOKENS, 0)], TOKENS))

    def _layers(self, callers: Mapping[int, int]) -> None:
        """All layers or none: each leaves a sum to the next one's norm, and the last to the norm behind them."""
        found = list(self._found(callers))
        if not found or len(found) != len(callers):
            return
        before = {module: module.forward for module, _ in found}
        want = self._whole()
        for module, fused in found:
            module.forward = fused.forward
        if self._agree(lambda: want, self._whole, WHOLE):
            self.done["layer"] = len(found)
            self._together(found, want)
        else:
            for module, forward in before.items():
                module.forward = forward

    def _together(self, found: Sequence[tuple[nn.Module, FusedLayer]], want: Tensor) -> None:
        """All layers as one, where the kernels have that."""
        layers = None if self.kernels.Layers is None else self.kernels.Layers.of([fused for _, fused in found])
        if layers is None:
            return
        for module, fused in found:
            module.forward = replace(fused, together=layers).forward
        if self._agree(lambda: want, self._whole, WHOLE):
            self.done["layers"] = 1
            return
        for module, fused in found:
            module.forward = fused.forward

    def _whole(self) -> Tensor:
        """Logits of a short prompt."""
        ids = torch.arange(1, TOKENS + 1, device=self.device)[None]
        with running(self._step(self.seen.layers)) as step:
            out: Tensor = self.module(input_ids=ids, position_ids=ids - 1, use_cache=False).logits
            if step.carry is not None:
                raise RuntimeError("nobody formed the last layer's sum")
            return out

    def _found(self, callers: Mapping[int, int]) -> Iterator[tuple[nn.Module, FusedLayer]]:
        for module in self.modules.values():
            children = [child for child in module.children() if list(child.parameters())]
            attention = [child for child in children if id(child) in callers]
            norms = [self.norms[child] for child in children if child in self.norms]
            rest = [child for child in children if child not in self.norms and child not in attention]
            if len(attention) == len(rest) == 1 and len(norms) == 2:
                parts = self.fused.get(attention[0]), self.fused.get(rest[0])
                yield module, FusedLayer(module.forward, attention[0], rest[0], norms[0], norms[1], *parts)


def _is_attention(mixed: LinearGroup, out: LinearGroup, shape: LayerShape) -> bool:
    """Whether these are q, k and v, as three Linears or one, and what follows: by their sizes."""
    kv_heads, dim, width = shape
    if len(out.outs) != 1 or dim != width or out.inp % dim:
        return False
    outs = (out.inp, kv_heads * dim, kv_heads * dim)
    return mixed.outs in (outs, (sum(outs),))


def fuse(
    kernels: ModuleType, module: PreTrainedModel, groups: Mapping[str, LinearGroup], seen: Probe, dtype: torch.dtype
) -> tuple[Sequence[str], Mapping[str, FusedNorm]]:
    """Gives modules of the base their fused forward; the names of the structures that were found, and by their paths
    the norms between blocks.
    """
    fuser = Fuser(kernels, module, groups, seen, dtype)
    names = [kind for kind, count in fuser.run().items() if count]
    return names, {norm.path: norm for norm in fuser.norms.values() if norm.between}
