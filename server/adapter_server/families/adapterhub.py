"""AdapterHub's files: bottleneck adapters (Houlsby, Pfeiffer, parallel), Compacter, prefix tuning, and MAM's union.

y the block's output, r the stream it is added to, f(x) = s·up(act(down(x)))     down [d,hidden]  up [hidden,d]

seq_bn (Pfeiffer)          y' = y + f(y + r)       after the feed-forward
double_seq_bn (Houlsby)    y' = y + f(y)           after attention and after the feed-forward
par_bn (parallel)          y' = y + f(r)           beside the feed-forward, s = 4
compacter                  the two projections are Kronecker sums: Σᵢ ruleᵢ ⊗ Wᵢ
prefix_tuning              K, V = mlp(embeddings), seen from positions that begin at 0
mam                        par_bn and prefix_tuning together
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, Base, Family, Shapes
from adapter_server.families.bottleneck import KNOWN as BOTTLENECK
from adapter_server.families.bottleneck import Options, again, left_out
from adapter_server.families.options import Config, check_known, choice, flag, integer, refuse_set, table
from adapter_server.families.parts import Expected, Taker
from adapter_server.families.peanut import ACTIVATIONS

TOP = frozenset({"config", "hidden_size", "model_class", "model_name", "model_type", "name", "version"})
PREFIX = frozenset(
    {
        "architecture", "bottleneck_size", "cross_prefix", "dropout", "encoder_prefix", "flat", "init_weights_seed",
        "leave_out", "non_linearity", "prefix_length", "shared_gating", "use_gating",
    }
)  # fmt: skip
KNOWN = TOP | BOTTLENECK | PREFIX | {"configs"}
REFUSED = {
    "use_gating": "its gates (UniPELT) are means over a whole call, so later tokens change earlier ones; train without",
    "inv_adapter": "invertible adapters change the embeddings too; train without",
}
MAX_MEMBERS = 8
MAX_NUMBERS = 1 << 28  # in all projections


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a model type has its blocks below `layers`: each block's last Linear and the norm that reads the stream."""

    layers: str
    attention: tuple[str, str]
    feed: tuple[str, str]
    block: str  # the attention module

    @property
    def root(self) -> str:
        """The model below its head."""
        return self.layers.partition(".")[0]


LLAMA = Layout(
    "model.layers", ("self_attn.o_proj", "input_layernorm"), ("mlp.down_proj", "post_attention_layernorm"), "self_attn"
)
GPT2 = Layout("transformer.h", ("attn.c_proj", "ln_1"), ("mlp.c_proj", "ln_2"), "attn")
LAYOUTS: Mapping[str, Layout] = {"llama": LLAMA, "mistral": LLAMA, "gpt2": GPT2}


@dataclass(frozen=True, slots=True)
class File:
    """A file's config over a base: its members, each of one method."""

    name: str
    layout: Layout
    shapes: Shapes
    bottlenecks: tuple[Options, ...]
    prefix: Config | None

    def places(self, options: Options) -> Iterator[tuple[int, str, str, str]]:
        """Each module of a bottleneck: (layer, how its names begin, its Linear's path, the path that it reads)."""
        layout = self.layout
        for layer in range(self.shapes.layers):
            for key, at, (linear, norm) in (
                ("mh_adapter", "attention_adapters", layout.attention),
                ("output_adapter", "output_adapters", layout.feed),
            ):
                below = f"{layout.layers}.{layer}."
                if options.covers(layer, key):
                    yield layer, f"{below}{at}.adapters.{self.name}.", below + linear, below + norm

    def prefixes(self) -> list[str]:
        """The beginnings under which the one prefix stands in the file: its pool's, and again at every layer."""
        layout, own = self.layout, f"prefix_tunings.{self.name}.self_prefix."
        layers = [f"{layout.layers}.{i}.{layout.block}.prefix_tuning.pool.{own}" for i in range(self.shapes.layers)]
        return [f"{layout.root}.prefix_tuning.{own}", *layers]


class AdapterHub:
    """A bottleneck, or several in one file."""

    name = "ADAPTERHUB"
    slow = False
    before_the_prompt = False

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        file, found = self._file(config, shapes), Expected()
        for options in file.bottlenecks:
            _check_size(2 * shapes.hidden * sum(options.width(layer) for layer, *_ in file.places(options)))
            for layer, at, _, _ in file.places(options):
                found |= options.expected(at, layer)
            found |= options.shared()
        if file.prefix is not None:
            own = _prefix_expected(file.prefix, shapes)
            found |= {
                at + name: shape for at in file.prefixes() if _is_there(at, own, names) for name, shape in own.items()
            }
        return found

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        file, take = self._file(spec.config, base.shapes), Taker(tensors)
        read = again(take)
        blocks = {
            linear: options.patch(at, layer, norm, read)
            for options in file.bottlenecks
            for layer, at, linear, norm in file.places(options)
        }
        prefix = None if file.prefix is None else _prefix(file, file.prefix, take, frozenset(tensors))
        take.done()
        return Adapter(spec, prefix=prefix, blocks=blocks, shifts=prefix is None)

    def _file(self, config: Config, shapes: Shapes) -> File:
        check_known(config, TOP)
        name, layout = config.get("name"), LAYOUTS.get(str(config.get("model_type")))
        if not isinstance(name, str) or not 0 < len(name) <= 128:
            raise AdapterRefused("adapter_config.json: 'name' must be the name under which the tensors are saved")
        if layout is None or f"{layout.layers}.0.{layout.attention[0]}" not in shapes.modules:
            raise AdapterRefused(
                f"adapter_config.json: 'model_type' must be this base's and one of {', '.join(LAYOUTS)}: where another "
                "model's blocks end is not known"
            )
        members = _members(table(config, "config"))
        prefixes = [m for m in members if m.get("architecture") == "prefix_tuning"]
        root = f"{layout.root}.shared_parameters.{name}."
        plain = tuple(Options(m, shapes.hidden, root) for m in members if m.get("architecture") is None)
        if len(prefixes) > 1 or len(plain) > 1 or bool(prefixes) != self.before_the_prompt:
            raise AdapterRefused("adapter_config.json: a union may hold one bottleneck and one prefix, each once")
        return File(name, layout, shapes, plain, prefixes[0] if prefixes else None)


