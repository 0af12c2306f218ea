"""Gated methods on a tree of modules: what they refuse, what they hold, and whatever attention the base has."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import pytest
import torch

import beyond
import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Member, Request
from adapter_server.engine.engine import Engine
from adapter_server.engine.tree import Decode, Trees
from adapter_server.errors import AdapterRefused, InvalidRequest, NotMergeable
from adapter_server.families import find, lane_of, unipelt, virtual_tokens
from adapter_server.families.facts import ModelBase
from adapter_server.registry.store import Store

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = (5, 9, 13, 40, 7)


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """(registry, {case: what the library answers}) over Mistral, whose windows are 8 tokens."""
    root = tmp_path_factory.mktemp("gated")
    return root, beyond.golden(GOLDEN / "adapterhub-mistral-gated.safetensors", root)


@pytest.fixture
def engine(goldens):
    made = beyond.engine("mistral", goldens[0])
    yield made
    made.close()


def refusal(engine, request):
    [answer] = rig.run(engine, [request])
    return answer.end.error


def test_it_runs_in_the_peft_lane_and_its_prefix_takes_places(goldens):
    for case, places in {"unipelt": 3, "gated_prefix": 3, "gated_lora": 0}.items():
        spec, _ = zoo.read(goldens[0] / case)
        assert spec.family == unipelt.NAME
        assert lane_of(spec, "packed") == "peft"
        assert virtual_tokens(spec) == places


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_bases_own_attention_does_not_matter(goldens, attention):
    root, wants = goldens
    model = zoo.tiny_base("mistral")
    model.config._attn_implementation = attention
    engine = Engine(model, EngineConfig(kv_bytes=16 << 20), Store(root, settle_s=0))
    digest = engine.model.digest()
    asked = [beyond.ask(engine, {case: 1.0}, PROMPT, max_new_tokens=6) for case in wants]
    for answer, want in zip(rig.run(engine, asked), wants.values(), strict=True):
        beyond.hold(answer, want)
    assert engine.model.digest() == digest
    assert model.config._attn_implementation != unipelt.ATTENTION
    engine.close()


def test_a_gate_that_looked_at_the_new_token_alone_would_answer_otherwise(goldens, monkeypatch):
    """So a cache is not merely slow to leave out: it is wrong."""
    root, wants = goldens
    spec, tensors = zoo.read(root / "gated_lora")
    model = zoo.tiny_base("mistral")
    tree = Trees(model).place(find(spec.family).load(spec, tensors, ModelBase(model))).tree
    monkeypatch.setattr(type(tree), "caches", property(lambda self: True))
    with torch.inference_mode():
        decode = Decode(tree, PROMPT, None)
        rows = [decode.logits(PROMPT), decode.logits([int(wants["gated_lora"][0][0])])]
    far = (torch.cat(rows).log_softmax(-1) - wants["gated_lora"][1][:2]).abs().amax(-1)
    assert far[0] < beyond.TOLERANCE < 0.01 < far[1]


def test_scale_merge_and_sum_are_refused(engine):
    assert isinstance(refusal(engine, beyond.ask(engine, {"unipelt": 0.5}, PROMPT)), InvalidRequest)
    assert isinstance(refusal(engine, beyond.ask(engine, {"unipelt": 1.0}, PROMPT, mode="merged")), NotMergeable)
    members = tuple(Member(engine.pool.store.resolve(name)) for name in ("unipelt", "gated_lora"))
    request = Request("c", PROMPT, members=members, mode="unmerged", arrived=time.monotonic())
    assert "no sum" in refusal(engine, request).message


def test_its_tensors_are_counted_and_let_go_at_once(goldens):
    spec, tensors = zoo.read(goldens[0] / "unipelt")
    model = zoo.tiny_base("mistral")
    tree = Trees(model).place(find(spec.family).load(spec, tensors, ModelBase(model))).tree
    held = [weakref.ref(buffer) for name, buffer in tree.model.named_buffers() if name.startswith("adapter_")]
    assert len(held) >= 2 * (2 * 4 + 4 + 2 + 4)  # of two layers: two low ranks, a prefix, a bottleneck, each gated
    assert tree.bytes >= sum(ref().nbytes for ref in held)
    gc.disable()
    try:
        tree.release()
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_a_gate_too_few_or_too_many_is_refused(goldens):
    spec, own = zoo.read(goldens[0] / "unipelt")
    base = ModelBase(zoo.tiny_base("mistral"))
    gate = next(name for name in own if "prefix_gates" in name)
    assert find(spec.family).expected(spec.config, base.shapes, frozenset(own)).keys() == own.keys()
    with pytest.raises(AdapterRefused, match=r"holds no tensor '.*prefix_gates"):
        find(spec.family).load(spec, {k: t for k, t in own.items() if k != gate}, base)
    with pytest.raises(AdapterRefused, match="belong to nothing in its config: other"):
        find(spec.family).load(spec, own | {"other": torch.zeros(1)}, base)
