"""BitFit: what its folder must hold, and what it refuses."""

import pytest

import zoo
from adapter_server.errors import AdapterRefused
from adapter_server.families import find
from adapter_server.families.facts import describe

SHAPES = {arch: describe(zoo.tiny_base(arch)) for arch in ("llama", "gpt2")}


def expected(arch, **config):
    return dict(find("BITFIT").expected({"peft_type": "BITFIT", **config}, SHAPES[arch], frozenset()))


def test_a_list_names_the_biases_and_a_linear_needs_none_of_its_own():
    found = expected("llama", target_modules=["model.layers.1.self_attn.k_proj"])
    assert found == {"base_model.model.model.layers.1.self_attn.k_proj.bias": (16,)}


def test_without_a_list_it_is_every_bias_of_the_base():
    biases = {name: tuple(p.shape) for name, p in zoo.tiny_base("gpt2").named_parameters() if name.endswith("bias")}
    assert expected("gpt2") == {f"base_model.model.{name}": shape for name, shape in biases.items()}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "no module of this base has a bias; name them"),
        ({"target_modules": ["norm"]}, "names model.norm, which cannot have a bias"),
        ({"target_modules": ["embed_tokens"]}, "which cannot have a bias"),
        ({"target_modules": ["nothing"]}, "matches no module"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "'modules_to_save' is not a key of this kind"),
    ],
)
def test_what_it_refuses(config, reason):
    with pytest.raises(AdapterRefused, match=reason):
        expected("llama", **config)
