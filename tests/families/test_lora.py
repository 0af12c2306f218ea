"""LoRA: what a config may say, what is refused and why, and files that differ from what PEFT saves by default."""

import dataclasses
import math
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import save_file

import zoo
from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families import lora
from adapter_server.families.facts import ModelBase, describe
from adapter_server.families.options import IGNORED

FAMILY = lora.FAMILY
SHAPES = describe(zoo.tiny_base("llama"))
TIED = describe(zoo.tiny_base("gemma2"))
Q = "base_model.model.model.layers.0.self_attn.q_proj."
EMBED, HEAD = "base_model.model.model.embed_tokens.", "base_model.model.lm_head."


def config(**options):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | options


def expected(shapes=SHAPES, names=frozenset(), **options):
    return FAMILY.expected(config(**options), shapes, names)


def saved(folder, case="lora", arch="llama"):
    zoo.save_adapter(lambda: zoo.tiny_base(arch), zoo.ADAPTERS[case](zoo.tiny_base(arch)), folder)
    return zoo.read(folder)


def test_every_field_of_peft_is_served_harmless_or_refused():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    listed = lora.SERVED | lora.HARMLESS | lora.REFUSED.keys() | IGNORED
    assert fields <= listed


def test_the_three_lists_do_not_overlap():
    assert not lora.SERVED & lora.HARMLESS
    assert not (lora.SERVED | lora.HARMLESS) & lora.REFUSED.keys()


