"""The two layouts hold the same keys and values, and give back every place."""

from __future__ import annotations

import pytest
import torch

from adapter_server.engine.kv import Chunk, KvPool, PagePool, SlotPool, bytes_per_token
from adapter_server.engine.site import Prefix

LAYERS = {0: (2, 4, 4), 1: (2, 4, 6)}
CPU = torch.device("cpu")


def pools() -> list[KvPool]:
    return [SlotPool(LAYERS, 4, 32, torch.float32, CPU), PagePool(LAYERS, 32, 4, torch.float32, CPU)]


def prefix(n: int) -> Prefix:
    return Prefix(tuple((torch.randn(n, 2, dk), torch.randn(n, 2, dv)) for _, dk, dv in LAYERS.values()))


@pytest.mark.parametrize("pool", pools(), ids=["slots", "pages"])
def test_what_is_written_is_read(pool: KvPool) -> None:
    rows = [pool.start(None), pool.start(prefix(6))]
    past = [0, 6]
    written: list[list[torch.Tensor]] = [[], []]
    for count in (5, 1, 1):
        chunks, at = [], 0
        for i, lease in enumerate(rows):
            assert pool.grow(lease, past[i] + count)
            chunks.append(Chunk(lease, at, count, past[i]))
            at += count
        step = pool.plan(chunks, at)
        k, v = torch.randn(at, 2, 4), torch.randn(at, 2, 6)
        pool.write(1, step.places, k, v)
        for i, chunk in enumerate(chunks):
            written[i].append(k[chunk.start : chunk.start + count])
            past[i] += count
    step = pool.plan([Chunk(lease, i, 1, past[i] - 1) for i, lease in enumerate(rows)], 2)
    keys, _ = step.batch(1, step.decodes.take.shape[0])
    order = [0, 1] if step.decodes.put is None else step.decodes.put.tolist()
    for i, start in enumerate((0, 6)):
        assert torch.equal(keys[order[i], :, start : past[i]].transpose(0, 1), torch.cat(written[i]))


def test_slots_are_given_lowest_first_and_come_back() -> None:
    pool = pools()[0]
    leases = [pool.start(None) for _ in range(4)]
    assert [lease.pages for lease in leases] == [[0], [1], [2], [3]]
    assert pool.start(None) is None
    pool.release(leases[1])
    pool.release(leases[0])
    assert pool.start(None).pages == [0]
    assert not pool.grow(leases[2], 33)


def test_pages_are_all_or_nothing() -> None:
    pool = pools()[1]
    lease = pool.start(None)
    assert not pool.grow(lease, 32 * 4 + 1)
    assert pool.used == 0
    assert pool.grow(lease, 32 * 4)
    assert pool.start(None) is None
    pool.release(lease)
    assert pool.used == 0


def test_a_forgotten_prefix_leaves_with_its_last_reader() -> None:
    pool, common = pools()[1], prefix(9)
    first, second = pool.start(common), pool.start(common)
    assert pool.used == 4 * (2 + 1 + 1)  # two full pages shared, a partial one each
    pool.forget(common)
    pool.release(first)
    assert pool.used == 4 * 3
    pool.release(second)
    assert pool.used == 0


def test_idle_prefixes_make_room() -> None:
    pool, common = pools()[1], prefix(8)
    pool.release(pool.start(common))
    assert pool.used == 8
    assert pool.reclaim()
    assert pool.used == 0
    assert not pool.reclaim()


@pytest.mark.parametrize("pool", pools(), ids=["slots", "pages"])
def test_a_scrubbed_row_leaves_zeros(pool: KvPool) -> None:
    lease = pool.start(None)
    pool.grow(lease, 3)
    step = pool.plan([Chunk(lease, 0, 3, 0)], 3)
    pool.write(0, step.places, torch.full((3, 2, 4), float("nan")), torch.ones(3, 2, 4))
    pool.release(lease, scrub=True)
    assert not pool.keys[0].any()
    assert not pool.values[0].any()


def test_bytes_per_token() -> None:
    assert bytes_per_token(LAYERS, torch.bfloat16) == 2 * (2 * 8 + 2 * 10)
