"""AdapterHub's gated methods (UniPELT), and its LoRA beside others: hooks on a tree of modules, in the `peft` lane.

g(x) = the mean of sigmoid(W x + c) over all tokens of the call, so that each new token changes what all before it were

LoRA         y = W x + b + g(x)·B A x                     without a gate s = α / r in its place
prefix       K, V = g(h)·mlp(embeddings)                  h what the attention reads; one gate for both, or two
bottleneck   y' = y + g(x)·f(x)                           as in the packed lane but for the gate

What is right is the library's own forward over the whole text so far, without a cache, at every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_server.core import Spec
from adapter_server.families.adapterhub import KNOWN as ADAPTERHUB
from adapter_server.families.adapterhub import REFUSED as NOT_SERVED
from adapter_server.families.adapterhub import AdapterHub, File
from adapter_server.families.base import Adapter, Base, Graft, Shapes
from adapter_server.families.bottleneck import Bottleneck, Gate
from adapter_server.families.deltas import TensorFields
from adapter_server.families.facts import describe
from adapter_server.families.hublora import KNOWN as LORA
from adapter_server.families.hublora import REFUSED as NO_LORA
from adapter_server.families.hublora import GatedLowRank
from adapter_server.families.options import Config
from adapter_server.families.parts import Taker

KNOWN = ADAPTERHUB | LORA | {"use_gating"}
REFUSED = NOT_SERVED | NO_LORA
NAME = "ADAPTERHUB_UNIPELT"
Part = TypeVar("Part", bound=TensorFields)
ATTENTION = "adapter_server_prefix"  # what the attention with a prefix is called in transformers' interface


@dataclass(frozen=True, slots=True, eq=False)
class GatedPrefix(TensorFields):
    """Keys and values of one layer, to be gated by what the layer's attention reads."""

    K: Tensor  # [1, kv_heads, n, head_dim]
    V: Tensor  # [1, kv_heads, n, head_dim]
    gate: Gate | None = None  # one for both, or two

    def pair(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [1, T, hidden], all tokens of the call → K, V."""
        if self.gate is None:
            return self.K, self.V
        gates = self.gate.mean(hidden)[..., None]  # [1, 1, 1 or 2, 1]
        return self.K * gates[:, :, :1], self.V * gates[:, :, -1:]


@dataclass(frozen=True, slots=True)
class Parts:
    """A file as what is hooked, each by the path of its module."""

    low: Mapping[str, GatedLowRank]
    blocks: Mapping[str, Bottleneck]
    prefixes: Mapping[str, GatedPrefix]


class UniPelt(AdapterHub):
    """A gated method, alone or in a union; or a union with a LoRA in it."""

    name = NAME

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        self.parts(spec.config, tensors, base.shapes)
        return Adapter(spec, graft=Graft(NAME, spec.config, dict(tensors), mergeable=False, hooked=True))

    def parts(self, config: Config, tensors: Mapping[str, Tensor], shapes: Shapes) -> Parts:
        """Every tensor of the file taken, float32. Raises AdapterRefused."""
        file, take = self._file(config, shapes), Taker(tensors)
        low = {place.path: file.lora.low_rank(place, at, take) for place, at in file.loras()} if file.lora else {}
        parts = Parts(low, file.blocks(take), _prefixes(file, take, frozenset(tensors)))
        take.done()
        return parts


FAMILY = UniPelt()


def _prefixes(file: File, take: Taker, names: frozenset[str]) -> dict[str, GatedPrefix]:
    pairs, gates = file.pairs(take, names) or (), file.gates()
    read = {path: Gate.read(at, take) for path, at in gates.items()}
    return {
        path: GatedPrefix(K.transpose(0, 1)[None], V.transpose(0, 1)[None], read.get(path))
        for path, (K, V) in zip(file.attentions(), pairs, strict=False)
    }


def attach(tree: Any, graft: Graft) -> Any:
    """The adapter's hooks on a tree of the base's modules. Its tensors become the tree's buffers."""
    parts = FAMILY.parts(graft.config, graft.tensors, describe(tree))
    for path, low in parts.low.items():  # before the blocks: a bottleneck reads what the Linear gives with its LoRA
        _add(tree.get_submodule(path), _kept(tree, low))
    for path, block in parts.blocks.items():
        _follow(tree.get_submodule(block.reads), tree.get_submodule(path), _kept(tree, block))
    for path, prefix in parts.prefixes.items():
        _precede(tree.get_submodule(path), _kept(tree, prefix))
    if parts.prefixes:
        _register()
        tree.config._attn_implementation = ATTENTION
    return tree.eval()


def _kept(tree: Any, part: Part) -> Part:
    """The part on the tree's device, its tensors counted and released with the tree's."""
    moved = part.to(tree.device, tree.dtype)
    for tensor in moved.tensors():
        tree.register_buffer(f"adapter_{len(tree._buffers)}", tensor, persistent=False)
    return moved


def _add(linear: nn.Module, low: GatedLowRank) -> None:
    linear.register_forward_hook(lambda module, args, y: y + low.term(args[0]))


def _follow(norm: nn.Module, linear: nn.Module, block: Bottleneck) -> None:
    """`norm` reads the stream that what `linear` gives is added to."""
    seen: dict[str, Tensor] = {}
    norm.register_forward_pre_hook(lambda module, args: seen.update(r=args[0]))
    linear.register_forward_hook(lambda module, args, y: block.apply(y, seen.pop("r")))


def _precede(attention: nn.Module, prefix: GatedPrefix) -> None:
    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "prefix": prefix.pair(hidden)}

    attention.register_forward_pre_hook(give, with_kwargs=True)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _mask(*args: Any, **kwargs: Any) -> Tensor:
    """Who sees whom, [1, 1, T, T]; written out, since what stands before it makes it no square."""
    from transformers.masking_utils import sdpa_mask

    mask: Tensor = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, prefix: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Every token sees the whole prefix, also where a window slides over the text."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    K, V = (torch.cat((own, rest), 2) for own, rest in zip(prefix, (key, value), strict=True))
    mask = F.pad(attention_mask, (prefix[0].shape[2], 0), value=True)
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, K, V, mask, **kwargs)
    return out
