"""What no patch describes runs as PEFT's own layers, in the `peft` lane.

LILY     y = W x + b + s·Σₑ pₑ Bₑ A x      p = softmax(R A x), the mean over all tokens of the call
SHADOW   h ← h + α·Up(Down(h − s)) before each layer, s from a small network beside the base and moved on by gates
X-LORA   y = W x + b + Σₑ cₑ sₑ Bₑ Aₑ x    c from a classifier that reads what the base alone makes of the prompt
ADAMSS   rows of W by cluster, a low rank for each; the clusters are found again from the base's SVD (scikit-learn)
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused, NotMergeable
from adapter_server.families.base import BEFORE_THE_PROMPT, Adapter, Base, Graft, Shapes
from adapter_server.families.options import IGNORED, Config, as_number, check_known

KINDS = ("ADAMSS", "LILY", "SHADOW", "XLORA")  # that no patch describes
UNMERGEABLE = BEFORE_THE_PROMPT | {"ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA"}

# Options that act when training begins and would look something up; a trained adapter does without.
DROPPED = frozenset(
    {"corda_config", "eva_config", "loftq_config", "lora_ga_config", "prompt_tuning_init", "prompt_tuning_init_text"}
    | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "tokenizer_kwargs", "tokenizer_name_or_path"}
    | {"megatron_core"}
)
NOT_SERVED = {
    "layer_replication": "it changes the base's depth",
    "megatron_config": "it is sharded for Megatron; export it as a plain PEFT adapter",
}
RAW = ("corda", "eva", "loftq", "lora_ga")  # of init_lora_weights: what PEFT cannot find again at a load
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
TABLES = ("rank_pattern", "alpha_pattern", "lambda_pattern", "n_frequency_pattern")  # their keys are patterns

CONSTANT = "ranknum"  # AdaLoRA's: made from the config, never saved

Own = dict[int, nn.Parameter]  # by identity, and alive: the parameters that no file is to fill

_NAME = "default"
_ROUTER = "arrow_router"
_SLOW_REGEX = re.compile(r"\)\s*[*+{]|\\[1-9]|\(\?[^:]")  # a repeated group, a reference, a look-around


@dataclass(frozen=True, slots=True)
class Fallback:
    """A kind that PEFT loads itself, onto a second tree of the base's modules."""

    name: str
    slow: bool = True

    @property
    def known(self) -> frozenset[str]:
        """The options that PEFT has."""
        return frozenset(f.name for f in dataclasses.fields(_kinds()[self.name])) - IGNORED

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> None:
        """None: which tensors are right is seen when PEFT takes them. Raises AdapterRefused for the config."""
        configured(self.name, config)
        experts(config)

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        mergeable = self.name not in UNMERGEABLE and not _is_arrow(spec.config)
        return Adapter(spec, graft=Graft(self.name, spec.config, dict(tensors), mergeable))


FAMILIES = tuple(Fallback(kind) for kind in KINDS)


def newer(kind: str) -> Fallback | None:
    """A kind that this PEFT knows and no family here does."""
    return Fallback(kind) if kind in _kinds() else None


def is_grafted(config: Config) -> bool:
    """A kind of ours with an option that only PEFT itself can do."""
    return _is_arrow(config)


def _is_arrow(config: Config) -> bool:
    return bool(config.get("arrow_config"))


@functools.cache
def _kinds() -> Mapping[str, type[Any]]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


# The config


