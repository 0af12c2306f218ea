"""What all kinds that wrap Linears refuse, and what each refuses of its own."""

import json

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file

import zoo
from adapter_server.core import Spec
from adapter_server.errors import AdapterRefused
from adapter_server.families import find
from adapter_server.families.facts import ModelBase, describe

SHAPES = {arch: describe(zoo.tiny_base(arch)) for arch in ("llama", "gpt2", "gemma2")}
Q = "base_model.model.model.layers.0.self_attn.q_proj."


def expected(kind, arch="llama", **options):
    config = {"peft_type": kind, "target_modules": ["q_proj"], **options}
    return find(kind).expected(config, SHAPES[arch], frozenset())


def refuses(kind, reason, **options):
    with pytest.raises(AdapterRefused, match=reason):
        expected(kind, **options)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("HRA", {"r": 10**6}, "'r' must be an integer in 1..1024"),
        ("HRA", {"bias": "some"}, "'bias' must be none, all or"),
        ("HRA", {"rr": 1}, "'rr' is not a key of this kind; did you mean 'r'"),
        ("HRA", {"target_modules": ["embed_tokens"]}, "embed_tokens, which HRA does not apply to"),
        ("HRA", {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "matches no module"),
        ("HRA", {"target_modules": ["c_attn"], "arch": "gpt2"}, "c_attn, which HRA does not apply to"),
        ("ADALORA", {"use_dora": True}, "AdaLoRA does not define it"),
        (
            "ADALORA",
            {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}},
            "must give 12 times true or false",
        ),
        ("PVERA", {"sample_at_inference": True}, "answers would be random"),
        ("GRALORA", {"r": 5}, "'gralora_k' is 2, which does not divide 5"),
        ("GRALORA", {"r": 12, "gralora_k": 3}, "'gralora_k' is 3, which does not divide 32"),
        ("MISS", {"r": 5, "init_weights": "bat"}, "'r' is 5, which does not divide 32"),
        ("MISS", {"r": 4, "mini_r": 5, "init_weights": "mini"}, "'mini_r' is 5"),
        ("MISS", {"r": 4, "init_weights": "other"}, "'init_weights' must be"),
        ("VBLORA", {"vector_length": 5}, "'vector_length' is 5"),
        ("VBLORA", {"vector_length": 8, "num_vectors": 2, "topk": 3}, "'topk' is 3 and 'num_vectors' only 2"),
        ("UNILORA", {"theta_d_length": 0}, "'theta_d_length' must be"),
        ("TINYLORA", {"r": 32, "u": 1 << 20}, "beyond 67,108,864"),
        ("TINYLORA", {"weight_tying": 2}, "'weight_tying' must be in 0..1"),
        ("PSOFT", {"psoft_svd": "lowrank"}, "'psoft_svd' must be one of"),
        ("PSOFT", {"r": 33}, "'r' must be an integer in 2..32"),
        ("OSF", {"effective_rank": 32}, "leaves nothing to train"),
        ("ROAD", {"group_size": 3}, "'group_size' is 3"),
        ("ROAD", {"group_size": 1}, "must be even"),
        ("ROAD", {"variant": "road_3"}, "'variant' must be one of"),
        ("GLORA", {"config_C": "constant"}, "'config_C' must be one of"),
        ("LOKR", {"decompose_factor": 0}, "'decompose_factor' must be -1 or positive"),
        ("OFT", {"r": 4}, "exactly one of 'r' and 'oft_block_size'"),
        ("OFT", {"oft_block_size": 1}, "rotate nothing"),
        ("BOFT", {"boft_n_butterfly_factor": 5}, "need even blocks, a multiple of 16 of them; at .* there are 8 of 4"),
        ("BOFT", {"boft_n_butterfly_factor": 21}, r"must be an integer in 1\.\.20"),
        ("BOFT", {"boft_block_num": 4}, "exactly one of 'boft_block_size'"),
        ("FOURIERFT", {"n_frequency": 2000}, "more than model.layers.0.self_attn.q_proj has weights"),
        ("WAVEFT", {"n_frequency": 9, "wavelet_family": "sym4"}, "'wavelet_family' must be one of"),
        ("C3A", {"block_size": 5}, "'block_size' is 5"),
        ("RANDLORA", {"save_projection": False}, "depend on the machine"),
        ("FROD", {"save_projection": False}, "save the adapter with its projections"),
        ("FROD", {"sparse_rate": 0}, "'sparse_rate' must be above 0"),
        ("SHIRA", {"r": 17}, "more numbers than"),
        ("SUPERTUNING", {"sparsity": 0.9999}, "leaves 0 of 1024 weights"),
        ("SUPERTUNING", {"sparsity": -1}, "leaves 2048 of 1024 weights"),
        ("TRAINABLE_TOKENS", {}, "'token_indices' must list the tokens"),
        (
            "TRAINABLE_TOKENS",
            {"target_modules": ["embed_tokens"], "token_indices": [97]},
            "must be an integer in 0..96",
        ),
        ("TRAINABLE_TOKENS", {"target_modules": ["embed_tokens"], "token_indices": [3, 3]}, "names a token twice"),
        ("TRAINABLE_TOKENS", {"target_modules": ["norm"], "token_indices": [3]}, "which has no rows of tokens"),
    ],
    ids=str,
)
def test_refusals(kind, options, reason):
    refuses(kind, reason, **options)


def test_a_small_file_cannot_ask_for_a_large_list(monkeypatch):
    monkeypatch.setattr("adapter_server.families.unilora.MAX_NUMBERS", 100)
    refuses("UNILORA", "'r' makes 512 numbers, allowed are 100")


