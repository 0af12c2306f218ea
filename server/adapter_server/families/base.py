"""An adapter compiles to data: the three places it touches, and the normal form of what it does at a module.

    at a module         patches: {module path: Patch}
    before the cache    prefix:  (K, V) per layer, written raw at positions 0..n-1
    before the prompt   embeds:  [n, hidden], fed in front of the prompt's embeddings

The normal form, for every kind that PEFT has at a Linear (shapes per module, tokens in rows):

    u = gain * W' (in_scale * x R) + B (A x) + ΔW x + b + bias        y = out_scale * u + mirror(u)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapter_server.core import Spec
from adapter_server.families.deltas import Delta, Kronecker, Mirror, Rows, Scaled, TensorFields, Turn, held_bytes
from adapter_server.families.quantised import dequantised, is_quantised

Kind = Literal["linear", "conv1d", "embedding", "experts", "experts_transposed", "other"]


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """What a family may know of a base module without its weights. Linear and Conv1D: y [out] from x [in]."""

    kind: Kind
    inp: int  # in_features; an embedding's vocabulary
    out: int  # out_features; an embedding's width
    params: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # own parameters as stored: {"weight": (…)}

    @property
    def has_bias(self) -> bool:
        return "bias" in self.params


@dataclass(frozen=True, slots=True)
class Shapes:
    """The base's shapes: enough for `expected`, read from the model on any device, meta included."""

    modules: Mapping[str, ModuleShape]
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    tied: bool = False  # lm_head shares the embedding's weight
    scaled_embeddings: Mapping[str, float] = field(default_factory=dict)  # module path: factor applied after look-up
    embed: str = ""  # path of the input embedding
    head: str = ""  # path of the output embedding
    model_type: str = ""  # as transformers calls the architecture
    by_peft: bool = False  # no patch reaches this base: PEFT itself puts every adapter into it


class Base(Protocol):
    """What a family's `load` may ask of the base. Weights come out float32, [out, in], as private copies."""

    shapes: Shapes

    def weight(self, path: str) -> Tensor: ...

    def bias(self, path: str) -> Tensor | None: ...

    def param(self, path: str, name: str) -> Tensor: ...


@runtime_checkable
class AnyPatch(Protocol):
    """What the engine needs of a patch at a module: apply it to tokens, or fold it into the module's parameters."""

    def apply(self, x: Tensor, module: nn.Module, *more: Tensor) -> Tensor:
        """The patched module's output for x and what else it is called with, `module` being the pristine one."""

    def fold(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's float32 parameters (a Linear's weight as [out, in]) with the patch folded in; new tensors."""

    def tensors(self) -> Iterator[Tensor]: ...

    def to(self, device: torch.device, dtype: torch.dtype) -> AnyPatch: ...


@runtime_checkable
class BlockPatch(Protocol):
    """A change of what a block adds to the residual stream: bottleneck adapters. It is no weight and has no fold."""

    @property
    def reads(self) -> str:
        """Path of the module whose input is the stream that the block's output is added to."""

    def apply(self, y: Tensor, r: Tensor) -> Tensor:
        """y [T, hidden] as the pristine Linear gives it, r [T, hidden] the stream → y'."""

    def tensors(self) -> Iterator[Tensor]: ...

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockPatch: ...


@dataclass(frozen=True, slots=True, eq=False)
class Network(TensorFields):
    """What a block's patch adds, where that is up · act(down · z + …) + … + again · r; z is what it reads."""

    down: Tensor  # [d, hidden]
    down_bias: Tensor  # [d]
    up: Tensor  # [hidden, d]
    up_bias: Tensor  # [hidden]
    act: str
    reads: Literal["y", "y + r", "r"]
    again: int = 0


@runtime_checkable
class Networked(Protocol):
    """A block's patch that may be a plain network, which kernels know."""

    def network(self) -> Network | None: ...


def network_of(block: BlockPatch) -> Network | None:
    return block.network() if isinstance(block, Networked) else None


