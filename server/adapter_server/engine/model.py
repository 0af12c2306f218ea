"""The base model, made ready: its attention packed, its modules turned into sites, its structure read from one look.

Nothing is recognised by name. Which Linears read the same input, how many keys and values a layer has, and whether
every layer's attention goes through transformers' AttentionInterface, is seen in two short forwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from adapter_server.engine import few, forms
from adapter_server.engine.attention import NAME, Probe, set_probe
from adapter_server.engine.fused import FusedNorm, fuse
from adapter_server.engine.int8 import hold_in_int8
from adapter_server.engine.kv import LayerShape, bytes_per_token
from adapter_server.engine.modules import AttentionSite, ModuleSite, Tap
from adapter_server.engine.pauses import Pause, at_once
from adapter_server.engine.placed import Dtypes, GroupPatch, Placed, Prefix, Product
from adapter_server.engine.ring import Ring
from adapter_server.engine.routing import Routing, Step, current, running
from adapter_server.engine.site import LinearGroup, group_by_input
from adapter_server.engine.tree import Tree, Trees
from adapter_server.errors import AdapterRefused, BaseNotSupported
from adapter_server.families.base import Adapter, EmbeddingPatch, Patch, Shapes
from adapter_server.families.facts import ModelBase, owns
from adapter_server.families.quantised import is_quantised, plain_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(source: str | Path, dtype: str, device: torch.device, quantize: str = "none") -> PreTrainedModel:
    """The base from a hub id or a local folder. "auto": float32 on the CPU, the checkpoint's own dtype elsewhere."""
    wanted: Any = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else "auto")
    extra: dict[str, Any] = {}
    int8_here = quantize == "cpu-int8"
    if int8_here and device.type != "cpu":
        raise BaseNotSupported("--quantize cpu-int8 is for the CPU: choose nf4, fp4 or int8 on another device")
    if quantize != "none" and not int8_here:
        extra = {"quantization_config": _bitsandbytes(quantize, wanted), "device_map": {"": device}}
    try:
        config = AutoConfig.from_pretrained(source)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(source, config=config, dtype=wanted, **extra)
    except (OSError, ValueError) as error:
        raise BaseNotSupported(f"{source}: {error}") from error
    model = _plain(model) if extra else model.to(device).eval()
    return hold_in_int8(model) if int8_here else model


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Keeps bitsandbytes from packing 4-bit weights anew for some processors, in place: a base is not written."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _bitsandbytes(kind: str, dtype: Any) -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise BaseNotSupported('--quantize needs bitsandbytes: pip install "adapter-server[quantized]"')
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=compute)


