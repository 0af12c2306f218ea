"""What PEFT itself runs, beside packed rows of one engine: each as PEFT alone, the base as it was."""

from __future__ import annotations

import functools
import json
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rig
import zoo
from adapter_server.config import EngineConfig
from adapter_server.core import Finished, Member, Request, Resident, Token
from adapter_server.engine.engine import Engine
from adapter_server.engine.model import load
from adapter_server.engine.tree import Sentry, Trees
from adapter_server.errors import AdapterRefused, AdapterServerError, InvalidRequest, NotMergeable
from adapter_server.registry.store import Store

ARCH = "llama"
EXPERTS = ("expert-a", "expert-b")
GENERAL = ("general",)
TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns while it loads, on a thread of ours


def base() -> nn.Module:
    model = zoo.tiny_base(ARCH)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of every grafted kind, the experts that some of them route among, and two plain adapters."""
    root = tmp_path_factory.mktemp("grafts")
    for seed, name in enumerate((*EXPERTS, *GENERAL, "lora")):
        zoo.save_adapter(base, zoo.ADAPTERS["lora"](base()), root / name, 10 + seed)
    shutil.copytree(rig.saved(ARCH, "prefix"), root / "prefix")
    for name, case in zoo.GRAFTS.items():
        zoo.save_adapter(base, case(base()), root / name, 3)
    experts, general = folders(root, EXPERTS), folders(root, GENERAL)
    with zoo.quiet():
        zoo.save_xlora(zoo.xlora(base(), experts), experts, root / "xlora")
        zoo.save_arrow(zoo.arrow(base(), experts, general), experts, general, root / "arrow")
    return root


def folders(root: Path, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: root / name for name in names}


GRAFTED = (*zoo.GRAFTS, "xlora", "arrow")


@pytest.fixture
def engine(root: Path) -> Iterator[Engine]:
    made = over(root)
    yield made
    made.close()


def over(root: Path, **settings: object) -> Engine:
    config = EngineConfig(**{"kv_bytes": 16 << 20, "max_rows": 64, **settings})  # type: ignore[arg-type]
    return Engine(base(), config, Store(root, settle_s=0))


def oracle(root: Path, name: str | None) -> nn.Module:
    """PEFT alone."""
    with zoo.quiet():
        if name == "xlora":
            return zoo.xlora(base(), folders(root, EXPERTS))
        if name == "arrow":
            return zoo.arrow(base(), folders(root, EXPERTS), folders(root, GENERAL))
    return base() if name is None else zoo.load_peft(base(), root / name)


@functools.cache
def alone(root: Path, name: str | None, prompt: tuple[int, ...]) -> tuple[list[int], Tensor]:
    with torch.inference_mode(), zoo.quiet():
        out = oracle(root, name).generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=rig.NEW, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    logits = torch.stack(out.logits, 1)[0].float()
    return logits.argmax(-1).tolist(), logits.log_softmax(-1)


def check(root: Path, name: str | None, prompt: tuple[int, ...], answer: rig.Answer) -> None:
    assert answer.end is not None
    assert answer.end.error is None, (name, answer.end.error.message, answer.end.error.__cause__)
    ids, logprobs = alone(root, name, prompt)
    assert answer.ids == ids, name
    assert (answer.matrix() - logprobs).abs().max().item() < TOLERANCE, name


def test_every_graft_beside_packed_rows_is_as_peft_alone(root: Path) -> None:
    engine = over(root, max_step_tokens=16)
    digest = engine.model.digest()
    names = [None, *GRAFTED, "lora", "prefix", *GRAFTED, "expert-a", None]
    asked = [(name, rig.PROMPTS[i % len(rig.PROMPTS)]) for i, name in enumerate(names)]
    answers = rig.run(engine, [rig.ask(engine, *each) for each in asked], stagger=1)
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check(root, name, prompt, answer)
    assert engine.model.digest() == digest
    engine.close()


def test_a_row_that_made_room_goes_on_where_it_was(root: Path) -> None:
    engine = over(root, kv_layout="pages", page_tokens=8, kv_bytes=256 * 40, max_model_len=32)
    rig.run(engine, [rig.ask(engine, name, (5, 6)) for name in ("lily", "shadow", "lora", "xlora")])
    asked = [(name, rig.PROMPTS[i % 3]) for i, name in enumerate(["lily", "shadow", None, "lily", "lora", "xlora"])]
    answers = rig.run(engine, [rig.ask(engine, *each) for each in asked])
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check(root, name, prompt, answer)
    assert engine.stats().preemptions
    engine.close()


def test_packed_rows_need_not_wait_for_the_lane(engine: Engine) -> None:
    """Twelve rows of the lane beside one packed row: it gets a token in every step, each of them in its turn."""
    lane = [rig.ask(engine, "lily", rig.PROMPTS[0], id=f"l{i}", logprobs=0) for i in range(12)]
    rig.run(engine, [rig.ask(engine, "lily", rig.PROMPTS[0])])
    for request in [*lane, rig.ask(engine, None, rig.PROMPTS[0], id="packed", logprobs=0)]:
        engine.submit(request)
    steps = [[e.request_id for e in engine.step() if isinstance(e, Token)] for _ in range(rig.NEW)]
    assert all("packed" in tokens for tokens in steps)
    assert all(len(tokens) == 5 for tokens in steps)
    assert {t for tokens in steps[:3] for t in tokens} == {"packed", *(r.id for r in lane)}
    engine.abandon("cancelled")


def test_a_merged_graft_answers_like_the_unmerged(root: Path, engine: Engine) -> None:
    digest = engine.model.digest()
    [answer] = rig.run(engine, [rig.ask(engine, "adamss", rig.PROMPTS[1], mode="merged")])
    check(root, "adamss", rig.PROMPTS[1], answer)
    assert engine.model.digest() == digest


@pytest.mark.parametrize("name", ["lily", "shadow", "xlora", "arrow"])
def test_what_depends_on_the_input_does_not_merge(engine: Engine, name: str) -> None:
    assert isinstance(error(engine, rig.ask(engine, name, (5, 6), mode="merged")), NotMergeable)
    rig.run(engine, [rig.ask(engine, name, (5, 6))])
    assert not resident(engine, name).foldable


def test_a_scale_is_exact_where_it_has_a_meaning_and_refused_elsewhere(root: Path, engine: Engine) -> None:
    rows = [("lily", 0.0), ("lily", 1.0), ("lily", 0.5)]
    answers = rig.run(engine, [rig.ask(engine, name, rig.PROMPTS[0], weight=w) for name, w in rows])
    assert torch.allclose(answers[0].matrix(), alone(root, None, rig.PROMPTS[0])[1], atol=TOLERANCE)
    check(root, "lily", rig.PROMPTS[0], answers[1])
    halved = oracle(root, "lily")
    for module in halved.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.5
    with torch.inference_mode():
        logits = halved(input_ids=torch.tensor([rig.PROMPTS[0]])).logits[0, -1]
    assert torch.allclose(answers[2].matrix()[0], logits.log_softmax(-1), atol=TOLERANCE)
    for name in ("shadow", "adamss", "arrow", "xlora"):
        assert isinstance(error(engine, rig.ask(engine, name, (5, 6), weight=0.5)), InvalidRequest)


def test_a_graft_is_in_no_composition(engine: Engine) -> None:
    members = tuple(Member(engine.pool.store.resolve(name)) for name in ("lily", "lora"))
    request = Request("c", (5, 6), members=members, mode="unmerged", arrived=time.monotonic())
    refused = error(engine, request)
    assert isinstance(refused, InvalidRequest)
    assert "no sum" in refused.message


def test_cancel_and_deadline_end_a_row_of_the_lane(engine: Engine) -> None:
    rig.run(engine, [rig.ask(engine, "shadow", rig.PROMPTS[0])])
    engine.submit(rig.ask(engine, "shadow", rig.PROMPTS[0], id="a", logprobs=0))
    engine.step()
    [event] = engine.cancel("a")
    assert isinstance(event, Finished)
    assert (event.reason, engine.busy) == ("cancelled", False)
    late = rig.ask(engine, "shadow", rig.PROMPTS[0], id="b", logprobs=0)
    engine.submit(Request(**{f: getattr(late, f) for f in Request.__slots__} | {"deadline": time.monotonic() + 0.05}))
    engine.step()
    time.sleep(0.06)
    [end] = [e for e in engine.step() if isinstance(e, Finished)]
    assert (end.reason, end.error) == ("timeout", None)
    assert not engine.busy


def test_sampling_and_stops_are_the_rows_own(engine: Engine) -> None:
    """The same seed gives the same tokens alone and among others; an end-of-text token ends a row."""
    hot = {"temperature": 1.0, "seed": 7, "logprobs": 0}
    [first] = rig.run(engine, [rig.ask(engine, "shadow", rig.PROMPTS[1], **hot)])
    again = rig.run(engine, [rig.ask(engine, n, rig.PROMPTS[1], **hot) for n in ("shadow", "lily", None)])
    assert first.ids == again[0].ids
    assert first.end is not None
    assert first.end.reason == "length"


def test_unloading_gives_the_memory_back(root: Path) -> None:
    engine = over(root)
    rig.run(engine, [rig.ask(engine, name, rig.PROMPTS[0]) for name in GRAFTED])
    held = sum(r.bytes for r in engine.stats().residents)
    assert held > 0
    trees = [h.placed.tree for h in engine.pool.holdings.values() if h.placed is not None and h.placed.tree]
    base = {p.data_ptr() for p in engine.model.module.parameters()}
    own = [p for tree in trees for p in tree.model.parameters() if p.data_ptr() not in base]
    watched = [weakref.ref(p) for p in own]
    assert sum(p.nbytes for p in own) >= held // 2
    del trees, own
    for name in (*GRAFTED, *EXPERTS, *GENERAL):
        engine.call("unload", engine.pool.store.resolve(name)).result()
    assert not [ref for ref in watched if ref() is not None]  # at once, without the garbage collector
    assert sum(r.bytes for r in engine.stats().residents) == 0
    engine.close()


# Hostile files


def spoiled(root: Path, tmp_path: Path, name: str, config: dict[str, object], **tensors: Tensor | None) -> Engine:
    """The registry with one adapter changed: config keys set, tensors replaced, added or (None) taken away."""
    shutil.copytree(root, tmp_path / "r")
    folder = tmp_path / "r" / name
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    kept = load_file(folder / "adapter_model.safetensors") | tensors
    save_file({k: v for k, v in kept.items() if v is not None}, folder / "adapter_model.safetensors")
    return over(tmp_path / "r")


LILY_A = "base_model.model.model.layers.0.mlp.down_proj.lily_A.weight"
SPOILS: dict[str, tuple[str, dict[str, object], dict[str, Tensor | None], str]] = {
    "a weight of the base": (
        "lily",
        {},
        {"base_model.model.model.norm.weight": torch.ones(32)},
        "names a weight of the base",
    ),
    "a surplus tensor": ("lily", {}, {LILY_A.replace("A", "C"): torch.ones(2)}, "takes no"),
    "a missing tensor": ("shadow", {}, {}, "no tensor for"),
    "another shape": ("lily", {}, {LILY_A: torch.ones(4, 40)}, "size mismatch"),
    "a rank far too large": ("lily", {"r": 1 << 20}, {}, "far more memory"),
    "a slow pattern": ("lily", {"target_modules": "(.+)+!"}, {}, "too long"),
    "a model elsewhere": ("shadow", {"shadow_model": "someone/else"}, {}, "looked up elsewhere"),
    "an unknown key": ("lily", {"custom_modules": {"a": "os.system"}}, {}, "is not a key"),
    "a number for a name": ("lily", {"target_modules": 7}, {}, "not what PEFT takes"),
    "a path for an expert": ("xlora", {"adapters": {"0": "/etc", "1": "../x"}}, {}, "never by a path"),
    "an expert that is none": ("xlora", {"adapters": {"0": "expert-a", "1": "lily"}}, {}, "only plain LoRA"),
    "an expert that is not there": ("xlora", {"adapters": {"0": "expert-a", "1": "nobody"}}, {}, "no adapter"),
    "another task": ("lily", {"task_type": "SEQ_CLS"}, {}, "task_type"),
}


@pytest.mark.parametrize("case", SPOILS)
def test_a_hostile_graft_is_refused_with_its_reason(root: Path, tmp_path: Path, case: str) -> None:
    name, config, tensors, reason = SPOILS[case]
    if case == "a missing tensor":
        first = next(iter(load_file(root / name / "adapter_model.safetensors")))
        tensors = {first: None}
    engine = spoiled(root, tmp_path, name, config, **tensors)
    digest = engine.model.digest()
    refused = error(engine, rig.ask(engine, name, (5, 6)))
    assert reason in refused.message
    [answer] = rig.run(engine, [rig.ask(engine, None, rig.PROMPTS[0])])
    check(root, None, rig.PROMPTS[0], answer)
    assert engine.model.digest() == digest
    engine.close()


def test_a_classifier_as_pefts_own_save_leaves_it_is_refused(root: Path, tmp_path: Path) -> None:
    """It drops the layers that are numbered like an expert, and would load them as noise."""
    key = "base_model.internal_xlora_classifier.layers.0.weight"
    engine = spoiled(root, tmp_path, "xlora", {}, **{key: None})
    assert "no tensor for" in error(engine, rig.ask(engine, "xlora", (5, 6))).message
    engine.close()


def test_a_tree_shares_the_bases_memory_and_may_not_write_it() -> None:
    model = zoo.tiny_base("gpt2")
    tree = Trees(model).fresh()
    mine, its = dict(model.named_parameters()), dict(tree.named_parameters())
    assert all(its[name].data_ptr() == p.data_ptr() and its[name] is not p for name, p in mine.items())
    assert tree.lm_head.weight is tree.transformer.wte.weight
    protected = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with pytest.raises(AdapterRefused, match="write to a weight"), Sentry(protected, 1e9), torch.no_grad():
        tree.lm_head.weight.data.add_(1)


def test_a_base_that_cannot_be_copied_keeps_its_other_lanes() -> None:
    model = zoo.tiny_base("llama")
    model.model.layers[0].lock = threading.Lock()
    trees = Trees(model)
    with pytest.raises(AdapterRefused, match="cannot be copied"):
        trees.fresh()


def test_a_graft_runs_over_four_bits(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    zoo.tiny_base(ARCH).save_pretrained(tmp_path)

    def four() -> nn.Module:
        model = load(tmp_path, "float32", torch.device("cpu"), "nf4")
        model.generation_config.eos_token_id = None
        return model

    engine = Engine(four(), EngineConfig(kv_bytes=16 << 20), Store(root, settle_s=0))
    digest = engine.model.digest()
    [answer] = rig.run(engine, [rig.ask(engine, "lily", rig.PROMPTS[0])])
    out = zoo.load_peft(four(), root / "lily").generate(
        input_ids=torch.tensor([rig.PROMPTS[0]]), max_new_tokens=rig.NEW, do_sample=False
    )
    assert answer.ids == out[0, len(rig.PROMPTS[0]) :].tolist()
    assert engine.model.digest() == digest
    engine.close()


def error(engine: Engine, request: Request) -> AdapterServerError:
    [answer] = rig.run(engine, [request])
    assert answer.end is not None
    assert answer.end.error is not None
    return answer.end.error


def resident(engine: Engine, name: str) -> Resident:
    return next(r for r in engine.stats().residents if r.name == name)
