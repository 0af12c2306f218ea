"""All layers in one call: bit by bit what they are one by one, and PEFT alone; who is not taken runs one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rig
import zoo
from adapter_server.engine import native
from adapter_server.engine.engine import Engine
from adapter_server.engine.layers import Layers
from adapter_server.engine.model import Model
from adapter_server.engine.routing import Routing, Step, running

NAMES = ("lora", "velora", "dora", "ia3", "prefix", "oft")
ARCHS = ("llama", "mistral", "phi3", "qwen2", "qwen3")  # biases, windows, norms of heads, one Linear for q, k, v
INSIDE = ("ln_tuning", "lora_embed")  # norms and embeddings of their own
LAYERS = 2  # of the tests' bases

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")
Call = tuple[int, int, int]  # the first half, the one behind the last, threads
WHOLE = (0, 2 * LAYERS, 1)
Asked = Sequence[tuple[str | None, str]]


def mixed(arch: str) -> Asked:
    """The base and all kinds that there are for it."""
    return [(None, "base"), *((name, "unmerged") for name in NAMES if arch in zoo.ADAPTERS[name].archs)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls into C."""
    made: list[Call] = []
    real = Layers.__init__

    def init(layers: Layers, *args: Any) -> None:
        real(layers, *args)
        run = layers.run_halves

        def noted(call: Any, first: int, last: int, threads: int) -> None:
            made.append((first, last, threads))
            run(call, first, last, threads)

        layers.run_halves = noted

    monkeypatch.setattr(Layers, "__init__", init)
    return made


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Routing, bool]]:
    """The routing of each step, and whether it was taken."""
    noted: list[tuple[Routing, bool]] = []
    real = Layers.links

    def links(layers: Layers, routing: Routing, cos: Tensor) -> Any:
        found = real(layers, routing, cos)
        noted.append((routing, found is not None))
        return found

    monkeypatch.setattr(Layers, "links", links)
    return noted


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def answers(engine: Engine, asked: Asked, stagger: int = 0) -> list[rig.Answer]:
    requests = [rig.ask(engine, name, rig.PROMPTS[i % 5], mode) for i, (name, mode) in enumerate(asked)]
    return rig.run(engine, requests, stagger)


def matrices(engine: Engine, asked: Asked, stagger: int = 0) -> list[Tensor]:
    return [answer.matrix() for answer in answers(engine, asked, stagger)]


def hold(arch: str, asked: Asked, given: Sequence[rig.Answer]) -> None:
    for i, ((name, _), answer) in enumerate(zip(asked, given, strict=True)):
        ids, logprobs = rig.peft_alone(arch, name, rig.PROMPTS[i % 5])
        assert tuple(answer.ids) == ids, name
        assert (answer.matrix() - logprobs).abs().max().item() < 1e-4, name


@pytest.mark.parametrize("arch", ARCHS)
def test_they_are_what_they_are_one_by_one(arch: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and single tokens of several kinds together, as rows come and go."""
    engine, asked = rig.engine(arch, NAMES), mixed(arch)
    assert engine.model.fused[-1] == "layers"
    answers(engine, asked)  # all are loaded
    calls.clear()
    given = answers(engine, asked, stagger=2)
    assert {WHOLE, (0, 1, 1), (1, 3, 1), (3, 4, 1)} == set(calls)
    hold(arch, asked, given)
    monkeypatch.setattr(Layers, "links", lambda *_: None)
    calls.clear()
    alone = matrices(engine, asked, stagger=2)
    assert not calls
    assert all(torch.equal(a.matrix(), b) for a, b in zip(given, alone, strict=True))
    engine.close()


@pytest.mark.parametrize("threads", [2, 5], indirect=True)
def test_threads_that_have_to_wait_for_cores_too(
    threads: int, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than cores: who waits long sleeps, and is woken."""
    monkeypatch.setattr(native, "SERIAL", 0)
    asked = [*mixed("llama"), *mixed("llama")]
    engine = rig.engine("llama", NAMES, threads=threads)
    answers(engine, asked)
    together = answers(engine, asked)
    hold("llama", asked, together)
    assert (0, 2 * LAYERS, threads) in calls
    monkeypatch.setattr(Layers, "links", lambda *_: None)
    alone = matrices(engine, asked)
    assert all(torch.equal(a.matrix(), b) for a, b in zip(together, alone, strict=True))
    engine.close()


def test_a_snapshot_for_every_row_is_read_in_place_of_the_base(calls: list[Call]) -> None:
    engine = rig.engine("llama", ("lora",))
    asked: Asked = [("lora", "merged")] * 3
    calls.clear()
    hold("llama", asked, answers(engine, asked))
    assert WHOLE in calls
    base: Asked = [(None, "base")]
    hold("llama", base, answers(engine, base))
    engine.close()


@pytest.mark.parametrize(("other", "mode"), [*((n, "unmerged") for n in INSIDE), ("velora", "merged")])
def test_adapters_that_do_more_run_layer_by_layer(other: str, mode: str, asked_for: list[tuple[Routing, bool]]) -> None:
    """Norms or embeddings of their own; a snapshot for some of the rows."""
    engine = rig.engine("llama", ("lora", other))
    asked: Asked = [("lora", "unmerged"), (other, mode)]
    answers(engine, asked)  # all are loaded
    hold("llama", asked, answers(engine, asked))
    mixed = [taken for routing, taken in asked_for if len(routing.segments) == 2]
    inside = [taken for routing, taken in asked_for if routing.inside]
    assert not any(mixed + inside)
    assert mixed + inside
    engine.close()


def test_a_base_without_panels_runs_layer_by_layer() -> None:
    assert Model(zoo.tiny_base("llama"), pack=False).fused[-1] == "layer"


def _other_angles(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"position_embeddings": tuple(-each for each in kwargs["position_embeddings"])}


def test_layers_of_several_angles_are_not_one() -> None:
    base = zoo.tiny_base("llama")
    base.model.layers[1].register_forward_pre_hook(_other_angles, with_kwargs=True)
    assert Model(base).fused[-1] == "layer"


def test_layers_of_several_shapes_are_not_one() -> None:
    base = zoo.tiny_base("llama")
    mlp = base.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight.data = getattr(mlp, name).weight.data[:40].clone()
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :40].clone()
    assert Model(base).fused[-1] == "layer"


def test_a_step_of_many_tokens_keeps_no_memory() -> None:
    engine = rig.engine("llama", ())
    layers = _layers(engine.model)
    many = [rig.ask(engine, None, range(2, 92), max_new_tokens=1, logprobs=0, id=str(i)) for i in range(4)]
    rig.run(engine, many)
    assert layers.memory.numel() < 4 * 90 * sum(layers.widths.values())
    engine.close()


def _layers(model: Model) -> Layers:
    found: Layers = model.module.model.layers[0].forward.__self__.together
    return found


def test_who_shares_no_angles_with_the_first_is_told() -> None:
    """Rather than left out without a word."""
    model = Model(zoo.tiny_base("llama"))
    second, x = model.module.model.layers[1].forward, torch.zeros(1, 2, 32)
    step = Step(Routing(2), Routing(2), ran=(torch.zeros(1), torch.zeros(1)))
    with running(step), pytest.raises(RuntimeError, match="different angles"):
        second(x, position_embeddings=(torch.zeros(1), torch.zeros(1)))
