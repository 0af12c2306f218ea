"""LoRA with what its config can ask for (PEFT `tuners/lora/`): rsLoRA, DoRA, patterns, biases, tokens, saved modules.

y = gain · (W' x + s·B(A x)) + b + bias        s = α/r, rsLoRA α/√r;   gain = m / ‖W' + s·BA‖ per row (DoRA)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families import parameters
from adapter_server.families.base import (
    Adapter,
    AnyPatch,
    Base,
    EmbeddingPatch,
    Family,
    Patch,
    Shapes,
)
from adapter_server.families.lora_variants import SUBTRACTED, Variant, variant
from adapter_server.families.options import (
    Config,
    as_integer,
    as_number,
    check_known,
    choice,
    flag,
    integer,
    refuse_set,
    table,
)
from adapter_server.families.parts import (
    LINEAR,
    ROOT,
    Expected,
    Taker,
    base_bias,
    bias_patch,
    biases_expected,
    copies_expected,
    override,
    refuse_overlap,
    saved_expected,
    saved_patch,
    take_copies,
    trained_biases,
)
from adapter_server.families.targets import by_pattern, remembered, saved_modules, targeted
from adapter_server.families.trainable_tokens import ROWS, token_indices, with_rows

MAX_SCALING = 1e4
MAX_INVOCATION = 256  # tokens
ALORA = "alora_invocation_tokens"
FACTORS = ("lora_A.weight", "lora_B.weight")

# Served: these decide the tensors and the formula.
SERVED = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "init_lora_weights",
        "kasa_config",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "monteclora_config",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    }
)

# Without effect on a saved adapter: training, initialisation, or settled by the base's own classes. Some are not
# PEFT's: early releases wrote `merge_weights`, ms-swift writes `lora_dtype` and `lorap_*`.
HARMLESS = frozenset(
    {
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "arrow_config",  # set, PEFT itself serves it: `fallback.py`
        "loftq_config",
        "lora_dropout",
        "lora_dtype",
        "lora_ga_config",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "megatron_core",
        "merge_weights",
    }
)

_MERGE = "merge it into a base of its own with PEFT's merge_and_unload"
REFUSED: Mapping[str, str] = {
    "enable_lora": "it splits a fused projection; " + _MERGE,
    "layer_replication": "it changes the base's depth for everybody; " + _MERGE,
    "megatron_config": "it is sharded for Megatron; export it as a plain PEFT adapter",
}

PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")  # a base untouched at initialisation: plain LoRA once trained


@dataclass(frozen=True, slots=True)
class Low:
    """The low rank at one wrapped module."""

    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A config resolved against a base: what is wrapped, what is saved whole, and where biases were trained."""

    wrapped: Mapping[str, Low]
    saved: tuple[str, ...]
    biases: Mapping[str, str]  # module path: key in the file
    dora: bool
    lora_bias: bool
    velora_groups: int  # 0: no VeLoRA
    variant: Variant
    tokens: Mapping[str, list[int]]  # module path: its trained rows
    tied_tokens: bool  # the head's are the embedding's
    invocation: tuple[int, ...]  # aLoRA's; empty: none
    parameters: list[parameters.Target]
    as_filed: bool  # the file has factors alone, which keep its format: their scaling rounds nothing


class Lora:
    name = "LORA"
    slow = False

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        plan = resolve(config, shapes, names)
        keys: Expected = {}
        for path, low in plan.wrapped.items():
            keys |= _module_expected(path, low, plan, shapes)
        biases = biases_expected(plan.biases, shapes)
        tokens: Expected = {_rows_key(p, plan, shapes): (len(i), shapes.hidden) for p, i in plan.tokens.items()}
        copies, whole = copies_expected(plan.wrapped, shapes, names), saved_expected(plan.saved, shapes)
        return keys | biases | tokens | copies | whole | parameters.expected(plan.parameters)

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        plan, take = resolve(spec.config, base.shapes, frozenset(tensors)), Taker(tensors)
        weights = take_copies(take, plan.wrapped, base)
        patches: dict[str, AnyPatch] = {
            path: override(w, base.shapes.modules[path]) for path, w in weights.items() if path not in plan.wrapped
        }
        for path, low in plan.wrapped.items():
            patches[path] = _module_patch(take, path, low, plan, base, weights.get(path))
        for path in plan.saved:
            patches[path] = saved_patch(take, path, base)
        patches |= parameters.patches(plan.parameters, take, base)
        rows = {key: take(key) for key in dict.fromkeys(_rows_key(p, plan, base.shapes) for p in plan.tokens)}
        for path, indices in plan.tokens.items():
            patches[path] = with_rows(rows[_rows_key(path, plan, base.shapes)], path, indices, base)
        for path, key in plan.biases.items():
            if path not in plan.wrapped:
                patches[path] = bias_patch(take(key), path, base)
        take.done()
        if plan.invocation and weights:
            raise AdapterRefused(f"adapter_config.json: '{ALORA}' together with a changed embedding is not defined")
        return Adapter(spec, patches, invocation=plan.invocation)


