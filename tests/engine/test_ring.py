"""The ring: whole copies whatever the sizes, no piece filled while it is under way, and adapters that say the same."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rig
from adapter_server.engine.engine import Engine
from adapter_server.engine.ring import ALIGNED, PIECES, Ring, ring

CPU = torch.device("cpu")
KINDS = ("lora", "dora", "ia3", "lora_bias_all", "lora_saved", "lora_embed")
PROMPT = (5, 9, 13, 40)


class Stream:
    """A device whose copies happen as late as they may: when somebody waits for a moment after them."""

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.done = 0

    def event(self) -> Moment:
        return Moment(self)

    def run(self, until: int | None = None) -> None:
        for window, piece in self.pending[self.done : until]:
            window.copy_(piece)
            self.done += 1


class Moment:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, 0

    def record(self, stream: torch.cuda.Stream | None) -> None:
        self.at = len(self.stream.pending)

    def synchronize(self) -> None:
        self.stream.run(self.at)


class Late(Ring):
    """`size` bytes of memory that is not locked, before such a device."""

    def __init__(self, size: int) -> None:
        self.stream = Stream()
        super().__init__(torch.zeros(size, dtype=torch.uint8), CPU, self.stream.event)

    def _depart(self, window: Tensor, piece: Tensor) -> None:
        self.stream.pending.append((window, piece))


def some(count: int, draw: torch.Generator) -> list[Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.int64)
    shapes = [(int(n), 1 + i % 3) for i, n in enumerate(torch.randint(0, 40, (count,), generator=draw))]
    made = [torch.randn(shape, generator=draw).mul(100).to(dtypes[i % 3]) for i, shape in enumerate(shapes)]
    return [t.T if i % 2 else t for i, t in enumerate(made)]


@pytest.mark.parametrize("size", [PIECES, PIECES * ALIGNED, PIECES * 100, 1 << 20])
def test_what_arrives_is_what_was_sent(size: int) -> None:
    """Larger and smaller than a piece, across pieces, empty, of any type, transposed; the ring goes round often."""
    late, draw = Late(size), torch.Generator().manual_seed(size)
    for count in (30, 0, 1, 7):
        sent = some(count, draw)
        arrived = late.send(sent)
        late.stream.run()
        assert all(torch.equal(a, s) and a.dtype == s.dtype for a, s in zip(arrived, sent, strict=True))
        assert len({a.untyped_storage().data_ptr() for a in arrived if a.numel()}) <= 1
        assert not any(a.storage_offset() * a.itemsize % ALIGNED for a in arrived)


def test_a_piece_is_waited_for_and_no_other() -> None:
    late = Late(PIECES * ALIGNED)
    late.send([torch.zeros(PIECES * ALIGNED, dtype=torch.uint8)])
    assert (len(late.stream.pending), late.stream.done) == (PIECES, 0)
    late.send([torch.zeros(2 * ALIGNED, dtype=torch.uint8)])
    assert late.stream.done == 2


def test_two_threads_do_not_mix() -> None:
    late, found = Late(PIECES * ALIGNED), dict[int, list[Tensor]]()

    def send(seed: int) -> None:
        found[seed] = late.send([torch.full((50 * ALIGNED,), seed, dtype=torch.uint8)])

    threads = [threading.Thread(target=send, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    late.stream.run()
    assert all(bool((t == seed).all()) for seed, (t,) in found.items())


def test_where_no_device_gains_there_is_none() -> None:
    assert ring(1 << 20, CPU) is None
    assert ring(0, torch.device("cuda")) is None


def said(prepared: Callable[[Engine], None]) -> list[tuple[list[int], list[dict[int, float]]]]:
    engine = rig.engine("llama", KINDS)
    prepared(engine)
    try:
        answers = [rig.run(engine, [rig.ask(engine, name, PROMPT)])[0] for name in KINDS]
        return [(answer.ids, answer.logprobs) for answer in answers]
    finally:
        engine.close()


def test_adapters_that_came_through_it_are_the_same() -> None:
    def round_about(engine: Engine) -> None:
        engine.model.ring = Ring(torch.zeros(PIECES * 100, dtype=torch.uint8), CPU, lambda: Moment(Stream()))

    assert said(round_about) == said(lambda engine: None)
