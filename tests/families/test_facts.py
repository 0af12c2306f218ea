"""The base's facts: shapes on any device, weights as private copies."""

import pytest
import torch
import transformers
from torch import nn

import zoo
from adapter_server.errors import AdapterUnavailable
from adapter_server.families.facts import ModelBase, describe


@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_a_model_born_on_meta_has_the_same_shapes(arch):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(zoo.CONFIGS[arch]())
    assert describe(model) == describe(zoo.tiny_base(arch))


@pytest.mark.parametrize("arch", zoo.ARCHS)
def test_shapes_are_those_of_the_keys_and_values(arch):
    base = zoo.tiny_base(arch)
    shapes = describe(base)
    keys = base(torch.arange(3, 8)[None], use_cache=True).past_key_values.layers[0].keys
    assert (shapes.kv_heads, shapes.head_dim) == (keys.shape[1], keys.shape[3])
    assert (shapes.layers, shapes.hidden, shapes.vocab) == (2, 32, zoo.VOCAB)
    assert shapes.tied == (arch in ("gemma2", "gemma3", "gpt2"))


def test_kinds_and_paths():
    modules = describe(zoo.tiny_base("gpt2")).modules
    assert modules["transformer.h.0.attn.c_attn"].kind == "conv1d"
    assert (modules["transformer.h.0.attn.c_attn"].inp, modules["transformer.h.0.attn.c_attn"].out) == (32, 96)
    assert modules["transformer.h.0.attn.c_attn"].has_bias
    assert modules["transformer.ln_f"].params == {"weight": (32,), "bias": (32,)}
    shapes = describe(zoo.tiny_base("llama"))
    assert shapes.modules["model.layers.0.self_attn.k_proj"].out == 16
    assert not shapes.modules["model.layers.0.self_attn.k_proj"].has_bias
    assert (shapes.embed, shapes.head) == ("model.embed_tokens", "lm_head")
    assert "model.layers.0" not in shapes.modules


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_scaled_embeddings_are_noted(arch):
    shapes = describe(zoo.tiny_base(arch))
    assert shapes.scaled_embeddings == {"model.embed_tokens": pytest.approx(32**0.5)}


def test_weights_are_float32_copies_with_rows_for_outputs():
    model = zoo.tiny_base("gpt2").to(torch.bfloat16)
    base, module = ModelBase(model), model.transformer.h[0].mlp.c_fc
    weight = base.weight("transformer.h.0.mlp.c_fc")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, module.weight.T.float())
    weight.zero_()
    base.bias("transformer.h.0.mlp.c_fc").zero_()
    base.param("transformer.ln_f", "bias").zero_()
    assert module.weight.any()
    assert module.bias.any()
    assert model.transformer.ln_f.bias.any()
    assert ModelBase(zoo.tiny_base("llama")).bias("lm_head") is None


def test_a_quantised_weight_is_not_taken_for_a_number():
    model = zoo.tiny_base("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(AdapterUnavailable, match="lm_head is quantised"):
        ModelBase(model).weight("lm_head")
