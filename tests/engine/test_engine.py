"""The engine's life with requests: joining, ending, failing alone, and adapters that come and go under traffic."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rig
import zoo
from adapter_server.core import Finished, Loaded, Member, Request
from adapter_server.engine.engine import Engine
from adapter_server.errors import (
    AdapterRefused,
    AdapterUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    NotMergeable,
    PromptTooLong,
    RequestFailed,
    VersionGone,
)
from adapter_server.registry.store import Store


@pytest.fixture
def engine() -> Engine:
    made = rig.engine("llama")
    yield made
    made.close()


def settle(engine: Engine, future) -> None:
    """Turn the engine until an operator's word is done."""
    ends = time.monotonic() + 20
    while not future.done():
        engine.step()
        assert time.monotonic() < ends
    future.result()


def check(name: str | None, prompt: tuple[int, ...], answer: rig.Answer, new: int = rig.NEW) -> None:
    assert answer.end is not None
    assert answer.end.error is None, answer.end.error
    ids, logprobs = rig.peft_alone("llama", name, prompt, new)
    assert tuple(answer.ids) == ids
    assert (answer.matrix() - logprobs).abs().max() < 1e-4


def test_whichever_thread_steps_is_on_the_bases_device(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device is a thread's own, and 0 in a new one."""
    turned: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: turned.append((threading.get_ident(), device)))
    monkeypatch.setattr(engine.model, "device", torch.device("cuda:1"))
    thread = threading.Thread(target=engine.step)
    thread.start()
    thread.join()
    assert turned == [(thread.ident, torch.device("cuda:1"))]


def test_no_adapter_goes_while_a_step_that_nobody_waited_for_may_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader's stream takes the memory at once, and does not wait for the steps' stream."""
    waits: list[torch.device] = []
    monkeypatch.setattr("adapter_server.engine.engine._wait", waits.append)
    engine = rig.engine("llama", ("lora",), max_step_tokens=8)
    middle, whole = (rig.ask(engine, "lora", rig.PROMPTS[3], id=id) for id in ("middle", "whole"))
    for request, so_far in ((middle, "done"), (whole, "emitted")):
        engine.submit(request)
        while not any(getattr(row, so_far) for row in engine.scheduler.running):
            engine.step()
        engine.cancel(request.id)
        settle(engine, engine.call("unload", request.members[0].spec))
        assert len(waits) == 1
    engine.close()


@pytest.mark.parametrize("layout", ["slots", "pages"])
@pytest.mark.parametrize("budget", [3, 7, 200])
def test_chunked_prefill_changes_nothing(layout: str, budget: int) -> None:
    engine = rig.engine("mistral", kv_layout=layout, max_step_tokens=budget)
    asked = [("lora", rig.PROMPTS[3]), ("prefix", rig.PROMPTS[3]), (None, rig.PROMPTS[1]), ("prompt", rig.PROMPTS[2])]
    for (name, prompt), answer in zip(asked, rig.run(engine, [rig.ask(engine, n, p) for n, p in asked]), strict=True):
        ids, logprobs = rig.peft_alone("mistral", name, prompt)
        assert tuple(answer.ids) == ids
        assert (answer.matrix() - logprobs).abs().max() < 1e-4
    engine.close()


def test_pages_that_run_out_preempt_and_recompute() -> None:
    tokens = 40  # fewer than the rows need together
    per_token = 2 * 2 * (2 * 8) * 4  # layers, K and V, kv_heads x dim, bytes
    engine = rig.engine("llama", kv_layout="pages", page_tokens=4, kv_bytes=tokens * per_token, max_model_len=32)
    asked = [(name, rig.PROMPTS[i % 3]) for i, name in enumerate([None, "lora", "dora", "prefix", "prefix", "ia3"])]
    answers = rig.run(engine, [rig.ask(engine, n, p, max_new_tokens=12) for n, p in asked])
    for (name, prompt), answer in zip(asked, answers, strict=True):
        check(name, prompt, answer, 12)
    assert engine.scheduler.preemptions > 0
    engine.kv.reclaim()
    assert engine.kv.used == 0
    engine.close()


def test_prefix_pages_are_shared_by_its_rows() -> None:
    engine = rig.engine("llama", kv_layout="pages", page_tokens=2)
    first, second = rig.ask(engine, "prefix", (5, 6)), rig.ask(engine, "prefix", (7, 8))
    engine.submit(first)
    engine.submit(second)
    while len(engine.scheduler.running) < 2:
        engine.step()
    leases = [row.lease.pages for row in engine.scheduler.running]
    assert leases[0][:2] == leases[1][:2]  # five prefix tokens are two full pages of two
    assert leases[0][2] != leases[1][2]  # the partial third is copied
    engine.close()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, -1.5])
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "lora_saved", "lora_embed"])
def test_scale_moves_between_base_and_adapter(engine: Engine, name: str, weight: float) -> None:
    """scale w is y = y₀ + w (y₁ − y₀) at every module: held against a dense model built that way from PEFT's own."""
    prompt = rig.PROMPTS[1]
    answer = rig.run(engine, [rig.ask(engine, name, prompt, weight=weight)])[0]
    want = composed([(name, weight)], prompt, len(answer.ids), answer.ids)
    assert (answer.matrix() - want).abs().max() < 1e-4


