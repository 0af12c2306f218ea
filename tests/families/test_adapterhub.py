"""AdapterHub's files: what they must hold, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

import beyond
import zoo
from adapter_server.errors import AdapterRefused
from adapter_server.families import find, virtual_tokens
from adapter_server.families.facts import ModelBase, describe
from adapter_server.registry import guard

SHAPES = {arch: describe(zoo.tiny_base(arch)) for arch in ("llama", "gpt2", "qwen2")}
PLAIN = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 8, "non_linearity": "relu"}
PREFIX = {"architecture": "prefix_tuning", "prefix_length": 3, "flat": True}

LORA = {"architecture": "lora", "r": 2}
GATED = {"use_gating": True}


def config(*members, arch="llama", **top):
    inner = members[0] if len(members) == 1 else {"architecture": "union", "configs": list(members)}
    return guard.parse_config(json.dumps({"model_type": arch, "name": "mine", "config": inner, **top}).encode())


def expected(*members, arch="llama", **top):
    found = config(*members, arch=arch, **top)
    return find(found["peft_type"]).expected(found, SHAPES[arch], frozenset())


def test_the_kind_is_read_from_the_shape_of_the_config():
    assert config(PLAIN)["peft_type"] == "ADAPTERHUB"
    assert config(PREFIX)["peft_type"] == config(PLAIN, PREFIX)["peft_type"] == "ADAPTERHUB_PREFIX"
    assert config(LORA)["peft_type"] == "ADAPTERHUB_LORA"
    for members in ([PLAIN, LORA], [PLAIN | GATED], [PREFIX | GATED], [LORA | GATED], [PLAIN, PREFIX | GATED]):
        assert config(*members)["peft_type"] == "ADAPTERHUB_UNIPELT"


def test_a_kind_that_the_config_is_not_is_refused():
    with pytest.raises(AdapterRefused, match="'peft_type' is ADAPTERHUB, and this config is ADAPTERHUB_UNIPELT"):
        expected(PLAIN | GATED, peft_type="ADAPTERHUB")


def test_places_before_the_prompt_are_the_prefixs():
    found = config(PLAIN, PREFIX)
    assert virtual_tokens(beyond.spec(found)) == 3
    assert virtual_tokens(beyond.spec(config(PLAIN))) == 0


def test_a_layer_may_be_left_out_and_have_a_factor_of_its_own():
    found = expected(PLAIN | {"leave_out": [0], "reduction_factor": {"1": 16, "default": 2}})
    assert {name.split(".")[2] for name in found} == {"1"}
    assert found["model.layers.1.output_adapters.adapters.mine.adapter_down.0.weight"] == (2, 32)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ({"inv_adapter": "nice"}, "invertible adapters change the embeddings too"),
        ({"architecture": "reft"}, "AdapterHub's 'reft' is not served; train it with PEFT"),
        ({"architecture": ["lora"]}, "AdapterHub's .* is not served"),
        ({"residual_before_ln": "post_add"}, "'residual_before_ln' must be true or false"),
        ({"reduction_factor": 0}, "'reduction_factor' must be a number above 0"),
        ({"reduction_factor": 1e-9}, "'reduction_factor' must be a number above 0"),
        ({"reduction_factor": {"7": 2}}, "'reduction_factor' must be a finite number"),
        ({"leave_out": "all"}, "'leave_out' must be a list of layers"),
        ({"phm_layer": True, "phm_dim": 5}, "'phm_dim' is 5, which does not divide 32 and 4"),
        ({"phm_layer": True, "phm_dim": 1000}, "'phm_dim' must be an integer in 1..64"),
        ({"mh_adapters": True}, "'mh_adapters' is not a key of this kind; did you mean 'mh_adapter'"),
    ],
)
def test_what_a_bottleneck_refuses(member, reason):
    with pytest.raises(AdapterRefused, match=reason):
        expected(PLAIN | member)


def test_gates_have_tensors_of_their_own():
    plain = expected(PLAIN, PREFIX, LORA)
    found = expected(PLAIN | GATED, PREFIX | GATED | {"shared_gating": False}, LORA | GATED)
    assert {name for name in found if "gate" not in name} == set(plain)
    assert found["model.layers.1.self_attn.prefix_tuning.prefix_gates.mine.weight"] == (2, 32)
    assert found["model.layers.0.self_attn.v_proj.loras.mine.gate.bias"] == (1,)
    assert found["model.layers.0.output_adapters.adapters.mine.gate.weight"] == (1, 32)
    assert len(found) == len(plain) + 2 * 2 * (1 + 1 + 2)


def test_a_lora_of_one_linear_for_three_has_rows_for_each_that_is_trained():
    found = expected(LORA | {"attn_matrices": ["v", "q", "k"]}, arch="gpt2")
    assert found["transformer.h.0.attn.c_attn.loras.mine.lora_A"] == (6, 32)
    assert found["transformer.h.0.attn.c_attn.loras.mine.lora_B"] == (96, 2)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ({"composition_mode": "scale"}, "'composition_mode' must be one of"),
        ({"use_dora": True}, "'use_dora' is not served here: the library's DoRA"),
        ({"vera_d": 0.1}, "'vera_d' is not served here"),
        ({"dtype": "float16"}, "'dtype' is not served here"),
        ({"attn_matrices": ["o"]}, "'attn_matrices' must name some of q, k and v"),
        ({"attn_matrices": []}, "'attn_matrices' must name some of q, k and v"),
        ({"attn_matrices": "q"}, "'attn_matrices' must be a list of names"),
        ({"r": 0}, "'r' must be an integer"),
        ({"alpha": "8"}, "'alpha' must be a finite number"),
        ({"selfattn_lora": "yes"}, "'selfattn_lora' must be true or false"),
        ({"use_gating": "yes"}, "'use_gating' must be true or false"),
        ({"ranks": 8}, "'ranks' is not a key of this kind"),
    ],
)
@pytest.mark.parametrize("beside", [[], [PLAIN]])
def test_what_a_lora_refuses(member, reason, beside, tmp_path):
    with pytest.raises(AdapterRefused, match=reason):
        expected(*beside, LORA | member, arch="gpt2")


@pytest.mark.parametrize(
    ("members", "top", "reason"),
    [
        ([PLAIN, PLAIN], {}, "each method once: bottleneck, prefix, LoRA"),
        ([PREFIX | {"leave_out": [0]}], {}, "'leave_out' is not served for a prefix"),
        ([PREFIX | {"prefix_length": 1 << 30}], {}, "'prefix_length' must be an integer"),
        ([PLAIN], {"name": 5}, "'name' must be the name under which"),
        ([PLAIN], {"model_type": "bert"}, "'model_type' must be this base's and one of llama, mistral, gpt2"),
        ([PLAIN], {"model_type": "gpt2"}, "'model_type' must be this base's"),
        ([PLAIN], {"head": 1}, "'head' is not a key of this kind"),
        ([PLAIN, 5], {}, "'configs' must be a list of configs"),
    ],
)
def test_what_a_file_refuses(members, top, reason):
    with pytest.raises(AdapterRefused, match=reason):
        expected(*members, **top)


def test_an_unknown_activation_is_refused_when_it_is_loaded(tmp_path):
    spec, tensors = zoo.read(beyond.save_houlsby("llama", tmp_path / "a"))
    found = guard.parse_config(json.dumps(spec.config | {"config": PLAIN | {"mh_adapter": True}}).encode())
    found["config"]["non_linearity"] = "exec"
    with pytest.raises(AdapterRefused, match="'non_linearity' must be one of"):
        find("ADAPTERHUB").load(beyond.spec(found), tensors, ModelBase(zoo.tiny_base("llama")))


def test_two_prefixes_in_one_file_are_refused(tmp_path):
    spec, tensors = zoo.read(beyond.save_flat_prefix("llama", tmp_path / "a"))
    copy = "model.layers.1.self_attn.prefix_tuning.pool.prefix_tunings.mine.self_prefix.control_trans"
    tensors[copy] = torch.zeros_like(next(iter(tensors.values())))
    assert find("ADAPTERHUB_PREFIX").expected(spec.config, SHAPES["llama"], frozenset(tensors)).keys() == tensors.keys()
    with pytest.raises(AdapterRefused, match="two different prefixes"):
        find("ADAPTERHUB_PREFIX").load(spec, tensors, ModelBase(zoo.tiny_base("llama")))


def test_weights_under_adapterhubs_name_are_to_be_renamed(tmp_path):
    folder = beyond.save_houlsby("llama", tmp_path / "a")
    (folder / guard.WEIGHTS).rename(folder / "adapter.safetensors")
    with pytest.raises(AdapterRefused, match=r"read from adapter_model\.safetensors alone: rename it"):
        guard.check_files(folder)


def test_a_small_file_does_not_unfold_into_large_matrices():
    wide = replace(SHAPES["llama"], hidden=1 << 16)
    found = config(PLAIN | {"phm_layer": True, "reduction_factor": 1})
    with pytest.raises(AdapterRefused, match="makes 17,179,869,184 numbers, beyond 268,435,456"):
        find("ADAPTERHUB").expected(found, wide, frozenset())