class Prefixed(AdapterHub):
    """A prefix, alone or beside a bottleneck (MAM)."""

    name = "ADAPTERHUB_PREFIX"
    before_the_prompt = True

    def virtual_tokens(self, config: Config) -> int:
        """Places that the prefix takes. The config may not have been checked yet."""
        members = _members(table(config, "config"))
        found = [m.get("prefix_length", 30) for m in members if m.get("architecture") == "prefix_tuning"]
        return found[0] if found and type(found[0]) is int else 0


def _check_size(numbers: int) -> None:
    """Kronecker sums are small in the file and unfold into plain matrices."""
    if numbers > MAX_NUMBERS:
        raise AdapterRefused(
            f"adapter_config.json: 'reduction_factor' makes {numbers:,} numbers, beyond {MAX_NUMBERS:,}; raise it"
        )


def _members(config: Config) -> list[Config]:
    """The methods of a file. Refuses what none of them knows, and methods that PEFT has a format for."""
    inner = config.get("configs") if config.get("architecture") == "union" else [config]
    if not isinstance(inner, list) or not 0 < len(inner) <= MAX_MEMBERS or not all(isinstance(m, dict) for m in inner):
        raise AdapterRefused("adapter_config.json: 'configs' must be a list of configs")
    for member in inner:
        architecture = member.get("architecture")
        refuse_set(member, REFUSED)
        if architecture not in (None, "prefix_tuning"):
            raise AdapterRefused(
                f"adapter_config.json: AdapterHub's {str(architecture)[:40]!r} is not served; train it with PEFT"
            )
        check_known(member, PREFIX if architecture else BOTTLENECK)
    return inner


def _prefix_expected(config: Config, shapes: Shapes) -> Expected:
    n, width = _length(config), shapes.layers * 2 * shapes.kv_heads * shapes.head_dim
    if left_out(config):
        raise AdapterRefused("adapter_config.json: 'leave_out' is not served for a prefix: every layer needs one")
    if flag(config, "flat"):
        return {"control_trans": (n * width,)}
    inner = integer(config, "bottleneck_size", 512, most=1 << 16)
    return {
        "wte.weight": (n, shapes.hidden),
        "control_trans.0.weight": (inner, shapes.hidden),
        "control_trans.0.bias": (inner,),
        "control_trans.2.weight": (width, inner),
        "control_trans.2.bias": (width,),
    }


def _length(config: Config) -> int:
    return integer(config, "prefix_length", 30, most=1 << 16)


def _is_there(at: str, own: Expected, names: frozenset[str]) -> bool:
    """The first is needed; the copies that the library writes beside it are taken where they are."""
    return ".pool." not in at or any(at + name in names for name in own)


def _prefix(file: File, config: Config, take: Taker, names: frozenset[str]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Per layer K, V [n, kv_heads, head_dim]."""
    own, shapes = _prefix_expected(config, file.shapes), file.shapes
    first, *copies = (at for at in file.prefixes() if _is_there(at, own, names))
    tensors = {name: take(first + name) for name in own}
    for at in copies:
        if any(not torch.equal(take(at + name), tensors[name]) for name in own):
            raise AdapterRefused(f"the file holds two different prefixes, at {first} and {at}")
    flat = tensors["control_trans"] if "control_trans" in tensors else _mlp(tensors, config)
    pairs = flat.view(_length(config), 2 * shapes.layers, shapes.kv_heads, shapes.head_dim)
    return tuple((pairs[:, 2 * i].clone(), pairs[:, 2 * i + 1].clone()) for i in range(shapes.layers))


def _mlp(tensors: Mapping[str, Tensor], config: Config) -> Tensor:
    act: Callable[[Tensor], Tensor] = ACTIVATIONS[choice(config, "non_linearity", "tanh", ACTIVATIONS)]
    inner = act(F.linear(tensors["wte.weight"], tensors["control_trans.0.weight"], tensors["control_trans.0.bias"]))
    return F.linear(inner, tensors["control_trans.2.weight"], tensors["control_trans.2.bias"])


FAMILIES: tuple[Family, ...] = (AdapterHub(), Prefixed())
