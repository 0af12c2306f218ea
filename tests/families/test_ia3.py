"""(IA)³: where its scales stand, and what is refused."""

import dataclasses

import peft
import pytest
import torch

import zoo
from adapter_server.errors import AdapterRefused
from adapter_server.families import ia3
from adapter_server.families.facts import ModelBase, describe
from adapter_server.families.options import IGNORED

SHAPES = describe(zoo.tiny_base("llama"))


def expected(**options):
    config = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return ia3.FAMILY.expected(config | options, SHAPES, frozenset())


def test_every_field_of_peft_is_known():
    assert {field.name for field in dataclasses.fields(peft.IA3Config)} <= ia3.KNOWN | IGNORED


def test_feed_forward_scales_the_input_and_the_others_their_output():
    keys = expected()
    assert keys["base_model.model.model.layers.0.mlp.down_proj.ia3_l"] == (1, 48)
    assert keys["base_model.model.model.layers.1.self_attn.k_proj.ia3_l"] == (16, 1)
    assert len(keys) == 4
    assert expected(target_modules=r".*\.(k_proj|down_proj)", feedforward_modules=r".*down_proj") == keys
    assert all(shape[1] == 1 for shape in expected(feedforward_modules=None).values())


def test_the_scale_of_an_output_covers_its_bias(tmp_path):
    base = zoo.tiny_base("qwen2")
    zoo.save_adapter(lambda: zoo.tiny_base("qwen2"), zoo.ADAPTERS["ia3"](base), tmp_path)
    spec, tensors = zoo.read(tmp_path)
    patch = ia3.FAMILY.load(spec, tensors, ModelBase(base)).patches["model.layers.0.self_attn.k_proj"]
    bias = base.model.layers[0].self_attn.k_proj.bias
    new = patch.fold({"weight": torch.zeros(16, 32), "bias": bias})
    assert torch.equal(new["bias"], bias * patch.out_scale)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ["embed_tokens"]}, "does not apply to"),
        ({"target_modules": ["nothing"]}, "matches no module"),
        ({"target_modules": None}, "'target_modules' is missing"),
        ({"feedforward_modules": "("}, "does not compile"),
        ({"r": 4}, "'r' is not a key of this kind"),
    ],
)
def test_refusals(options, reason):
    with pytest.raises(AdapterRefused, match=reason):
        expected(**options)
