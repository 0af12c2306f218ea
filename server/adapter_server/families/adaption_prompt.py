"""Adaption prompts (PEFT `tuners/adaption_prompt/`): the last layers attend to prompts of their own, through a gate.

y = W_o (attention + g · softmax(q Kᵀ / √d) V)      K = W_k P, V = W_v P, both without RoPE;  P [n, hidden]  g [1]
W_o's bias, where it has one, is added twice.  GPT-2: behind W_o, so that y = W_o attention + g · softmax(…) V
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Adapter, AnyPatch, Base, Family, GatedPrompt, Patch, Shapes
from adapter_server.families.options import Config, check_known, choice, integer
from adapter_server.families.parts import ROOT, Expected, Taker, base_bias

KNOWN = frozenset({"adapter_layers", "adapter_len", "target_modules"})


@dataclass(frozen=True, slots=True)
class Names:
    """What an architecture calls its attention, and the Linears of its keys and of its output."""

    attention: str
    keys: str
    out: str


_LLAMA, _GPT2 = Names("self_attn", "k_proj", "o_proj"), Names("attn", "c_attn", "c_proj")
NAMES = {"llama": _LLAMA, "mistral": _LLAMA, "gpt2": _GPT2}  # those that PEFT has it for


class AdaptionPrompt:
    name = "ADAPTION_PROMPT"
    slow = True

    def expected(self, config: Config, shapes: Shapes, names: frozenset[str]) -> Expected:
        n = integer(config, "adapter_len", None, most=1 << 16)
        keys: Expected = {}
        for path in _attentions(config, shapes):
            keys |= {f"{ROOT}{path}.adaption_gate": (1,), f"{ROOT}{path}.adaption_prompt": (1, n, shapes.hidden)}
        return keys

    def load(self, spec: Spec, tensors: Mapping[str, Tensor], base: Base) -> Adapter:
        take, prompts = Taker(tensors), {}
        patches: dict[str, AnyPatch] = {}
        for path in _attentions(spec.config, base.shapes):
            gate, prompt = take(f"{ROOT}{path}.adaption_gate"), take(f"{ROOT}{path}.adaption_prompt")[0]
            if base.shapes.model_type == "gpt2":
                prompts[path] = _gpt2(gate, prompt, path, base)
                continue
            prompts[path] = _llama(gate, prompt, path, base)
            out = f"{path}.{_LLAMA.out}"
            if base.shapes.modules[out].has_bias:
                patches[out] = Patch(bias=base_bias(base, out))
        take.done()
        return Adapter(spec, patches, gated=prompts)


def _attentions(config: Config, shapes: Shapes) -> list[str]:
    """Paths of the attentions of the last layers."""
    check_known(config, KNOWN)
    names = NAMES.get(shapes.model_type)
    if names is None:
        known = ", ".join(NAMES)
        raise AdapterRefused(f"adaption prompts are defined for {known}, and this base is a {shapes.model_type}")
    if config.get("target_modules") is not None:
        choice(config, "target_modules", names.attention, (names.attention,))
    end = f".{names.attention}.{names.keys}"
    paths = [path.removesuffix(f".{names.keys}") for path in shapes.modules if path.endswith(end)]
    return paths[-integer(config, "adapter_layers", None, most=len(paths)) :]


def _llama(gate: Tensor, prompt: Tensor, path: str, base: Base) -> GatedPrompt:
    shapes = base.shapes
    K, V = (
        F.linear(prompt, base.weight(p), base.bias(p)).view(len(prompt), -1, shapes.head_dim).transpose(0, 1)
        for p in (f"{path}.k_proj", f"{path}.v_proj")
    )  # [kv_heads, n, dim]
    factor = shapes.modules[f"{path}.q_proj"].out // shapes.modules[f"{path}.k_proj"].out
    if factor != shapes.modules[f"{path}.k_proj"].inp // shapes.modules[f"{path}.k_proj"].out:
        raise AdapterRefused(
            f"{path}: its heads are wider or narrower than the hidden size says, which PEFT cannot run"
        )
    return GatedPrompt(K.repeat_interleave(factor, 0), V.repeat_interleave(factor, 0), gate)


def _gpt2(gate: Tensor, prompt: Tensor, path: str, base: Base) -> GatedPrompt:
    both = F.linear(prompt, base.weight(f"{path}.c_attn"), base.bias(f"{path}.c_attn"))
    _, K, V = (t.view(len(prompt), -1, base.shapes.head_dim).transpose(0, 1).contiguous() for t in both.chunk(3, 1))
    return GatedPrompt(K, V, gate, behind=True)


FAMILY: Family = AdaptionPrompt()