def test_composition_is_exact_and_mixes_with_everything(engine: Engine) -> None:
    mixes = [
        [("lora", 0.7), ("ia3", 0.5)],
        [("dora", 1.0), ("ia3", 1.0), ("rslora", -0.4)],
        [("lora_saved", 0.5), ("lora_bias_all", 1.0)],
        [("lora_embed", 1.0), ("ia3_saved", 0.3)],
    ]
    requests = []
    for i, mix in enumerate(mixes):
        members = tuple(Member(engine.pool.store.resolve(name), weight) for name, weight in mix)
        requests.append(replace(rig.ask(engine, "lora", rig.PROMPTS[i], id=f"mix{i}"), members=members))
    others = [("lora", rig.PROMPTS[3]), (None, rig.PROMPTS[4]), ("prefix", rig.PROMPTS[0])]
    answers = rig.run(engine, requests + [rig.ask(engine, n, p) for n, p in others], stagger=1)
    for i, mix in enumerate(mixes):
        want = composed(mix, rig.PROMPTS[i], rig.NEW, answers[i].ids)
        assert (answers[i].matrix() - want).abs().max() < 1e-4, mix
    for (name, prompt), answer in zip(others, answers[len(mixes) :], strict=True):
        check(name, prompt, answer)


def composed(mix: list[tuple[str, float]], prompt: tuple[int, ...], new: int, ids: list[int]) -> torch.Tensor:
    """The dense truth: hooks on a plain base that add Σ wᵢ (yᵢ − y₀), each yᵢ from PEFT's own module."""
    base = zoo.tiny_base("llama")
    parts = [(rig.peft_model("llama", name).base_model.model, weight) for name, weight in mix]

    def hook(path: str):
        def add(module, args, output):
            return output + sum(w * (p.get_submodule(path)(*args) - output) for p, w in parts)

        return add

    for path, module in base.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(hook(path))
    with torch.inference_mode():
        logits = base(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1][:new].log_softmax(-1)


def test_a_cancelled_row_frees_its_place_at_once(engine: Engine) -> None:
    engine.submit(rig.ask(engine, "lora", (5, 6, 7), id="gone", max_new_tokens=50))
    while not engine.scheduler.running:
        engine.step()
    [end] = engine.cancel("gone")
    assert isinstance(end, Finished)
    assert end.reason == "cancelled"
    assert not engine.busy
    assert engine.kv.used == 0
    assert engine.cancel("gone") == []


def test_a_deadline_before_the_first_token_is_an_error_and_after_it_an_end(engine: Engine) -> None:
    late = replace(rig.ask(engine, None, (5,), id="late"), deadline=time.monotonic() - 1)
    engine.submit(late)
    [end] = engine.step()
    assert isinstance(end.error, DeadlineExceeded)
    soon = replace(rig.ask(engine, None, (5,), id="soon", max_new_tokens=240), deadline=time.monotonic() + 0.05)
    answer = rig.run(engine, [soon])[0]
    assert (answer.end.reason, answer.end.error) == ("timeout", None)
    assert 0 < len(answer.ids) < 240


def test_what_does_not_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptTooLong):
        engine.submit(rig.ask(engine, None, tuple(range(90)), max_new_tokens=200))
    with pytest.raises(InvalidRequest):
        engine.submit(rig.ask(engine, None, (zoo.VOCAB,)))
    exact = rig.ask(engine, "prefix", (5, 6), max_new_tokens=254)  # the prefix takes five more
    assert isinstance(rig.run(engine, [exact])[0].end.error, PromptTooLong)


def test_merging_a_prefix_is_refused_with_the_reason(engine: Engine) -> None:
    answer = rig.run(engine, [rig.ask(engine, "prefix", (5,), mode="merged")])[0]
    assert isinstance(answer.end.error, NotMergeable)
    with pytest.raises(NotMergeable):
        settle(engine, engine.call("merge", engine.pool.store.resolve("prompt")))


