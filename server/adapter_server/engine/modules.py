"""Sites that are no Linear: norms, embeddings, experts and routers; taps on the residual stream; attention's own.

Such a module becomes a site when the first adapter touches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adapter_server.engine.routing import Routing, Segment, Use, add_to, current
from adapter_server.families.base import AnyPatch, ParamPatch


class ModuleSite:
    """A module that is no Linear (embedding, norm, experts): its own forward for everybody, patched segments over it.

    `axis` is the tokens' in its input and output: norms of single heads see [1, heads, T, dim] in some models. One
    that is `fused` applies the patches itself, but for steps in which nothing is.
    """

    def __init__(self, path: str, module: nn.Module, axis: int, fused: bool) -> None:
        self.path, self.module, self.axis, self.fused = path, module, axis, fused
        self.base = module.forward
        module.forward = self.forward

    def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        step, more = current(), (*args, *kwargs.values())
        if step is not None and (given := step.given.get(self.path)) is not None:
            return given
        if step is None or step.routing.plain or self._applied(step.routing, x):
            plain: Tensor | tuple[Tensor, ...] = self.base(x, *args, **kwargs)
            return plain
        routing = step.routing
        here = [(s, patch) for s in routing.segments if (patch := s.placed.others.get(self.path))]
        if len(here) == 1 and here[0][0].count == routing.tokens and here[0][0].alone:
            return self._rounded(here[0][1].apply(x, self.module, *more), x)
        y: Tensor | tuple[Tensor, ...] = self.base(x, *args, **kwargs)
        if not here:
            return y
        return self._routed(x, y, routing) if isinstance(y, tuple) else self._patched(x, y, here, more)

    def _applied(self, routing: Routing, x: Tensor) -> bool:
        """Whether the module itself does what adapters want of it."""
        return self.fused and not routing.unfused and x.dtype == self.module.get_parameter("weight").dtype

    def _rounded(self, y: Tensor | tuple[Tensor, ...], x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """In the base's format, which an adapter in more bits leaves: the input's, or of ids the module's own."""
        if isinstance(y, tuple):
            return y
        return y.to(x.dtype if x.is_floating_point() else next(self.module.parameters()).dtype)

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
            if params := self._mixed(uses):
                tokens = (routing.use_of(x.device) == i).nonzero()[:, 0]
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


def stream(path: str) -> Tensor:
    """What the step's tap at a path has noted."""
    step = current()
    if step is None or path not in step.streams:
        raise RuntimeError(f"{path} was not called before the block that it leads into")
    return step.streams[path]


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