@remembered
def resolve(config: Config, shapes: Shapes, names: frozenset[str]) -> Plan:
    """Checks the config and resolves its names against the base."""
    check_known(config, SERVED | HARMLESS | REFUSED.keys())
    refuse_set(config, REFUSED)
    _check_init(config)
    bare = parameters.targets(config, shapes, _by_name(config))
    named = targeted(config, shapes) if config.get("target_modules") or not bare else []
    paths = _with_tied(config, shapes, names, named)
    saved = _with_tied(config, shapes, names, saved_modules(config, shapes))
    refuse_overlap(paths, saved)
    dora, lora_bias = flag(config, "use_dora"), flag(config, "lora_bias")
    if dora and lora_bias:
        raise AdapterRefused("adapter_config.json: 'lora_bias' together with 'use_dora' is not defined; set one")
    if lora_bias and flag(config, "use_qalora"):
        raise AdapterRefused("adapter_config.json: 'lora_bias' together with 'use_qalora' is not defined; set one")
    groups = integer(table(config, "velora_config"), "num_groups", 64) if config.get("velora_config") else 0
    mode = choice(config, "bias", "none", ("none", "all", "lora_only"))
    biases = trained_biases(mode, shapes, paths, saved)
    form = variant(config)
    tokens, tied_tokens = _tokens(config, shapes)
    refuse_overlap([*paths, *biases], tokens)
    refuse_overlap(tokens, saved)
    if form.subtracts and {shapes.embed, shapes.head} & set(paths):
        raise AdapterRefused("adapter_config.json: this initialisation cannot be undone at the embedding or the head")
    lows, invocation = _lows(config, paths), _invocation(config, shapes)
    if bare:
        refuse_overlap([*paths, *biases, *saved, *tokens], [target.module for target in bare])
        _check_plain(form, dora or lora_bias or bool(groups) or bool(invocation))
    if invocation:
        _check_alora(config, shapes, paths, form)
    factors_alone = form.plain and not bare and all(name.endswith(FACTORS) for name in names)
    as_filed = factors_alone and all(abs(math.frexp(low.scaling)[0]) == 0.5 for low in lows.values())
    return Plan(
        lows, tuple(saved), biases, dora, lora_bias, groups, form, tokens, tied_tokens, invocation, bare, as_filed
    )


def _invocation(config: Config, shapes: Shapes) -> tuple[int, ...]:
    """aLoRA's tokens; empty where this is none."""
    value = config.get(ALORA)
    if value is None:
        return ()
    if not isinstance(value, list) or not 0 < len(value) <= MAX_INVOCATION:
        raise AdapterRefused(f"adapter_config.json: '{ALORA}' must be a list of 1 to {MAX_INVOCATION} token ids")
    return tuple(as_integer(token, ALORA, 0, shapes.vocab - 1) for token in value)


def _check_alora(config: Config, shapes: Shapes, paths: list[str], form: Variant) -> None:
    """Only low ranks at Linears have a place in the prompt where they begin; the rest would act on all tokens."""
    rest = [key for key in ("modules_to_save", "trainable_token_indices") if config.get(key)]
    rest += ["bias"] if config.get("bias", "none") != "none" else []
    rest += ["init_lora_weights"] if form.init else []
    if rest:
        raise AdapterRefused(f"adapter_config.json: '{ALORA}' together with '{rest[0]}' is not defined; set one")
    wrong = next((path for path in paths if shapes.modules[path].kind not in LINEAR), None)
    if wrong is not None:
        raise AdapterRefused(f"adapter_config.json: 'target_modules' names {wrong}, which aLoRA does not apply to")