def test_a_failed_load_fails_those_who_waited_and_nobody_else(tmp_path: Path) -> None:
    zoo.save_adapter(lambda: zoo.tiny_base("llama"), zoo.ADAPTERS["lora"](zoo.tiny_base("llama")), tmp_path / "good")
    wide = zoo.tiny_base("gpt2")
    zoo.save_adapter(lambda: zoo.tiny_base("gpt2"), zoo.ADAPTERS["lora"](wide), tmp_path / "alien")
    engine = Engine(zoo.tiny_base("llama"), rig.engine("llama").config, Store(tmp_path, settle_s=0))
    bad, good, plain = rig.run(engine, [rig.ask(engine, n, (5, 6, 7)) for n in ("alien", "good", None)])
    assert isinstance(bad.end.error, AdapterRefused)
    assert good.end.error is None
    assert plain.end.error is None
    assert {r.name: r.state for r in engine.stats().residents} == {"alien": "failed", "good": "ready"}
    engine.close()


def test_one_row_with_broken_logits_fails_alone_and_leaves_nothing_behind(engine: Engine) -> None:
    rig.run(engine, [rig.ask(engine, "lora", (5, 6))])
    [holding] = engine.pool.holdings.values()
    patch = next(iter(holding.placed.groups.values()))
    patch.A.fill_(float("nan"))
    answers = rig.run(engine, [rig.ask(engine, n, (5, 6, 7)) for n in ("lora", "dora", None)])
    assert isinstance(answers[0].end.error, RequestFailed)
    check("dora", (5, 6, 7), answers[1])
    check(None, (5, 6, 7), answers[2])
    for pool in (*engine.kv.keys.values(), *engine.kv.values.values()):
        assert torch.isfinite(pool).all()


def test_a_step_that_raises_ends_its_rows_and_the_engine_goes_on(engine: Engine, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "forward", lambda *_: 1 / 0)
        answer = rig.run(engine, [rig.ask(engine, None, (5,))])[0]
    assert isinstance(answer.end.error, RequestFailed)
    assert isinstance(answer.end.error.__cause__, ZeroDivisionError)
    check(None, (5,), rig.run(engine, [rig.ask(engine, None, (5,))])[0])


def test_least_recently_used_goes_first_and_never_a_pinned_or_running_one() -> None:
    probe = rig.engine("llama")
    settle(probe, probe.call("load", probe.pool.store.resolve("lora")))
    size = probe.stats().residents[0].bytes
    probe.close()
    engine = rig.engine("llama", adapter_bytes=int(size * 2.5))
    specs = {n: engine.pool.store.resolve(n) for n in ("lora", "rslora", "velora")}
    settle(engine, engine.call("pin", specs["lora"]))
    settle(engine, engine.call("load", specs["lora"]))
    settle(engine, engine.call("load", specs["rslora"]))
    settle(engine, engine.call("load", specs["velora"]))
    assert {r.name for r in engine.stats().residents if r.state == "ready"} == {"lora", "velora"}
    engine.submit(rig.ask(engine, "velora", (5,), max_new_tokens=40, id="long"))
    while not engine.scheduler.running:
        engine.step()
    waiting = rig.ask(engine, "rslora", (5,))
    engine.submit(waiting)
    for _ in range(10):
        engine.step()
        time.sleep(0.005)
    assert {r.request.id for r in engine.scheduler.running} == {"long"}
    answers = {waiting.id: rig.Answer(), "long": rig.Answer()}
    while engine.busy:
        rig.collect(engine.step(), answers)
    check("rslora", (5,), answers[waiting.id])
    settle(engine, engine.call("pin", specs["rslora"]))
    with pytest.raises(AdapterUnavailable, match="pinned"):
        settle(engine, engine.call("load", specs["velora"]))
    engine.close()


def test_a_pin_is_done_once_it_is_in_memory_and_fails_with_the_load() -> None:
    engine = rig.engine("llama")
    done = engine.call("pin", engine.pool.store.resolve("lora"))
    assert not done.done()
    settle(engine, done)
    assert [(r.state, r.pinned) for r in engine.stats().residents] == [("ready", True)]
    unknown = engine.call("pin", replace(engine.pool.store.resolve("dora"), version="0" * 12))
    with pytest.raises(VersionGone):
        settle(engine, unknown)
    assert [r.pinned for r in engine.stats().residents if r.name == "dora"] == [False]
    engine.close()


def test_unload_waits_for_running_rows_and_gives_the_bytes_back(engine: Engine) -> None:
    spec = engine.pool.store.resolve("lora")
    engine.submit(rig.ask(engine, "lora", (5, 6, 7), id="r"))
    while not engine.scheduler.running:
        engine.step()
    done = engine.call("unload", spec)
    assert not done.done()
    answers = {"r": rig.Answer()}
    while engine.busy:
        rig.collect(engine.step(), answers)
    assert done.done()
    assert engine.pool.used == 0
    assert len(answers["r"].ids) >= 1
    assert answers["r"].end.error is None