@pytest.mark.parametrize("key", sorted(lora.REFUSED))
def test_an_option_that_is_not_served_is_refused_with_advice(key):
    with pytest.raises(AdapterRefused, match=rf"'{key}' is not served here: .+; .+"):
        expected(**{key: [[0, 1]]})
    assert expected(**{key: None}) == expected()


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "kasa", "new", 3, {}])
def test_an_initialisation_that_changes_the_base_is_refused_with_the_way_to_convert(init):
    with pytest.raises(AdapterRefused, match="path_initial_model_for_weight_conversion"):
        expected(init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_plain_lora(init):
    assert expected(init_lora_weights=init) == expected()


def test_shapes_follow_the_base():
    assert expected(target_modules=["k_proj"], layers_to_transform=1) == {
        "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight": (4, 32),
        "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight": (16, 4),
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_alfa": 8}, "'lora_alfa' is not a key of this kind; did you mean 'lora_alpha'"),
        ({"r": 0}, "'r' must be an integer"),
        ({"r": True}, "'r' must be an integer"),
        ({"r": 4.0}, "'r' must be an integer"),
        ({"r": "4"}, "'r' must be an integer"),
        ({"lora_alpha": 1e30}, "'lora_alpha' must be a finite number"),
        ({"lora_alpha": math.nan}, "'lora_alpha' must be a finite number"),
        ({"lora_alpha": "8"}, "'lora_alpha' must be a finite number"),
        ({"lora_alpha": 1e6}, "scaling"),
        ({"rank_pattern": {"q_proj": -1}}, "'r' must be an integer"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' must be an object"),
        ({"rank_pattern": {"(": 2}}, r"does not compile in RE2"),
        ({"alpha_pattern": {"(?=q)": 2}}, r"does not compile in RE2"),
        ({"use_dora": "yes"}, "'use_dora' must be true or false"),
        ({"use_dora": True, "lora_bias": True}, "'lora_bias' together with 'use_dora'"),
        ({"bias": "some"}, "'bias' must be one of"),
        ({"bias": ["all"]}, "'bias' must be one of"),
        ({"modules_to_save": "lm_head"}, "'modules_to_save' must be a list"),
        ({"target_modules": ["input_layernorm"]}, "which LoRA does not apply to"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, "which LoRA does not apply to"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["_proj"]}, "both in 'target_modules' and"),
        ({"velora_config": 5}, "'velora_config' must be an object"),
        ({"use_qalora": True, "qalora_group_size": 5}, "'qalora_group_size' is 5, which does not divide"),
        ({"use_qalora": True, "qalora_group_size": 0}, "'qalora_group_size' must be an integer"),
        ({"use_qalora": True, "use_dora": True}, "together with 'use_qalora' is not defined"),
        ({"use_qalora": True, "lora_bias": True}, "together with 'use_qalora' is not defined"),
        ({"use_qalora": True, "target_modules": ["embed_tokens"]}, "which LoRA does not apply to"),
        ({"alora_invocation_tokens": []}, "must be a list of 1 to 256 token ids"),
        ({"alora_invocation_tokens": [5] * 257}, "must be a list of 1 to 256 token ids"),
        ({"alora_invocation_tokens": "[5]"}, "must be a list of 1 to 256 token ids"),
        ({"alora_invocation_tokens": [zoo.VOCAB]}, r"must be an integer in 0\.\.96"),
        ({"alora_invocation_tokens": [-1]}, r"must be an integer in 0\.\.96"),
        ({"alora_invocation_tokens": [5], "use_dora": True}, "together with 'use_dora' is not defined"),
        ({"alora_invocation_tokens": [5], "bias": "all"}, "together with 'bias' is not defined"),
        ({"alora_invocation_tokens": [5], "modules_to_save": ["lm_head"]}, "together with 'modules_to_save'"),
        ({"alora_invocation_tokens": [5], "init_lora_weights": "pissa"}, "together with 'init_lora_weights'"),
        ({"alora_invocation_tokens": [5], "target_modules": ["embed_tokens"]}, "which aLoRA does not apply to"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, reason):
    with pytest.raises(AdapterRefused, match=reason):
        expected(**options)


def test_a_hanging_pattern_costs_nothing():
    with pytest.raises(AdapterRefused, match="matches no module"):
        expected(target_modules=r"([\w.]+)+!")
    assert expected(rank_pattern={r"([\w.]+)+!": 3}) == expected()


def test_only_embedding_and_head_may_bring_a_copy_of_the_base():
    stray = frozenset({Q + "base_layer.weight", "base_model.model.model.norm.weight", EMBED + "weight"})
    assert not stray & expected(names=stray).keys()
    names = frozenset({HEAD + "base_layer.weight"})
    assert not names & expected(names=names).keys()
    assert names <= expected(names=names, target_modules=["lm_head"]).keys()


def test_a_missing_tensor_and_a_leftover_are_refused_by_name(tmp_path):
    spec, tensors = saved(tmp_path)
    base = ModelBase(zoo.tiny_base("llama"))
    some = Q + "lora_A.weight"
    with pytest.raises(AdapterRefused, match=f"no tensor '{some}'"):
        FAMILY.load(spec, {name: t for name, t in tensors.items() if name != some}, base)
    with pytest.raises(AdapterRefused, match=r"1 tensors .*: base_model\.model\.model\.norm\.weight"):
        FAMILY.load(spec, tensors | {"base_model.model.model.norm.weight": torch.ones(32)}, base)


def loaded(folder, dtype, case="lora", most=1.0, **config):
    """A saved adapter of this format, its B times `most`, once more as float32."""
    spec, tensors = saved(folder, case)
    halves = {name: (most * t if "lora_B" in name else t).to(dtype) for name, t in tensors.items()}
    spec, base = dataclasses.replace(spec, config={**spec.config, **config}), ModelBase(zoo.tiny_base("llama"))
    wide = {name: t.float() for name, t in halves.items()}
    return FAMILY.load(spec, halves, base), FAMILY.load(spec, wide, base)


@pytest.mark.parametrize(
    ("dtype", "config", "kept"),
    [
        (torch.bfloat16, {"lora_alpha": 8, "r": 4}, {torch.bfloat16}),
        (torch.bfloat16, {"lora_alpha": 0.125, "r": 4}, {torch.bfloat16}),
        (torch.bfloat16, {"lora_alpha": 12, "r": 4}, {torch.float32}),
        (torch.bfloat16, {"lora_alpha": 16, "r": 4, "use_rslora": True}, {torch.bfloat16}),
        (torch.float16, {"lora_alpha": 8, "r": 4}, {torch.float16}),
        (torch.float16, {"lora_alpha": 2, "r": 4}, {torch.float32}),  # which may be below its range
        (torch.float32, {"lora_alpha": 8, "r": 4}, {torch.float32}),
    ],
)
def test_factors_keep_a_files_16_bits_where_the_scaling_rounds_nothing(dtype, config, kept, tmp_path):
    ours, wide = loaded(tmp_path, dtype, **{"rank_pattern": {}, "alpha_pattern": {}, **config})
    assert {t.dtype for t in ours.tensors()} == kept
    for path, patch in ours.patches.items():
        assert torch.equal(patch.A.float(), wide.patches[path].A)
        assert torch.equal(patch.B.float(), wide.patches[path].B)


def test_factors_beyond_float16_are_float32(tmp_path):
    ours, wide = loaded(tmp_path, torch.float16, most=60_000, lora_alpha=64, r=4)
    assert torch.float32 in {patch.B.dtype for patch in ours.patches.values()}
    assert all(torch.equal(patch.B.float(), wide.patches[path].B) for path, patch in ours.patches.items())


@pytest.mark.parametrize("case", ["dora", "lora_embed", "lora_saved", "velora"])
def test_a_file_of_more_than_factors_is_float32(case, tmp_path):
    adapter, _ = loaded(tmp_path, torch.bfloat16, case)
    assert {t.dtype for t in adapter.tensors() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(("arch", "case"), [("llama", "lora_embed"), ("gemma2", "lora_embed"), ("gemma2", "lora_head")])
@pytest.mark.parametrize("dora", [False, True])
def test_a_changed_copy_of_the_embedding_overrides_it_and_its_tied_head(arch, case, dora, tmp_path):
    base = zoo.tiny_base(arch)
    settings = zoo.ADAPTERS[case](base)
    settings.use_dora = dora
    zoo.save_adapter(lambda: zoo.tiny_base(arch), settings, tmp_path)
    spec, tensors = zoo.read(tmp_path)
    copies = [name for name in tensors if name.endswith("base_layer.weight")]
    assert len(copies) == 1
    tensors[copies[0]] = tensors[copies[0]].flip(0).contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = FAMILY.load(spec, tensors, ModelBase(base))
    assert zoo.differences(base, adapter, zoo.load_peft(zoo.tiny_base(arch), tmp_path)) == {}
    assert ({"lm_head", "model.embed_tokens"} <= adapter.patches.keys()) == (arch == "gemma2")


def test_an_unchanged_copy_costs_no_override_even_where_the_base_is_rounded(tmp_path):
    spec, tensors = saved(tmp_path, "lora_embed")
    adapter = FAMILY.load(spec, tensors, ModelBase(zoo.tiny_base("llama").to(torch.bfloat16)))
    assert adapter.patches["model.embed_tokens"].weight is None


def test_two_different_copies_of_a_tied_weight_are_refused(tmp_path):
    spec, tensors = saved(tmp_path, "lora_tied", "gemma2")
    for i, name in enumerate([EMBED + "base_layer.weight", HEAD + "base_layer.weight"]):
        tensors[name] = tensors[name] + 1 + i
    with pytest.raises(AdapterRefused, match="two different weights"):
        FAMILY.load(spec, tensors, ModelBase(zoo.tiny_base("gemma2")))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_adapters_are_expected_on_both_sides(targets):
    keys = expected(TIED, target_modules=targets, ensure_weight_tying=True)
    assert {EMBED + "lora_embedding_A", HEAD + "lora_A.weight"} <= keys.keys()
    untied = expected(SHAPES, target_modules=targets, ensure_weight_tying=True)
    assert len(untied) == 2 * len(targets)


def test_dora_over_a_row_of_zeros_is_refused(tmp_path):
    spec, tensors = saved(tmp_path, "dora")
    base = zoo.tiny_base("llama")
    base.model.layers[0].self_attn.q_proj.weight.data[0] = 0
    tensors[Q + "lora_B.weight"][0] = 0
    with pytest.raises(AdapterRefused, match="row of zeros"):
        FAMILY.load(spec, tensors, ModelBase(base))


def test_a_bias_the_base_lacks_is_never_called_for():
    assert expected(bias="all") == expected(bias="lora_only") == expected()
    assert expected(describe(zoo.tiny_base("qwen2")), bias="lora_only").keys() >= {Q + "base_layer.bias"}


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 4, 16])
def test_pooled_inputs_are_as_in_pefts_layer_over_gptq(group: int, tmp_path: Path) -> None:
    """PEFT has QA-LoRA in its layer over GPTQ's Linears alone; the layer itself takes any."""
    base = zoo.tiny_base("llama")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], use_qalora=True, qalora_group_size=group)
    layer = GPTQLoraLinear(base.get_submodule("model.layers.0.self_attn.q_proj"), "default", config, r=3, lora_alpha=6)
    tensors = {}
    for block in "01":
        for name in "AB":
            weight = torch.randn(getattr(layer, f"lora_{name}")["default"].weight.shape)
            tensors[f"base_model.model.model.layers.{block}.self_attn.q_proj.lora_{name}.weight"] = weight
            getattr(layer, f"lora_{name}")["default"].weight.copy_(weight)
    options = {"target_modules": ["q_proj"], "use_qalora": True, "qalora_group_size": group}
    served = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **options}
    assert FAMILY.expected(served, describe(base), frozenset()) == {k: tuple(t.shape) for k, t in tensors.items()}
    spec = Spec("a", "0" * 12, str(tmp_path), "LORA", served, 0)
    path = "model.layers.1.self_attn.q_proj"
    patch = FAMILY.load(spec, tensors, ModelBase(base)).patches[path]
    layer.quant_linear_module = module = base.get_submodule(path)
    x = torch.randn(2, 5, 32)
    assert zoo.same(patch.apply(x, module), layer(x))
    assert zoo.same(zoo.folded(patch, x, module, describe(base).modules[path]), layer(x))
