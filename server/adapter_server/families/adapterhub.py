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
from adapter_server.families.bottleneck import Bottleneck, Gate, Options, again, left_out
from adapter_server.families.hublora import KNOWN as LORA
from adapter_server.families.hublora import REFUSED as NO_LORA
from adapter_server.families.hublora import Lora, Place
from adapter_server.families.options import Config, check_known, choice, flag, integer, refuse_set, table
from adapter_server.families.parts import Expected, Taker
from adapter_server.families.peanut import ACTIVATIONS
from adapter_server.registry.guard import adapterhub_kind

TOP = frozenset({"config", "hidden_size", "model_class", "model_name", "model_type", "name", "version"})
PREFIX = frozenset(
    {
        "architecture", "bottleneck_size", "cross_prefix", "dropout", "encoder_prefix", "flat", "init_weights_seed",
        "leave_out", "non_linearity", "prefix_length", "shared_gating", "use_gating",
    }
)  # fmt: skip
METHODS = {None: BOTTLENECK, "prefix_tuning": PREFIX, "lora": LORA}
KNOWN = (TOP | BOTTLENECK | PREFIX | {"configs"}) - {"use_gating"}
REFUSED = {"inv_adapter": "invertible adapters change the embeddings too; train without"}
Pairs = tuple[tuple[Tensor, Tensor], ...]
MAX_MEMBERS = 8
MAX_NUMBERS = 1 << 28  # in all projections


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a model type has its blocks below `layers`: each block's last Linear and the norm that reads the stream."""

    layers: str
    attention: tuple[str, str]
    feed: tuple[str, str]
    block: str  # the attention module
    attention_in: tuple[str, ...]  # the Linears of q, k and v, or the one that is all three
    intermediate: str  # what the library calls so; in Llama it is the last of the feed-forward
    output: str

    @property
    def root(self) -> str:
        """The model below its head."""
        return self.layers.partition(".")[0]


LLAMA = Layout(
    "model.layers", ("self_attn.o_proj", "input_layernorm"), ("mlp.down_proj", "post_attention_layernorm"), "self_attn",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj", "mlp.up_proj",
)  # fmt: skip
GPT2 = Layout(
    "transformer.h", ("attn.c_proj", "ln_1"), ("mlp.c_proj", "ln_2"), "attn", ("attn.c_attn",), "mlp.c_fc", "mlp.c_proj"
)
LAYOUTS: Mapping[str, Layout] = {"llama": LLAMA, "mistral": LLAMA, "gpt2": GPT2}