def test_merge_and_unmerge_count_bytes(engine: Engine) -> None:
    spec = engine.pool.store.resolve("lora")
    settle(engine, engine.call("merge", spec))
    assert engine.stats().residents[0].snapshot_bytes > 0
    settle(engine, engine.call("unmerge", spec))
    assert engine.pool.used == 0


def test_a_row_finishes_on_the_version_it_was_admitted_with(tmp_path: Path) -> None:
    def save(seed: int) -> None:
        base = zoo.tiny_base("llama")
        zoo.save_adapter(lambda: zoo.tiny_base("llama"), zoo.ADAPTERS["lora"](base), tmp_path / "a", seed=seed)

    save(1)
    store = Store(tmp_path, settle_s=0)
    engine = Engine(zoo.tiny_base("llama"), rig.engine("llama").config, store)
    whole = [rig.run(engine, [rig.ask(engine, "a", (5, 6, 7))])[0].ids]
    engine.submit(rig.ask(engine, "a", (5, 6, 7), id="old"))
    engine.step()
    save(2)
    store.refresh()
    answers = {"old": rig.Answer(), "new": rig.Answer()}
    engine.submit(rig.ask(engine, "a", (5, 6, 7), id="new"))
    while engine.busy:
        rig.collect(engine.step(), answers)
    whole.append(rig.run(engine, [rig.ask(engine, "a", (5, 6, 7))])[0].ids)
    assert whole[0] != whole[1]
    assert [*answers["old"].ids] == whole[0][-len(answers["old"].ids) :]
    assert answers["new"].ids == whole[1]
    engine.close()


def test_a_seed_is_the_rows_own(engine: Engine) -> None:
    def sampled(others: int) -> list[int]:
        request = rig.ask(engine, "lora", (5, 6, 7), temperature=1.3, seed=11, id=f"s{others}", max_new_tokens=20)
        crowd = [rig.ask(engine, None, (9 + i,), temperature=1.0, seed=i) for i in range(others)]
        return rig.run(engine, [*crowd[:2], request, *crowd[2:]])[-1 if others < 3 else 2].ids

    assert sampled(0) == sampled(5)


def test_an_end_token_ends_a_row_unless_told_otherwise(engine: Engine) -> None:
    ids, _ = rig.peft_alone("llama", None, (5, 6, 7))
    engine.info = replace(engine.info, eos=frozenset([ids[2]]))
    stopped = rig.run(engine, [rig.ask(engine, None, (5, 6, 7), ignore_eos=False)])[0]
    assert stopped.end.reason == "eos"
    assert stopped.ids == list(ids[: ids.index(ids[2]) + 1])
    going = rig.run(engine, [rig.ask(engine, None, (5, 6, 7), ignore_eos=True)])[0]
    assert going.end.reason == "length"


def test_loads_are_told(engine: Engine) -> None:
    engine.submit(rig.ask(engine, "dora", (5,)))
    events = []
    while engine.busy:
        events += engine.step()
    assert [e.name for e in events if isinstance(e, Loaded)] == ["dora"]
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.load_s > 0
    assert end.ttft_s <= end.total_s


def test_a_request_pickles() -> None:
    import pickle

    engine = rig.engine("llama")
    request = rig.ask(engine, "lora", (5, 6))
    copy: Request = pickle.loads(pickle.dumps(request))
    assert copy == request
    engine.close()


def test_a_flood_of_one_adapter_does_not_starve_another_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_server.engine.engine.PATIENCE_S", 0.05)
    probe = rig.engine("llama")
    settle(probe, probe.call("load", probe.pool.store.resolve("lora")))
    size = probe.stats().residents[0].bytes
    probe.close()
    engine = rig.engine("llama", adapter_bytes=int(size * 1.5), max_rows=4)
    answers = {"other": rig.Answer()}
    ends, count = time.monotonic() + 30, 0
    while not answers["other"].end and time.monotonic() < ends:
        while len(engine.scheduler.waiting) < 8:
            request = rig.ask(engine, "lora", (5, 6), id=f"f{count}", max_new_tokens=9 + count % 5)
            answers[request.id] = rig.Answer()
            engine.submit(request)
            count += 1
        if count == 20:
            engine.submit(rig.ask(engine, "rslora", (5, 6), id="other"))
            count += 1
        rig.collect(engine.step(), answers)
    assert answers["other"].end is not None, "the flood never let go of the room"
    check("rslora", (5, 6), answers["other"])
    engine.close()


def test_penalties_through_the_engine_are_transformers(engine: Engine) -> None:
    base = zoo.tiny_base("llama")
    base.generation_config.eos_token_id = None
    prompt = rig.PROMPTS[1]
    want = base.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=1.9)
    answer = rig.run(engine, [rig.ask(engine, None, prompt, max_new_tokens=20, repetition_penalty=1.9)])[0]
    assert answer.ids == want[0, len(prompt) :].tolist()