def experts(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the adapters that this one routes among, and of those that Arrow subtracts. Raises AdapterRefused."""
    if "adapters" in config and isinstance(config["adapters"], Mapping):
        return _named(list(config["adapters"].values()), "adapters"), ()
    arrow = config.get("arrow_config")
    if not isinstance(arrow, Mapping):
        return (), ()
    general = arrow.get("gks_adapter_names") if arrow.get("use_gks") else None
    return (
        _named(arrow.get("task_adapter_names"), "arrow_config.task_adapter_names"),
        _named(general or [], "arrow_config.gks_adapter_names") if general else (),
    )


def _named(value: object, key: str) -> tuple[str, ...]:
    from adapter_server.registry.guard import check_name

    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise AdapterRefused(f"adapter_config.json: '{key}' must name adapters of this server")
    for name in value:
        try:
            check_name(name)
        except AdapterRefused as refused:
            raise AdapterRefused(
                f"adapter_config.json: '{key}' names the adapters by their names here, never by a path; {refused}"
            ) from refused
    return tuple(value)


def configured(kind: str, config: Config, task: str | None = None) -> Any:
    """PEFT's config object. Every key is one of its dataclass and of its type. Raises AdapterRefused."""
    cls = _kinds()[kind]
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    check_known(config, known)
    for key, reason in NOT_SERVED.items():
        if config.get(key):
            raise AdapterRefused(f"adapter_config.json: '{key}' is not served here: {reason}")
    chosen = {k: v for k, v in config.items() if k in known and k not in IGNORED | DROPPED}
    for key, value in chosen.items():
        _check(key, value, hints[key])
    _check_strings(chosen)
    try:
        return cls(**_instead(chosen), task_type=_task(config, task), inference_mode=True)
    except Exception as error:
        raise AdapterRefused(f"adapter_config.json: PEFT does not take it ({str(error)[:200]})") from error


def _task(config: Config, base: str | None) -> str | None:
    own = config.get("task_type")
    if own is not None and (not isinstance(own, str) or own != (base or own)):
        raise AdapterRefused(f"adapter_config.json: 'task_type' is {str(own)[:40]!r}, this base's is {base}")
    if own not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise AdapterRefused(f"adapter_config.json: 'task_type' {str(own)[:40]!r} generates no text")
    return base or own


def _instead(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """X-LoRA's experts under the numbers that PEFT calls them by; where they lie is said when it is loaded."""
    if isinstance(chosen.get("adapters"), Mapping):
        return {**chosen, "adapters": {str(i): "" for i in range(len(chosen["adapters"]))}}
    return dict(chosen)


def _check(key: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise AdapterRefused(f"adapter_config.json: '{key}' is {str(value)[:80]!r}, which is not what PEFT takes there")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a type that PEFT's dataclass declares."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None or hint is Any:
        return _is_plain(value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin in (list, set, tuple, frozenset):
        inner = args[0] if args else Any
        return isinstance(value, list) and all(_fits(v, inner) for v in value)
    if origin is dict or hint is dict:
        inner = args[1] if args else Any
        return isinstance(value, Mapping) and all(_fits(v, inner) for v in value.values())
    if dataclasses.is_dataclass(hint):
        inner_hints = typing.get_type_hints(hint)
        return isinstance(value, Mapping) and all(
            k in inner_hints and _fits(v, inner_hints[k]) for k, v in value.items()
        )
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str) and value in {str(member.value) for member in hint}
    if hint is float:
        return type(value) in (int, float) and _is_plain(value)
    return hint in (str, int, bool, list) and type(value) is hint and _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Numbers in range, and no nesting that PEFT does not declare."""
    if type(value) in (int, float):
        as_number(value, "a number")
        return bool(abs(value) <= 1 << 20)
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    if isinstance(value, Mapping):
        return all(_is_plain(v) for v in value.values())
    return value is None or isinstance(value, str | bool)


def _check_strings(config: Config) -> None:
    """No path, no look-up, and no pattern that could take Python's engine long."""
    if config.get("shadow_model", "mirror") != "mirror":
        raise AdapterRefused(
            "adapter_config.json: 'shadow_model' would be looked up elsewhere; only 'mirror' is served"
        )
    if str(config.get("init_lora_weights")).startswith(RAW):
        raise AdapterRefused(
            f"adapter_config.json: PEFT cannot load init_lora_weights {config['init_lora_weights']!r} as it was saved; "
            "save it with path_initial_model_for_weight_conversion"
        )
    for text in _texts({k: v for k, v in config.items() if k != "adapters"}):
        if "/" in text or len(text) > 1000:
            raise AdapterRefused(f"adapter_config.json: {text[:80]!r} may be no path and no more than 1,000 characters")
    patterns = [p for key in PATTERNS for p in _texts(config.get(key))]
    patterns += [p for key in TABLES for p in config.get(key) or {}]
    for text in patterns:
        if _SLOW_REGEX.search(text) or len(re.findall(r"[*+{]", text)) > 4:
            raise AdapterRefused(
                f"adapter_config.json: the pattern {text[:80]!r} could take too long: list the modules' names"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


# The load


def attach(tree: nn.Module, graft: Graft) -> Any:
    """PEFT's own model over a tree of the base's modules, with exactly this file's tensors in it.

    Raises AdapterRefused for tensors that PEFT leaves over, and for parameters that the file does not fill.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    task = "SEQ_2_SEQ_LM" if tree.config.is_encoder_decoder else "CAUSAL_LM"  # type: ignore[union-attr]
    config = configured(graft.kind, graft.config, task)
    own = {id(p): p for p in tree.parameters()}
    with _folders(graft) as folders:
        if _is_arrow(graft.config):
            return _arrow(tree, graft, config, folders)
        if graft.kind == "XLORA":
            tree.config.use_cache = False  # type: ignore[union-attr]  # PEFT asks for it
            config.adapters = {str(i): str(folder) for i, folder in enumerate(folders)}
        model = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, PeftModel)(tree, config, _NAME)
    if graft.kind == "XLORA":  # the experts are filled: PEFT has just read them
        own |= {id(p): p for name, p in model.named_parameters() if "internal_xlora_classifier" not in name}
    _fill(model, graft, _NAME, own)
    return model.eval()


def _arrow(tree: nn.Module, graft: Graft, config: Any, folders: list[Path]) -> Any:
    """PEFT's `create_arrow_model`. The router's own tensors are loaded too, though Arrow's formula reads none."""
    from peft import create_arrow_model

    own = {id(p): p for p in tree.parameters()}
    paths, count = [str(folder) for folder in folders], len(experts(graft.config)[0])
    model = create_arrow_model(tree, paths[:count], config.arrow_config, paths[count:] or None)
    own |= {id(p): p for name, p in model.named_parameters() if f".{_ROUTER}." not in name}
    _fill(model, graft, _ROUTER, own)
    return model.eval()


def _fill(model: Any, graft: Graft, name: str, own: Own) -> None:
    """Load the file's tensors; every one must be taken, and every parameter that is not the base's be filled."""
    from peft import set_peft_model_state_dict

    seen: list[Any] = []
    hook = model.register_load_state_dict_post_hook(lambda _, keys: seen.append(keys))
    _own_biases(model, graft)
    shared = {key for key, p in model.named_parameters(remove_duplicate=False) if id(p) in own} & set(graft.tensors)
    if shared:
        raise AdapterRefused(f"adapter_model.safetensors: {min(shared)[:120]!r} names a weight of the base")
    try:
        set_peft_model_state_dict(model, {k: v.clone() for k, v in graft.tensors.items()}, adapter_name=name)
    finally:
        hook.remove()
    surplus = sorted({key for keys in seen for key in keys.unexpected_keys})
    if not graft.before_the_prompt:
        _check_filled(model, {key for keys in seen for key in keys.missing_keys}, own)
    if surplus and not graft.before_the_prompt:
        raise AdapterRefused(f"adapter_model.safetensors: PEFT takes no {surplus[0][:120]!r} ({len(surplus)} such)")
    if graft.before_the_prompt:
        _check_prompt(model, graft)
    if hasattr(model.base_model, "_cast_adapter_dtype"):
        model.base_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=True)


def _check_filled(model: Any, missing: set[str], own: Own) -> None:
    filled = {id(p) for key, p in model.named_parameters(remove_duplicate=False) if key not in missing}
    rest = [(key, p) for key, p in model.named_parameters() if id(p) not in own and id(p) not in filled]
    empty = [key for key, _ in rest if f".{CONSTANT}." not in key]
    if empty:
        raise AdapterRefused(f"adapter_model.safetensors: no tensor for {empty[0][:120]!r} ({len(empty)} such)")


def _check_prompt(model: Any, graft: Graft) -> None:
    """A prompt's tensors are read one by one: what PEFT would save again is what the file holds."""
    from peft import get_peft_model_state_dict

    again = get_peft_model_state_dict(model, adapter_name=_NAME)
    if set(again) != set(graft.tensors):
        odd = sorted(set(again) ^ set(graft.tensors))
        raise AdapterRefused(f"adapter_model.safetensors: tensors too many or too few: {odd[0][:120]!r}")


def _own_biases(model: Any, graft: Graft) -> None:
    """Trained biases of the base, and embeddings saved beside their adapter, go into parameters of this tree alone."""
    trained = graft.config.get("bias", "none") not in ("none", None, False)
    for path, module in model.named_modules():
        for name, param in list(module.named_parameters(recurse=False)):
            key = f"{path}.{name}"
            embedding = isinstance(module, nn.Embedding) and key.endswith("base_layer.weight")
            if key in graft.tensors and (embedding or (trained and name == "bias")):
                setattr(module, name, nn.Parameter(param.detach().clone(), requires_grad=False))


@contextmanager
def _folders(graft: Graft) -> Iterator[list[Path]]:
    """The experts as PEFT reads them: folders of ours that are gone afterwards, each checked like any adapter."""
    if not graft.experts:
        yield []
        return
    with TemporaryDirectory(prefix="experts-") as root:
        folders = [Path(root) / str(i) for i in range(len(graft.experts))]
        for folder, expert in zip(folders, graft.experts, strict=True):
            folder.mkdir()
            configured(expert.kind, expert.config)
            kept = {k: v for k, v in expert.config.items() if k not in IGNORED | DROPPED}
            text = json.dumps({**kept, "peft_type": expert.kind, "task_type": "CAUSAL_LM"})
            (folder / "adapter_config.json").write_text(text)
            save_file({k: v.contiguous() for k, v in expert.tensors.items()}, folder / "adapter_model.safetensors")
        yield folders


def merged(model: Any, name: str) -> Any:
    """The plain model with the adapter folded into copies of the weights that it touches. Raises NotMergeable."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            for key, param in list(base.named_parameters(recurse=False)):
                if type(param) is nn.Parameter:
                    setattr(base, key, nn.Parameter(param.detach().clone(), requires_grad=False))
    try:
        with torch.no_grad():
            plain = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise NotMergeable(f"adapter {name!r}: PEFT does not merge it ({str(error)[:200]})", param="mode") from error
    if not all(bool(torch.isfinite(p).all()) for p in plain.parameters() if p.is_floating_point()):
        raise AdapterRefused(f"folding {name!r} gave weights that are not finite; serve this adapter unmerged")
    return plain


def hooks(model: Any, options: Mapping[str, Any]) -> Any:
    """The context in which PEFT's own `generate` runs a model's forward."""
    if isinstance(tasks := getattr(model.base_model, "_manage_pre_hooks", None), types.MethodType):
        return tasks(options["task_ids"])  # POLY's own
    return model._enable_peft_forward_hooks(**options)