@dataclass(frozen=True, slots=True, eq=False)
class Patch(TensorFields):
    """The normal form at a Linear or Conv1D. A field left None does nothing. s (and gain) are folded into B.

    A and B may have the 16 bits of a file that holds nothing else: `fold` takes them so, `apply` wants all in one.
    """

    A: Tensor | None = None  # [r, in]
    B: Tensor | None = None  # [out, r]
    gain: Tensor | None = None  # [out], before the base's bias
    in_scale: Tensor | None = None  # [in]
    out_scale: Tensor | None = None  # [out], after the bias
    bias: Tensor | None = None  # [out], added to the base's
    weight: Tensor | None = None  # W' [out, in], instead of the base's
    delta: Delta | None = None  # ΔW [out, in]
    turn: Turn | None = None  # R, before W' alone
    mirror: Mirror | None = None

    @property
    def rank(self) -> int:
        if isinstance(self.delta, Kronecker | Scaled):
            return self.delta.rank
        return 0 if self.A is None else self.A.shape[0]

    def apply(self, x: Tensor, module: nn.Module, *more: Tensor) -> Tensor:
        """x [..., in] → y [..., out]: the formula at the head of this file, term by term."""
        W, b = linear_params(module)
        W = W if self.weight is None else self.weight
        z = x if self.in_scale is None else x * self.in_scale
        y = F.linear(z if self.turn is None else self.turn.apply(z), W)
        y = y if self.gain is None else y * self.gain
        y = y if self.A is None or self.B is None else y + F.linear(F.linear(x, self.A), self.B)
        y = y if self.delta is None else y + self.delta.apply(x.reshape(-1, x.shape[-1])).view_as(y)
        y = y if b is None else y + b
        y = y if self.bias is None else y + self.bias
        return self.out(y)

    def out(self, u: Tensor) -> Tensor:
        """What happens to the sum u [..., out] → y."""
        y = u if self.out_scale is None else u * self.out_scale
        return y if self.mirror is None else y + self.mirror.apply(u)

    def fold(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"weight": [out, in], "bias": [out]?} float32 → the same with this patch folded in."""
        wide = self.to(params["weight"].device, torch.float32)
        W = params["weight"] if wide.weight is None else wide.weight
        W = W if wide.turn is None else wide.turn.fold(W)
        W = W if wide.in_scale is None else W * wide.in_scale
        W = W if wide.gain is None else W * wide.gain[:, None]
        W = W if wide.A is None or wide.B is None else W + wide.B @ wide.A
        W = W if wide.delta is None else W + wide.delta.dense()
        b = params.get("bias")
        b = b if wide.bias is None else wide.bias if b is None else b + wide.bias
        W, b = wide.out(W.T).T, b if b is None else wide.out(b)
        return {"weight": W.clone()} if b is None else {"weight": W.clone(), "bias": b.clone()}


def as_low_rank(patch: Patch) -> Patch:
    """The same with a delta that is a low rank in A and B, which may take many times its memory; a Kronecker product
    that is none with whole factors.
    """
    pair = patch.delta.low_rank() if isinstance(patch.delta, Kronecker | Scaled | Rows) else None
    if pair is None:
        return with_whole_factors(patch)
    A, B = pair
    A = A if patch.A is None else torch.cat([patch.A, A])
    B = B if patch.B is None else torch.cat([patch.B, B], 1)
    return replace(patch, A=A, B=B, delta=None)


def with_whole_factors(patch: Patch) -> Patch:
    """The same with a Kronecker product of whole factors."""
    return replace(patch, delta=patch.delta.whole()) if isinstance(patch.delta, Kronecker) else patch


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingPatch(TensorFields):
    """Low rank at an embedding: e = gain * (E'[id] + B A[:, id]) · scale (PEFT `lora/layer.py`, class Embedding).

    s is folded into B, gain is not. `scale` is the base module's own factor after look-up (Gemma), else 1.
    """

    A: Tensor  # [r, vocab]
    B: Tensor  # [hidden, r]
    gain: Tensor | None = None  # [hidden]
    weight: Tensor | None = None  # E' [vocab, hidden]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def apply(self, x: Tensor, module: nn.Module, *more: Tensor) -> Tensor:
        """x [...] token ids → e [..., hidden]."""
        E = module.get_parameter("weight") if self.weight is None else self.weight
        e = F.embedding(x, E) + F.linear(F.embedding(x, self.A.T), self.B)
        e = e if self.gain is None else e * self.gain
        return e * self.scale

    def fold(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        E = params["weight"] if self.weight is None else self.weight.float()
        E = E + (self.B.float() @ self.A.float()).T
        return {"weight": E if self.gain is None else E * self.gain.float()}

    def to(self, device: torch.device, dtype: torch.dtype) -> EmbeddingPatch:
        """The scale is rounded with the rest, as the base module rounds its own."""
        scale = float(torch.tensor(self.scale).to(dtype))
        return replace(TensorFields.to(self, device, dtype), scale=scale)


@dataclass(frozen=True, slots=True, eq=False)
class TokensPatch(TensorFields):
    """Trained rows of an embedding; other tokens are the base's. `scale` is the module's own factor after look-up."""

    index: Tensor  # [n], int64, ascending
    rows: Tensor  # [n, hidden]
    scale: float = 1.0

    rank = 0

    def apply(self, x: Tensor, module: nn.Module, *more: Tensor) -> Tensor:
        """x [...] token ids → e [..., hidden]."""
        e: Tensor = type(module).forward(module, x)
        at = torch.searchsorted(self.index, x).clamp(max=len(self.index) - 1)
        own = self.index[at] == x
        return torch.where(own[..., None], F.embedding(at, self.rows) * self.scale, e)

    def fold(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": params["weight"].index_copy(0, self.index, self.rows.float())}

    def to(self, device: torch.device, dtype: torch.dtype) -> TokensPatch:
        """The scale is rounded with the rest, as the base module rounds its own."""
        return replace(TensorFields.to(self, device, dtype), scale=float(torch.tensor(self.scale).to(dtype)))


@dataclass(frozen=True, slots=True, eq=False)
class ParamPatch:
    """Replaced parameters of a module that is no Linear (norms, embeddings): saved modules, trained norm biases."""

    params: Mapping[str, Tensor]  # as the module stores them

    rank = 0

    def apply(self, x: Tensor, module: nn.Module, *more: Tensor) -> Tensor:
        """The class's own forward on a double of the module: the instance's `forward` may be a site's."""
        double = object.__new__(type(module))
        double.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, **self.params}}
        out: Tensor = type(module).forward(double, x, *more)
        return out

    def fold(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: self.params.get(k, v).float().clone() for k, v in params.items()}

    def tensors(self) -> Iterator[Tensor]:
        yield from self.params.values()

    def to(self, device: torch.device, dtype: torch.dtype) -> ParamPatch:
        return ParamPatch({k: v.to(device, dtype) for k, v in self.params.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Skills(TensorFields):
    """Low ranks at a Linear of which each task mixes its own: no patch before the task is known. s is in B."""

    A: Tensor  # [splits, skills, in/splits, r]
    B: Tensor  # [splits, skills, r, out/splits]
    mix: Tensor  # [tasks, splits, skills]
    weight: Tensor | None = None  # W' [out, in], instead of the base's

    def patch(self, task: int) -> Patch:
        A = torch.einsum("qs,qsdr->rqd", self.mix[task], self.A).flatten(1)  # [r, in]
        B = torch.einsum("qs,qsrd->qdr", self.mix[task], self.B).flatten(0, 1)  # [out, r]
        return Patch(A=A, B=B, weight=self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class GatedPrompt(TensorFields):
    """An attention of its own beside a layer's: g · softmax(q Kᵀ / √d) V, added to it, or behind its last Linear."""

    K: Tensor  # [heads, n, dim]
    V: Tensor  # [heads, n, dim]
    gate: Tensor  # [1]
    behind: bool = False

    def attend(self, q: Tensor) -> Tensor:
        """q [heads, t, dim], after RoPE → [t, heads, dim]."""
        scores = q @ self.K.mT / math.sqrt(q.shape[-1])
        weights = self.gate * scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (weights @ self.V).transpose(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Graft:
    """A checked config and its tensors, for PEFT (or hooks) to put onto a second tree of the base's modules."""

    kind: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    mergeable: bool
    experts: tuple[Graft, ...] = ()  # the adapters that it routes among
    merged: bool = False  # to be folded into copies of the weights that it touches
    hooked: bool = False  # hooks of ours, not PEFT; they look at all tokens, so each call is of the whole text

    @property
    def before_the_prompt(self) -> bool:
        return self.kind in BEFORE_THE_PROMPT

    @property
    def tasks(self) -> int:
        """How many tasks it tells apart; 0 where it has none."""
        key = {"MULTITASK_PROMPT_TUNING": "num_tasks", "POLY": "n_tasks"}.get(self.kind)
        return 0 if key is None else int(self.config.get(key) or 1)

    @property
    def scalable(self) -> bool:
        """Whether what it adds is one term at each module, times PEFT's `scaling`: y = y₀ + w (y₁ − y₀)."""
        beside = ("arrow_config", "modules_to_save", "trainable_token_indices", "use_dora")
        plain = self.config.get("bias", "none") == "none" and not any(self.config.get(key) for key in beside)
        return self.kind in SCALABLE and plain and not self.merged


SCALABLE = frozenset({"LILY", "LOHA", "LOKR", "LORA"})
BEFORE_THE_PROMPT = frozenset(
    {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter in memory, as data. At most one of `prefix` and `embeds` is set; `patches`, `blocks` share no path."""

    spec: Spec
    patches: Mapping[str, AnyPatch] = field(default_factory=dict)
    prefix: tuple[tuple[Tensor, Tensor], ...] | None = None  # per layer K, V, each [n, kv_heads, head_dim]
    embeds: Tensor | None = None  # [n, hidden]
    tasks: tuple[Tensor, ...] = ()  # kinds with tasks: one `embeds` per task id
    skills: Mapping[str, Skills] = field(default_factory=dict)  # kinds with tasks: what patches are mixed from
    invocation: tuple[int, ...] = ()  # aLoRA: the patches act from these tokens' last occurrence in the prompt on
    blocks: Mapping[str, BlockPatch] = field(default_factory=dict)  # by the path of the block's last Linear
    gated: Mapping[str, GatedPrompt] = field(default_factory=dict)  # by the path of the attention
    shifts: bool = True  # whether real tokens' positions begin after the prefix, or at 0 beside it
    graft: Graft | None = None  # what no patch describes: PEFT runs it, in a lane of its own

    @property
    def rank(self) -> int | None:
        mixed = (skills.A.shape[-1] for skills in self.skills.values())
        return max((*mixed, *(getattr(p, "rank", 0) for p in self.patches.values())), default=0) or None

    @property
    def unfoldable(self) -> str:
        """Why it has no merged form; empty where it has one."""
        if self.prefix is not None or self.embeds is not None or self.tasks:
            return "what it adds stands before the prompt and is no weight"
        if self.skills:
            return "its weights depend on the request's task"
        if self.blocks:
            return "a network behind a block is no weight"
        if self.gated:
            return "an attention of its own is no weight"
        if self.graft is not None and self.graft.before_the_prompt:
            return "what it adds stands before the prompt and is no weight"
        if self.graft is not None and not self.graft.mergeable:
            return "what it does depends on the input and is no weight"
        return "it acts on the tokens from its invocation on and on none before" if self.invocation else ""

    @property
    def foldable(self) -> bool:
        return not self.unfoldable

    def start(self, prompt: Sequence[int]) -> int | None:
        """The first token that the patches act on; None where the prompt lacks the invocation (PEFT `variants.py`)."""
        if not self.invocation:
            return 0
        n, tokens = len(self.invocation), tuple(prompt)
        return next((i for i in range(len(tokens) - n, -1, -1) if tokens[i : i + n] == self.invocation), None)

    @property
    def tasks_known(self) -> int:
        """How many tasks a request chooses from; 0: none."""
        return len(self.tasks) or next((len(skills.mix) for skills in self.skills.values()), 0)

    def mixed(self, task: int) -> Adapter:
        """What the skills are for one task, as patches."""
        return Adapter(self.spec, {path: skills.patch(task) for path, skills in self.skills.items()})

    def tensors(self) -> Iterator[Tensor]:
        for patch in self.patches.values():
            yield from patch.tensors()
        for block in self.blocks.values():
            yield from block.tensors()
        for part in (*self.skills.values(), *self.gated.values()):
            yield from part.tensors()
        for pair in self.prefix or ():
            yield from pair
        yield from self.graft.tensors.values() if self.graft else ()
        yield from (t for t in (self.embeds, *self.tasks) if t is not None)

    @property
    def bytes(self) -> int:
        return held_bytes(self.tensors())

    def to(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """A copy on the device, in the dtype that the engine computes in; skills stay, since their mixes move."""
        move = {path: patch.to(device, dtype) for path, patch in self.patches.items()}
        pairs = self.prefix and tuple((k.to(device, dtype), v.to(device, dtype)) for k, v in self.prefix)
        embeds = None if self.embeds is None else self.embeds.to(device, dtype)
        tasks = tuple(t.to(device, dtype) for t in self.tasks)
        blocks = {path: patch.to(device, dtype) for path, patch in self.blocks.items()}
        gated = {path: prompt.to(device, dtype) for path, prompt in self.gated.items()}
        return replace(self, patches=move, prefix=pairs, embeds=embeds, tasks=tasks, blocks=blocks, gated=gated)


class Family(Protocol):
    """One PEFT kind, one file. A module that defines `FAMILY` in this package is found by `families.find`."""

    @property
    def name(self) -> str:
        """PEFT's peft_type."""

    @property
    def slow(self) -> bool:
        """Whether it needs base weights or an SVD to compile, whatever its config: such loads queue apart."""

    def expected(
        self, config: Mapping[str, Any], shapes: Shapes, names: frozenset[str]
    ) -> Mapping[str, tuple[int, ...]] | None:
        """Every tensor the file must hold, with its shape; None where only PEFT knows.

        Raises AdapterRefused where the config makes no sense.
        """

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        """The adapter as data on the CPU, float32 but for factors that keep a file's 16 bits. The tensors are exactly
        `expected`, finite.
        """


def linear_params(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A Linear's or Conv1D's weight as [out, in] (a view; of a quantised one a float32 copy) and its bias."""
    if is_quantised(module):
        return dequantised(module), getattr(module, "bias", None)
    weight = module.get_parameter("weight")
    bias = getattr(module, "bias", None)
    return (weight.T if type(module).__name__ == "Conv1D" else weight), bias