@dataclass(frozen=True, slots=True)
class File:
    """A file's config over a base: its members, each of one method."""

    name: str
    layout: Layout
    shapes: Shapes
    bottlenecks: tuple[Options, ...]
    prefix: Config | None
    lora: Lora | None = None

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
        own = f"prefix_tunings.{self.name}.self_prefix."
        layers = [f"{path}.prefix_tuning.pool.{own}" for path in self.attentions()]
        return [f"{self.layout.root}.prefix_tuning.{own}", *layers]

    def attentions(self) -> list[str]:
        """The path of each layer's attention."""
        return [f"{self.layout.layers}.{i}.{self.layout.block}" for i in range(self.shapes.layers)]

    def gates(self) -> dict[str, str]:
        """{path of an attention: how the names of its prefix's gate begin}; empty where it has none."""
        if self.prefix is None or not flag(self.prefix, "use_gating"):
            return {}
        return {path: f"{path}.prefix_tuning.prefix_gates.{self.name}." for path in self.attentions()}

    @property
    def prefix_gates(self) -> int:
        """Of a layer: one for keys and values, or one for each."""
        return 1 if flag({"shared_gating": True, **(self.prefix or {})}, "shared_gating") else 2

    def loras(self) -> Iterator[tuple[Place, str]]:
        """Each Linear with a LoRA, and how its tensors' names begin."""
        for place in self.lora.places() if self.lora else ():
            yield place, f"{place.path}.loras.{self.name}."

    def expected(self, names: frozenset[str]) -> Expected:
        """Every tensor of the file, `names` being those that it holds."""
        found = Expected()
        for options in self.bottlenecks:
            _check_size(2 * self.shapes.hidden * sum(options.width(layer) for layer, *_ in self.places(options)))
            for layer, at, _, _ in self.places(options):
                found |= options.expected(at, layer)
            found |= options.shared()
        for place, at in self.loras():
            found |= self.lora.expected(place, at) if self.lora else {}
        if self.prefix is None:
            return found
        for at in self.gates().values():
            found |= Gate.expected(at, self.prefix_gates, self.shapes.hidden)
        own = _prefix_expected(self.prefix, self.shapes)
        return found | {
            at + name: shape for at in self.prefixes() if _is_there(at, own, names) for name, shape in own.items()
        }

    def blocks(self, take: Taker) -> dict[str, Bottleneck]:
        """By the path of a block's last Linear."""
        read = again(take)
        return {
            linear: options.patch(at, layer, norm, read)
            for options in self.bottlenecks
            for layer, at, linear, norm in self.places(options)
        }

    def pairs(self, take: Taker, names: frozenset[str]) -> Pairs | None:
        """The prefix, ungated: per layer K, V [n, kv_heads, head_dim]."""
        return None if self.prefix is None else _prefix(self, self.prefix, take, names)


class AdapterHub:
    """A bottleneck, or several in one file."""

    name = "ADAPTERHUB"
    slow = False
    before_the_prompt = False

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        return self._file(config, shapes).expected(names)

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        file, take = self._file(spec.config, base.shapes), Taker(tensors)
        patches = {place.path: file.lora.patch(place, at, take) for place, at in file.loras()} if file.lora else {}
        blocks, prefix = file.blocks(take), file.pairs(take, frozenset(tensors))
        take.done()
        return Adapter(spec, patches, prefix=prefix, blocks=blocks, shifts=prefix is None)

    def virtual_tokens(self, config: Config) -> int:
        """Places that the prefix takes. The config may not have been checked yet."""
        members = _members(table(config, "config"))
        found = [m.get("prefix_length", 30) for m in members if m.get("architecture") == "prefix_tuning"]
        return found[0] if found and type(found[0]) is int else 0

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
        inner = table(config, "config")
        members = _members(inner)
        if (kind := adapterhub_kind(inner)) != self.name:
            raise AdapterRefused(f"adapter_config.json: 'peft_type' is {self.name}, and this config is {kind}")
        if len({m.get("architecture") for m in members}) < len(members):
            raise AdapterRefused("adapter_config.json: a union may hold each method once: bottleneck, prefix, LoRA")
        root = f"{layout.root}.shared_parameters.{name}."
        by = {m.get("architecture"): m for m in members}
        plain = (Options(by[None], shapes.hidden, root),) if None in by else ()
        lora = _lora(by["lora"], layout, shapes) if "lora" in by else None
        return File(name, layout, shapes, plain, by.get("prefix_tuning"), lora)


class Prefixed(AdapterHub):
    """A prefix, alone or beside a bottleneck (MAM)."""

    name = "ADAPTERHUB_PREFIX"
    before_the_prompt = True


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
        if not (architecture is None or isinstance(architecture, str)) or architecture not in METHODS:
            raise AdapterRefused(
                f"adapter_config.json: AdapterHub's {str(architecture)[:40]!r} is not served; train it with PEFT"
            )
        check_known(member, METHODS[architecture] | NO_LORA.keys())
    return inner


def _lora(config: Config, layout: Layout, shapes: Shapes) -> Lora:
    return Lora(config, shapes, layout.layers, layout.attention_in, layout.intermediate, layout.output)


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


def _prefix(file: File, config: Config, take: Taker, names: frozenset[str]) -> Pairs:
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