class Model:
    """A base model whose forward runs the rows of a step, each under its own adapters: the packed lane."""

    lane = "packed"
    why = "every layer's attention goes through transformers' AttentionInterface"

    ring: Ring | None = None  # through which adapters reach the device
    plain: Tree | None = None  # what runs the base's rows, where no packed forward does
    pause: Pause = staticmethod(at_once)  # before each group of an adapter is laid out

    def __init__(
        self,
        module: PreTrainedModel,
        pack: bool = True,
        trees: Trees | None = None,
        adapters: torch.dtype = torch.float32,
        kernels: bool = True,
        fuse: bool = True,
    ) -> None:
        """`adapters`: the dtype that they are held and added in; float32 is PEFT's rule over any base."""
        self.trees = trees or Trees(module)
        self.module = module.eval().requires_grad_(False)
        self.device, self.dtype = module.device, module.dtype
        self.adapter_dtype = adapters
        self.base = ModelBase(module)
        self.lowrank = forms.low_rank(self.device, self.dtype, self.adapter_dtype, kernels)
        self._modules = dict(module.named_modules())
        self._sites: dict[str, ModuleSite] = {}
        self._behind: dict[str, AttentionSite] = {}
        self._taps: dict[str, Tap] = {}
        self._adopt()
        self.seen = self._seen()
        self.layers = self.seen.layers
        self.base.shapes = _as_seen(self.base.shapes, self.layers)
        calls, self._axes = self._look()
        self.groups = self._install(group_by_input(calls), pack)
        self._group_of = {path: group for group in self.groups for path in group.paths}
        self.head_index = next((group.index for group in self.groups if group.head), None)
        self.stable_rope = not _rope_by_row(self._modules)
        self.rope_border = _rope_border(module.config.get_text_config())
        self.loading = _stream(self.device)
        self._choose_few(kernels and fuse)
        self.fused, self.norms = self._fused(kernels and fuse)

    def _fused(self, wanted: bool) -> tuple[Sequence[str], Mapping[str, FusedNorm]]:
        """What runs in fewer launches."""
        found = forms.between(self.device, self.dtype, wanted)
        return ((), {}) if found is None else fuse(found, self.module, self._group_of, self.seen, self.dtype)

    def _choose_few(self, wanted: bool) -> None:
        """Products with few rows get the form that is faster here."""
        if wanted and self.device.type == "cuda" and (found := forms.kernels()) is not None:
            few.choose(found, [group.base for group in self.groups if isinstance(group.base, Product)])

    @property
    def _dtypes(self) -> Dtypes:
        return Dtypes(self.dtype, self.adapter_dtype)

    def _adopt(self) -> None:
        self.module.set_attn_implementation(NAME)

    def _seen(self) -> Probe:
        """What attention sees of each layer: (kv_heads, key dim, value dim) and more. Raises BaseNotSupported."""
        probe = Probe()
        set_probe(probe)
        try:
            self._try(2)
        finally:
            set_probe(None)
        layers = self.base.shapes.layers
        if sorted(probe.layers) != list(range(layers)):
            raise BaseNotSupported(
                f"{type(self.module).__name__}: {len(probe.layers)} of {layers} layers call transformers' "
                "AttentionInterface; a base must call it in every layer, with keys and values of its own"
            )
        return probe

    def _look(self) -> tuple[list[tuple[str, int]], dict[str, int]]:
        """(Linear's path, identity of its input) in order of calls; and the axis of the tokens in every module's input,
        which is the one that grows with them.
        """
        first, second = Calls(), Calls()
        for tokens, calls in ((2, first), (3, second)):
            with calls.noted(self._modules):
                self._try(tokens)
        linear = [(path, identity) for path, identity, _ in first.made if _is_linear(self._modules[path])]
        return linear, _token_axes(first, second)

    @torch.inference_mode()
    def _try(self, tokens: int) -> None:
        self.module(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=self.device), use_cache=False)

    def _install(self, found: Sequence[Sequence[str]], pack: bool) -> list[LinearGroup]:
        head = self.module.get_output_embeddings()
        groups: list[LinearGroup] = []
        for paths in found:
            for part in self._alike(list(dict.fromkeys(paths)), head):
                modules = {p: self._modules[p] for p in part}
                is_head = any(module is head for module in modules.values())
                groups.append(LinearGroup(len(groups), modules, self.lowrank, pack, is_head, self._dtypes))
                groups[-1].install(modules)
        return groups

    def _alike(self, paths: list[str], head: nn.Module | None) -> list[list[str]]:
        """A group is nn.Linears that own their weight; anything else stands alone."""
        shared = [p for p in paths if isinstance(self._modules[p], nn.Linear) and self._modules[p] is not head]
        return ([shared] if shared else []) + [[p] for p in paths if p not in shared]

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in all layers."""
        return bytes_per_token(self.layers, self.dtype)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Where a loader's thread works: on a stream of its own, so that no step waits for it. Done when it returns."""
        if self.loading is None:
            yield
            return
        with torch.cuda.stream(self.loading):
            yield
        self.loading.synchronize()

    def place(self, adapter: Adapter) -> Placed:
        """Lay an adapter out for the run. Slow part of a load; called on a loader's thread."""
        if adapter.graft is not None:
            return self.trees.place(adapter)
        linear = {path: p for path, p in adapter.patches.items() if isinstance(p, Patch)}
        at_linears = linear.keys() | adapter.skills.keys() | adapter.blocks.keys()
        missing = [path for path in at_linears if path not in self._group_of]
        missing += [path for path in adapter.patches.keys() - at_linears if path not in self._axes]
        if missing:
            raise AdapterRefused(f"{adapter.spec.name}: the base's forward never calls {', '.join(missing[:3])}")
        self._check_prefix(adapter)
        indices = sorted({self._group_of[path].index for path in linear})
        groups = {i: self._laid(self.groups[i], linear) for i in indices}
        for path, block in adapter.blocks.items():
            group = self._group_of[path]
            groups[group.index] = group.place_block(block)
        others = {
            path: p.to(self.device, self.adapter_dtype if isinstance(p, EmbeddingPatch) else self.dtype)
            for path, p in adapter.patches.items()
            if not isinstance(p, Patch)
        }
        before = replace(adapter, patches={}, blocks={}).to(self.device, self.dtype)
        prefixes: dict[int | None, Prefix] = {}
        if before.prefix is not None:
            prefixes[None] = Prefix(before.prefix, adapter.shifts)
        gated = {self._layer_of(path): prompt for path, prompt in before.gated.items()}
        return Placed(before, groups, others, prefixes, gated, unfused=self._unfused(adapter))

    def _unfused(self, adapter: Adapter) -> bool:
        """Whether it acts elsewhere than at Linears, the embedding and norms between blocks, and behind these."""
        others = {path: patch for path, patch in adapter.patches.items() if not isinstance(patch, Patch)}
        taken = {path for path, patch in others.items() if (n := self.norms.get(path)) is not None and n.takes(patch)}
        reads = {block.reads for block in adapter.blocks.values()}
        return bool(adapter.gated or others.keys() - taken - {self.base.shapes.embed} or reads - self.norms.keys())

    def _laid(self, group: LinearGroup, patches: Mapping[str, Patch]) -> GroupPatch:
        """A group's part of an adapter. A snapshot's is waited for before the next one is begun: a step that comes
        meanwhile finds the work of one group before it on the device, not of all.
        """
        self.pause()
        made = group.place(patches if self.ring is None else _sent(group, patches, self.ring))
        if made.product is not None and self.loading is not None:
            self.loading.synchronize()
        return made

    def _layer_of(self, path: str) -> int:
        return int(self._modules[path].layer_idx)

    def _check_prefix(self, adapter: Adapter) -> None:
        if not adapter.shifts and getattr(self.module.config.get_text_config(), "sliding_window", None):
            raise AdapterRefused(
                f"{adapter.spec.name}: its prefix is seen from everywhere, and this base's windows would slide past it"
            )
        for (k, v), (layer, (heads, dk, dv)) in zip(adapter.prefix or (), sorted(self.layers.items()), strict=False):
            if (k.shape[1:], v.shape[1:]) != ((heads, dk), (heads, dv)):
                raise AdapterRefused(
                    f"{adapter.spec.name}: its prefix has keys {tuple(k.shape[1:])} at layer {layer}, the base's are "
                    f"{(heads, dk)}: it was trained for a base of other heads"
                )

    def install_sites(self, placed: Placed) -> None:
        """Turn the modules that are no Linear, and that this adapter touches, into sites. On the engine's thread."""
        for path in placed.others:
            if path not in self._sites:
                self._sites[path] = ModuleSite(path, self._modules[path], self._axes[path], path in self.norms)
        for path, prompt in placed.adapter.gated.items():
            if prompt.behind and path not in self._behind:
                self._behind[path] = AttentionSite(self._layer_of(path), self._modules[path])
        for patch in placed.groups.values():
            if patch.block is not None and patch.block.reads not in self._taps:
                self._taps[patch.block.reads] = Tap(patch.block.reads, self._modules[patch.block.reads])

    def folded_bytes(self, placed: Placed) -> int:
        """About what a snapshot of an adapter takes: the weights of the Linears that it touches."""
        return sum(self.groups[i].folded_bytes for i in placed.groups)

    def forget(self, placed: Placed) -> None:
        for each in (placed, *placed.tasks.values()):
            self.lowrank.forget(each)
        if placed.tree is not None:
            placed.tree.release()

    def split(self, counts: list[int]) -> list[list[int]]:
        """Which of a step's rows, by their counts of tokens, run in one forward: here all of them."""
        return [list(range(len(counts)))]

    @torch.inference_mode()
    def forward(self, step: Step, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """ids, positions [T]; keep [n] the tokens whose logits are wanted → [n, vocab]."""
        with running(step):
            out = self.module(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep)
        logits: Tensor = out.logits[0]
        return logits

    @torch.inference_mode()
    def encode(self, embeds: Tensor) -> Prefix:
        """The keys and values of a soft prompt, embeds [n, hidden], at positions 0..n−1 of the plain base."""
        n = embeds.shape[0]
        step = Step(Routing(n), Routing(1), capture={}, rope_lengths=[(n, n)])
        with running(step):
            self.module(
                inputs_embeds=embeds[None], position_ids=torch.arange(n, device=self.device)[None], use_cache=False,
                logits_to_keep=1,
            )  # fmt: skip
        kept = step.capture or {}
        return Prefix(tuple(kept[i] for i in range(len(kept))))

    def digest(self) -> str:
        """sha256 over every tensor of the base: the proof that serving never writes to it."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            sha.update(name.encode())
            for part in plain_tensors(tensor.detach()):
                sha.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _sent(group: LinearGroup, patches: Mapping[str, Patch], ring: Ring) -> Mapping[str, Patch]:
    """A group's patches, their low ranks, which are most of an adapter, on the device already: it lays them out."""
    mine = {path: group.lowrank.laid(patches[path]) for path in group.paths if path in patches}
    pairs = [(path, p.A, p.B) for path, p in mine.items() if p.A is not None and p.B is not None]
    sent = iter(ring.send([t for _, A, B in pairs for t in (A, B)]))
    return mine | {path: replace(mine[path], A=next(sent), B=next(sent)) for path, _, _ in pairs}


def _as_seen(shapes: Shapes, layers: Mapping[int, LayerShape]) -> Shapes:
    """The shapes with the heads that attention really has; a config may not say."""
    seen = set(layers.values())
    if len(seen) > 1:
        return shapes
    heads, dim, _ = seen.pop()
    return replace(shapes, kv_heads=heads, head_dim=dim)


def _is_linear(module: nn.Module) -> bool:
    """A Conv1D, or a Linear by nature too: a subclass with another forward is tried out (some routers are none)."""
    if is_quantised(module):
        return True
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    weight = module.weight
    if weight.shape != (module.out_features, module.in_features):
        return False
    with torch.inference_mode():
        x = torch.linspace(-1, 1, 2 * module.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
        y = module(x)
        return isinstance(y, Tensor) and torch.allclose(y, nn.functional.linear(x, weight, module.bias), atol=1e-5)


class Calls:
    """What the modules were called with in one forward: (path, identity of the input, its shape), in order."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, tuple[int, ...]]] = []
        self._kept: list[Tensor] = []  # alive, so that no identity is used twice

    @contextmanager
    def noted(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        owners = [(p, m) for p, m in modules.items() if owns(m)]
        hooks = [module.register_forward_pre_hook(self._hook(path)) for path, module in owners]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self._kept.append(args[0])
                self.made.append((path, id(args[0]), tuple(args[0].shape)))

        return note


def _token_axes(first: Calls, second: Calls) -> dict[str, int]:
    longer = {path: shape for path, _, shape in second.made}
    pairs = {path: (shape, longer.get(path, shape)) for path, _, shape in first.made}
    return {path: next((i for i, (a, b) in enumerate(zip(*p, strict=True)) if a != b), 0) for path, p in pairs.items()}


def _rope_by_row(modules: Mapping[str, nn.Module]) -> bool:
    """RoPE variants that look at the batch's longest position (dynamic, longrope) are asked row by row; whether there
    are any: then a token's key depends on how long its row is.
    """
    found = False
    for module in modules.values():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if kinds & {"dynamic", "longrope"}:
            module.forward = _per_row(module, module.forward)
            found = True
    return found


def _rope_border(config: Any) -> int | None:
    """The length at which a longrope model changes its frequencies and computes a row anew (`modeling_phi3.py`)."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return getattr(config, "original_max_position_embeddings", None) if kind == "longrope" else None


def context_length(config: Any) -> int:
    """Tokens of context that the base is made for; dynamic RoPE stretches what the config says."""
    own = getattr(config, "max_position_embeddings", 0) or 1 << 20
    rope = getattr(config, "rope_parameters", None) or {}
    return int(own * rope.get("factor", 1)) if rope.get("rope_type") == "dynamic" else own


def _per_row(module: nn.Module, forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Each row alone, beside a last position that stands for its length; what the variant remembers is reset."""
    fresh = {k: v for k, v in vars(module).items() if k.endswith("max_seq_len_cached")}
    buffers = {k: b.clone() for k, b in module.named_buffers(recurse=False)}

    def reset() -> None:
        for name, value in fresh.items():
            setattr(module, name, value)
        for name, buffer in buffers.items():
            module._buffers[name] = buffer.clone()

    def row(x: Tensor, positions: Tensor, length: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        reset()
        last = positions.new_full((1, 1), length - 1)
        cos, sin = forward(x, torch.cat([positions, last], 1), *args, **kwargs)
        return cos[:, :-1], sin[:, :-1]

    def by_row(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        step = current()
        if step is None or not step.rope_lengths:
            return forward(x, position_ids, *args, **kwargs)
        at, parts = 0, []
        for count, length in step.rope_lengths:
            parts.append(row(x, position_ids[:, at : at + count], length, *args, **kwargs))
            at += count
        return torch.cat([cos for cos, _ in parts], 1), torch.cat([sin for _, sin in parts], 1)

    return by_row
