"""A patch applied equals a patch folded, for every field; moving and counting."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import zoo
from adapter_server.core import Spec
from adapter_server.families.base import Adapter, EmbeddingPatch, ParamPatch, Patch, linear_params

INP, OUT, RANK = 6, 10, 3
SPEC = Spec("a", "0" * 12, "", "LORA", {}, 0)
FIELDS = {
    "rank": {"A": (RANK, INP), "B": (OUT, RANK)},
    "gain": {"gain": (OUT,)},
    "in_scale": {"in_scale": (INP,)},
    "out_scale": {"out_scale": (OUT,)},
    "bias": {"bias": (OUT,)},
    "weight": {"weight": (OUT, INP)},
}
SUBSETS = [names for n in range(len(FIELDS) + 1) for names in itertools.combinations(FIELDS, n)]


def linear(kind: str, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        module = Conv1D(OUT, INP)
        nn.init.normal_(module.bias)
        return module
    return nn.Linear(INP, OUT, bias=bias)


@torch.no_grad()
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
def test_apply_equals_fold(kind, bias, names):
    module = linear(kind, bias)
    patch = Patch(**{field: torch.randn(shape) for name in names for field, shape in FIELDS[name].items()})
    x = torch.randn(4, INP)
    W, b = linear_params(module)
    params = {"weight": W.clone()} | ({} if b is None else {"bias": b.clone()})
    kept = {name: p.clone() for name, p in params.items()}
    new = patch.fold(params)
    assert zoo.same(F.linear(x, new["weight"], new.get("bias")), patch.apply(x, module))
    assert all(torch.equal(params[name], p) for name, p in kept.items())
    assert not {p.data_ptr() for p in params.values()} & {p.data_ptr() for p in new.values()}
    assert patch.rank == (RANK if "rank" in names else 0)


def test_a_patch_without_fields_is_the_module():
    module, x = nn.Linear(INP, OUT), torch.randn(4, INP)
    assert torch.equal(Patch().apply(x, module), module(x))


@torch.no_grad()
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("weight", [False, True])
def test_embedding_apply_equals_fold(gain, weight):
    module, ids = nn.Embedding(OUT, INP), torch.arange(OUT)
    patch = EmbeddingPatch(
        torch.randn(RANK, OUT),
        torch.randn(INP, RANK),
        torch.randn(INP) if gain else None,
        torch.randn(OUT, INP) if weight else None,
        scale=3.0,
    )
    new = patch.fold({"weight": module.weight})
    assert zoo.same(3.0 * F.embedding(ids, new["weight"]), patch.apply(ids, module))


@torch.no_grad()
def test_param_patch_replaces_what_it_names_whatever_stands_in_for_forward():
    module, x = nn.LayerNorm(INP), torch.randn(4, INP)
    patch = ParamPatch({"bias": torch.randn(INP)})
    want = F.layer_norm(x, (INP,), module.weight, patch.params["bias"])
    module.forward = lambda x: pytest.fail("a site's forward was called")
    assert torch.equal(patch.apply(x, module), want)
    new = patch.fold(dict(module.named_parameters()))
    assert torch.equal(new["bias"], patch.params["bias"])
    assert torch.equal(new["weight"], module.weight)
    assert not module.bias.any()


def test_moving_an_adapter_keeps_its_parts_and_halves_its_bytes():
    pairs = ((torch.randn(2, 1, 4), torch.randn(2, 1, 4)),)
    patches = {
        "a": Patch(A=torch.randn(RANK, INP), B=torch.randn(OUT, RANK)),
        "b": EmbeddingPatch(torch.randn(2, OUT), torch.randn(INP, 2), scale=5.656854),
        "c": ParamPatch({"weight": torch.randn(INP)}),
    }
    adapter = Adapter(SPEC, patches, pairs, None, (torch.randn(2, 4),))
    moved = adapter.to(torch.device("cpu"), torch.bfloat16)
    assert {t.dtype for t in moved.tensors()} == {torch.bfloat16}
    assert moved.bytes * 2 == adapter.bytes
    assert moved.rank == adapter.rank == RANK
    assert moved.patches["b"].scale == 5.65625  # what a scaled embedding in bfloat16 multiplies by


def test_what_stands_before_the_prompt_is_not_folded():
    assert Adapter(SPEC, {"a": Patch()}).foldable
    for adapter in (Adapter(SPEC, embeds=torch.zeros(1, 2)), Adapter(SPEC, prefix=()), Adapter(SPEC, tasks=SUBSETS)):
        assert not adapter.foldable