def _check_init(config: Config) -> None:
    """Initialisations that change the base leave a file that means nothing over the original base."""
    init = config.get("init_lora_weights", True)
    if init is None or isinstance(init, bool) or init in (*PLAIN_INITS, *SUBTRACTED):
        return
    raise AdapterRefused(
        f"adapter_config.json: 'init_lora_weights' is {str(init)[:40]!r}, which changed the base's weights; "
        "save the adapter again with save_pretrained(..., path_initial_model_for_weight_conversion=...), which "
        "converts it to a plain LoRA"
    )


def _with_tied(config: Config, shapes: Shapes, names: frozenset[str], paths: list[str]) -> list[str]:
    """`ensure_weight_tying`: where one of a tied embedding and head is adapted, so is the other.

    PEFT ties at load by the two usual names only; elsewhere the file tells whether it tied when it saved.
    """
    adapted = {shapes.embed, shapes.head} & set(paths)
    if len(adapted) != 1 or not shapes.tied or not flag(config, "ensure_weight_tying"):
        return paths
    one = next(iter(adapted))
    other = shapes.head if one == shapes.embed else shapes.embed
    held = any(name.startswith(f"{ROOT}{other}.") for name in names)
    return [*paths, other] if held or one.endswith(("embed_tokens", "lm_head")) else paths


def _tokens(config: Config, shapes: Shapes) -> tuple[dict[str, list[int]], bool]:
    """`trainable_token_indices`: {module: tokens}, and whether a tied head shares the embedding's."""
    key, value = "trainable_token_indices", config.get("trainable_token_indices")
    if value is None:
        return {}, False
    by_name = table(config, key) if isinstance(value, Mapping) else {shapes.embed: value}
    ends = {path: name for name in by_name for path in shapes.modules if path.endswith(name)}
    if not ends:
        raise AdapterRefused(f"adapter_config.json: '{key}' matches no module of this base")
    found = {path: token_indices(by_name[name], key, path, shapes) for path, name in ends.items()}
    tied = shapes.tied and shapes.embed in found and found.get(shapes.head) in (None, found[shapes.embed])
    return ({**found, shapes.head: found[shapes.embed]}, True) if tied else (found, False)


def _check_plain(form: Variant, special: bool) -> None:
    """PEFT wraps a bare parameter in plain LoRA alone."""
    if special or not form.plain:
        raise AdapterRefused(f"adapter_config.json: '{parameters.TARGETS}' is defined for plain LoRA and rsLoRA alone")


def _lows(config: Config, paths: Iterable[str]) -> dict[str, Low]:
    lookup = _by_name(config)
    return {path: Low(*lookup(path)) for path in paths}


def _by_name(config: Config) -> Callable[[str], tuple[int, float]]:
    """Rank and scaling by the name of a module, or of a parameter."""
    rank = by_pattern(config, "rank_pattern", table(config, "rank_pattern"), config.get("r", 8))
    alpha = by_pattern(config, "alpha_pattern", table(config, "alpha_pattern"), config.get("lora_alpha", 8))
    root = flag(config, "use_rslora")
    return lambda name: _low(as_integer(rank(name), "r"), as_number(alpha(name), "lora_alpha"), root)


def _low(rank: int, alpha: float, root: bool) -> tuple[int, float]:
    scaling = alpha / (math.sqrt(rank) if root else rank)
    if abs(scaling) > MAX_SCALING:
        raise AdapterRefused(f"adapter_config.json: the scaling {scaling:g} is beyond {MAX_SCALING:g}")
    return rank, scaling


def _rows_key(path: str, plan: Plan, shapes: Shapes) -> str:
    """Where the file has a module's trained rows: the embedding's, for a head that shares them."""
    where = shapes.embed if plan.tied_tokens and path == shapes.head else path
    return f"{ROOT}{where}.token_adapter.{ROWS}"


