"""What the base model is, as facts: its shapes, read on any device (meta included), and its weights, read as copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapter_server.errors import AdapterUnavailable
from adapter_server.families.base import ModuleShape, Shapes, linear_params
from adapter_server.families.quantised import is_quantised


def describe(model: nn.Module) -> Shapes:
    """The shapes of a causal LM of transformers. Module paths are as the model names them."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    heads = getattr(config, "num_attention_heads", None) or 1  # state-space models have none
    return Shapes(
        modules={path: _shape(module) for path, module in modules.items() if owns(module)},
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        vocab=embed.num_embeddings,
        tied=_tied(embed, head, config),
        scaled_embeddings={path: s for path, module in modules.items() if (s := _embed_scale(module)) is not None},
        embed=paths[id(embed)],
        head=paths.get(id(head), ""),
        by_peft=bool(getattr(model.config, "is_encoder_decoder", False)),
        model_type=config.model_type,
    )


class ModelBase:
    """`Base` over a resident model: weights leave as float32 copies on the CPU, and the model is never written."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes = describe(model)
        self._modules = dict(model.named_modules())

    def weight(self, path: str) -> Tensor:
        """[out, in], however the module stores it; an embedding's is [vocab, hidden]. Raises AdapterUnavailable."""
        try:
            return _copy(linear_params(self._modules[path])[0], path)
        except (RuntimeError, TypeError, NotImplementedError) as error:  # of the quantisation's own kernels
            raise AdapterUnavailable(
                f"{path} is quantised and does not tell its weight, which is needed here: serve the base unquantised"
            ) from error

    def bias(self, path: str) -> Tensor | None:
        bias = getattr(self._modules[path], "bias", None)
        return None if bias is None else _copy(bias, path)

    def param(self, path: str, name: str) -> Tensor:
        """A parameter as its module stores it; a quantised weight as the module computes with it."""
        module = self._modules[path]
        if name == "weight" and is_quantised(module):
            return self.weight(path)
        return _copy(module.get_parameter(name), path)


def owns(module: nn.Module) -> bool:
    """Whether a module has numbers of its own."""
    return is_quantised(module) or next(module.parameters(recurse=False), None) is not None


def _tied(embed: nn.Module, head: nn.Module | None, config: Any) -> bool:
    """Moving a model to meta unties its parameters; there the config has to be believed."""
    if head is None:
        return False
    return head.weight is embed.weight or bool(embed.weight.is_meta and config.tie_word_embeddings)


def _shape(module: nn.Module) -> ModuleShape:
    """Linears by their features, since a quantised weight is stored packed."""
    params = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Linear) or is_quantised(module):
        out, inp = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        bias = {} if getattr(module, "bias", None) is None else {"bias": (out,)}
        return ModuleShape("linear", inp, out, {"weight": (out, inp), **bias})
    if isinstance(module, nn.Embedding):
        return ModuleShape("embedding", module.num_embeddings, module.embedding_dim, params)
    if type(module).__name__ == "Conv1D":
        inp, out = params["weight"]
        return ModuleShape("conv1d", inp, out, params)
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):  # of transformers' experts interface
        return ModuleShape("experts_transposed" if module.is_transposed else "experts", 0, 0, params)
    return ModuleShape("other", 0, 0, params)


def _embed_scale(module: nn.Module) -> float | None:
    """The factor of transformers' scaled word embeddings; on meta only the plain number has a value."""
    if not isinstance(module, nn.Embedding):
        return None
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    return None if scale is None else float(scale)


def _copy(tensor: Tensor, path: str) -> Tensor:
    if not tensor.is_floating_point():
        raise AdapterUnavailable(f"{path} is quantised: this adapter needs its weights; serve the base unquantised")
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