def test_a_tied_head_brings_its_rows():
    keys = expected("TRAINABLE_TOKENS", "gemma2", target_modules="model.embed_tokens", token_indices=[3])
    assert [key.split(".")[-2] for key in keys] == ["embed_tokens", "lm_head"]


def load(case, folder, change, arch="llama"):
    """A sound adapter whose tensors are changed before it is compiled."""
    base = zoo.tiny_base(arch)
    zoo.save_adapter(lambda: zoo.tiny_base(arch), zoo.ADAPTERS[case](base), folder)
    spec, tensors = zoo.read(folder)
    change(tensors)
    return find(spec.family).load(spec, tensors, ModelBase(base))


def fill(name, value):
    def change(tensors):
        tensors[name] = torch.full_like(tensors[name], value)

    return change


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("shira", fill(Q + "shira_indices", 32), "outside 0..31"),
        ("shira", fill(Q + "shira_indices", -1), "outside 0..31"),
        ("shira", fill(Q.replace("q_proj", "k_proj") + "shira_indices", 20), "outside the weight"),
        ("supertuning", fill(Q + "supertuning_indices", 1024), "outside 0..1023"),
        ("vblora_topk", fill(Q + "vblora_logits_A_topk_indices", 16), "outside 0..15"),
        ("unilora_saved", fill(Q + "unilora_indices_B", 64), "outside 0..63"),
        ("frod", fill("base_model.frod_s_indices.self_attn_q_proj", 32), "outside 0..31"),
        ("frod", fill("base_model.frod_s_size.self_attn_q_proj", 31), "must be 32, 32"),
        ("randlora", fill(Q + "randlora_A", 1.0), "its random bases differ"),
        ("hra", fill(Q + "hra_u", 0.0), "not finite"),
        ("delora", lambda tensors: tensors.pop(Q + "delora_A"), "holds no tensor '.*delora_A'"),
        ("delora", lambda tensors: tensors.update(more=torch.ones(1)), "belong to nothing in its config: more"),
    ],
    ids=lambda value: "change" if callable(value) else str(value),
)
def test_what_a_file_may_not_hold(case, change, reason, tmp_path):
    with pytest.raises(AdapterRefused, match=reason):
        load(case, tmp_path, change)


def test_a_tied_head_with_other_rows_is_refused(tmp_path):
    change = fill("base_model.model.lm_head.trainable_tokens_delta", 1.0)
    with pytest.raises(AdapterRefused, match="different rows"):
        load("trainable_tokens", tmp_path, change, "gemma2")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kasa_config": {"beta": 1}, "use_dora": True}, "together with"),
        ({"kasa_config": {"new": 1}}, "'new' is not a key"),
        ({"use_bdlora": {"nblocks": 3, "target_modules_bd_a": ["q"]}}, "'nblocks' is 3"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q_proj"]}}, "splits both factors"),
        ({"init_lora_weights": "pissa", "r": 33}, "rank 33 is too high"),
        ({"kasa_config": {"beta": 1}, "r": 32}, "rank 32 is too high"),
        ({"init_lora_weights": "pissa", "target_modules": ["lm_head"]}, "cannot be undone at the embedding"),
        ({"trainable_token_indices": {"nothing": [1]}}, "matches no module"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "both in"),
        ({"trainable_token_indices": {"norm": [1]}}, "no rows of tokens"),
    ],
    ids=str,
)
def test_refusals_of_loras_variants(options, reason):
    refuses("LORA", reason, **options)


def test_copies_of_integers_stay_integers(tmp_path):
    base = zoo.tiny_base("llama")
    zoo.save_adapter(lambda: zoo.tiny_base("llama"), zoo.ADAPTERS["shira"](base), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    shapes = find("SHIRA").expected(config, SHAPES["llama"], frozenset())
    whole = {
        key
        for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
        if not tensor.is_floating_point()
    }
    assert {key for key, shape in shapes.items() if getattr(shape, "integer", False)} == whole


@torch.no_grad()
@pytest.mark.parametrize(("factors", "size"), [(2, 4), (3, 4), (4, 2), (3, 8)])
def test_several_butterflies_are_as_in_pefts_layer(factors, size, monkeypatch):
    """PEFT runs one factor where its CUDA extension is missing: in its place stands what the extension computes."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", Diagonals)
    base, path = zoo.tiny_base("qwen2"), "model.layers.0.self_attn.q_proj"
    options = {"target_modules": ["layers.0.self_attn.q_proj"], "boft_block_size": size}
    config = peft.BOFTConfig(**options, boft_n_butterfly_factor=factors, init_weights=False)
    with zoo.quiet():
        oracle = peft.get_peft_model(zoo.tiny_base("qwen2"), config).eval().base_model.model.get_submodule(path)
    key = f"base_model.model.{path}."
    tensors = {key + "boft_R": oracle.boft_R["default"].data, key + "boft_s": oracle.boft_s["default"].data}
    served = {"peft_type": "BOFT", **options, "boft_n_butterfly_factor": factors}
    shapes = describe(base)
    assert find("BOFT").expected(served, shapes, frozenset()) == {k: tuple(t.shape) for k, t in tensors.items()}
    patch = find("BOFT").load(Spec("a", "0" * 12, "", "BOFT", served, 0), tensors, ModelBase(base)).patches[path]
    x, module = zoo.inputs(shapes.modules[path]), base.get_submodule(path)
    assert zoo.same(patch.apply(x, module), oracle(x))
    assert zoo.same(zoo.folded(patch, x, module, shapes.modules[path]), oracle(x))


class Diagonals:
    """What PEFT's extension computes: each factor's blocks as one matrix."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*each) for each in blocks])