def _module_expected(path: str, low: Low, plan: Plan, shapes: Shapes) -> Expected:
    shape, key = shapes.modules[path], f"{ROOT}{path}."
    magnitude: Expected = {key + "lora_magnitude_vector": (shape.out,)} if plan.dora else {}
    if shape.kind in LINEAR:
        bias: Expected = {key + "lora_B.bias": (shape.out,)} if plan.lora_bias else {}
        factors = {key + name: s for name, s in plan.variant.expected(path, low.rank, shape).items()}
        width = -(-shape.inp // plan.velora_groups) if plan.velora_groups else 0
        velora: Expected = {key + "lora_velora_embed": (width,)} if width else {}
        return factors | bias | magnitude | velora
    if shape.kind == "embedding" and not plan.lora_bias and plan.variant.plain:
        a, b = (low.rank, shape.inp), (shape.out, low.rank)
        return {key + "lora_embedding_A": a, key + "lora_embedding_B": b} | magnitude
    raise AdapterRefused(f"adapter_config.json: 'target_modules' names {path}, which LoRA does not apply to")


def _module_patch(take: Taker, path: str, low: Low, plan: Plan, base: Base, weight: Tensor | None) -> AnyPatch:
    if base.shapes.modules[path].kind == "embedding":
        return _embedding_patch(take, path, low, plan, base, weight)
    key = f"{ROOT}{path}."
    if plan.as_filed:
        A, B = (take.as_filed(key + factor) for factor in FACTORS)
        return _scaled(A, B, low.scaling)
    A, B = plan.variant.factors(take, path, low.scaling, lambda: base.weight(path))  # [r,in] [out,r]
    bias = _bias(take, path, low, plan, base)
    if plan.velora_groups:
        take(key + "lora_velora_embed")  # only the backward pass reads it (PEFT `lora/velora.py`)
    if not plan.dora:
        return Patch(A=A, B=B, bias=bias, weight=weight)
    W = base.weight(path) if weight is None else weight  # [out,in]
    gain = _gain(take, path, W + B @ A)
    return Patch(A=A, B=B * gain[:, None], gain=gain, bias=bias, weight=weight)


def _scaled(A: Tensor, B: Tensor, power: float) -> Patch:
    """A and a power of two times B, in place. In bfloat16 that is exact above 2⁻¹²⁶. Float16 has little room above its
    numbers and less below: then both become float32.
    """
    if B.dtype != torch.float16 or (abs(power) >= 1 and bool(B.abs().max() * abs(power) <= torch.finfo(B.dtype).max)):
        return Patch(A=A, B=B.mul_(power))
    return Patch(A=A.float(), B=B.float().mul_(power))


def _embedding_patch(take: Taker, path: str, low: Low, plan: Plan, base: Base, weight: Tensor | None) -> EmbeddingPatch:
    key = f"{ROOT}{path}."
    A, B = take(key + "lora_embedding_A"), take(key + "lora_embedding_B").mul_(low.scaling)  # [r,V] [H,r]
    scale = base.shapes.scaled_embeddings.get(path, 1.0)
    if not plan.dora:
        return EmbeddingPatch(A, B, None, weight, scale)
    E = base.weight(path) if weight is None else weight  # [V,H]
    return EmbeddingPatch(A, B, _gain(take, path, E.T + B @ A), weight, scale)


def _gain(take: Taker, path: str, adapted: Tensor) -> Tensor:
    """m / ‖row‖ of the adapted weight [out,in] (PEFT `lora/dora.py`)."""
    magnitude = take(f"{ROOT}{path}.lora_magnitude_vector")
    gain: Tensor = magnitude / torch.linalg.norm(adapted, dim=1)
    if not torch.isfinite(gain).all():
        raise AdapterRefused(f"{path}: DoRA divides by a row of zeros")
    return gain


def _bias(take: Taker, path: str, low: Low, plan: Plan, base: Base) -> Tensor | None:
    """What is added to the base's bias: s · lora_B.bias, and the difference of a trained (or saved) bias."""
    parts = [take(f"{ROOT}{path}.lora_B.bias") * low.scaling] if plan.lora_bias else []
    key = plan.biases.get(path, f"{ROOT}{path}.base_layer.bias")
    if path in plan.biases or key in take:
        parts.append(take(key) - base_bias(base, path))
    return torch.stack(parts).sum(0) if parts else None


FAMILY: Family = Lora()
