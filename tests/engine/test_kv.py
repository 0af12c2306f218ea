"""The two layouts hold the same keys and values, and give back every place."""

from __future__ import annotations

import pytest
import torch

from adapter_server.core import Member, Request, Spec
from adapter_server.engine.blocks import BlockCache, Chain
from adapter_server.engine.kv import Chunk, KvPool, Lease, PagePool, SlotPool, bytes_per_token
from adapter_server.engine.placed import Prefix

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
    assert not pool.grow(pool.start(None), 1)
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


def caching() -> list[KvPool]:
    return [
        SlotPool(LAYERS, 2, 32, torch.float32, CPU, cells=6, block=4),
        PagePool(LAYERS, 16, 4, torch.float32, CPU, cached=True),
    ]


KEYS = [bytes([i]) for i in range(8)]


def fill(pool: KvPool, lease: Lease, count: int) -> torch.Tensor:
    """Random keys at the first positions of a row."""
    assert pool.grow(lease, count)
    k = torch.randn(count, 2, 4)
    pool.write(0, pool.plan([Chunk(lease, 0, count, 0)], count).places, k, torch.randn(count, 2, 4))
    return k


def read(pool: KvPool, lease: Lease, start: int, stop: int) -> torch.Tensor:
    return pool.keys[0][pool.indices(lease, start, stop)]


@pytest.mark.parametrize("pool", caching(), ids=["slots", "pages"])
def test_known_blocks_are_there_when_a_row_begins(pool: KvPool) -> None:
    first = pool.start(None)
    k = fill(pool, first, 13)
    pool.remember(first, 0, KEYS[:3], ["a"])
    pool.release(first)
    second = pool.start(None, [KEYS[0], KEYS[1], b"other", KEYS[2]])
    assert second.filled == 8
    assert torch.equal(read(pool, second, 0, 8), k[:8])


@pytest.mark.parametrize("pool", caching(), ids=["slots", "pages"])
def test_a_dropped_owner_leaves_nothing(pool: KvPool) -> None:
    for owner, keys in (("a", KEYS[:2]), ("b", KEYS[4:6])):
        lease = pool.start(None)
        fill(pool, lease, 8)
        pool.remember(lease, 0, keys, [owner])
        pool.release(lease)
    pool.drop("a")
    for keys, filled in ((KEYS[:2], 0), (KEYS[4:6], 8)):
        lease = pool.start(None, keys)
        assert lease.filled == filled
        pool.release(lease)
    pool.drop("b")
    assert pool.used == 0
    assert not list(pool.blocks.cells)


@pytest.mark.parametrize("pool", caching(), ids=["slots", "pages"])
def test_a_prefix_and_known_blocks_behind_it(pool: KvPool) -> None:
    common = prefix(6)
    lease = pool.start(common)
    assert lease.filled == 6
    assert pool.grow(lease, 12)
    places = pool.plan([Chunk(lease, 0, 6, 6)], 6).places
    pool.write(0, places, torch.randn(6, 2, 4), torch.randn(6, 2, 4))
    before = read(pool, lease, 0, 12).clone()
    pool.remember(lease, 1, KEYS[:2], [])
    pool.release(lease)
    again = pool.start(common, KEYS[:2])
    assert again.filled == 12
    assert torch.equal(read(pool, again, 0, 12), before)
    assert torch.equal(before[:6], common.layers[0][0])


def test_cached_pages_make_room_oldest_first_but_not_those_in_use() -> None:
    pool = PagePool(LAYERS, 4, 4, torch.float32, CPU, cached=True)
    for keys in (KEYS[:1], KEYS[1:2], KEYS[2:3]):
        lease = pool.start(None)
        fill(pool, lease, 4)
        pool.remember(lease, 0, keys, [])
        pool.release(lease)
    assert pool.used == 0
    reader = pool.start(None, KEYS[:1])
    assert not pool.grow(pool.start(None), 4 * 4)
    other = pool.start(None)
    assert pool.grow(other, 2 * 4)
    assert pool.used == 3 * 4
    assert KEYS[1] not in pool.blocks, "the oldest that nobody reads goes first"
    assert KEYS[0] in pool.blocks
    pool.release(reader)
    pool.release(other)
    assert pool.used == 0


def test_keys_tell_texts_and_adapters_apart() -> None:
    def keys(tokens: list[int], *members: Member, offset: int = 0, **rest: object) -> list[bytes]:
        request = Request("r", (1,), members=members, **rest)  # type: ignore[arg-type]
        return Chain.of(request, request.mode, 4, offset).upto(tokens, len(tokens))

    tokens = list(range(10))
    spec = Spec("a", "v", "", "LORA", {}, 0)
    others = [
        keys([9, *tokens[1:]]),
        keys(tokens, Member(spec)),
        keys(tokens, Member(spec, 0.5)),
        keys(tokens, Member(spec), mode="merged"),
        keys(tokens, Member(spec), task_id=1),
    ]
    assert len({each[1] for each in [keys(tokens), *others]}) == 6
    assert keys(tokens) == keys([*tokens, 11])[:2]
    assert [len(keys(tokens, offset=offset)) for offset in (0, 1, 2, 6)] == [2, 2, 3, 3]


def test_a_chain_grows_with_its_row() -> None:
    request, tokens = Request("r", (1,)), list(range(12))
    chain = Chain.of(request, request.mode, 4, 0)
    assert chain.upto(tokens, 7) == chain.upto(tokens, 12)[:1]
    assert chain.upto(tokens, 12) == Chain.of(request, request.mode, 4, 0).upto(tokens, 12)


def test_the_books_of_a_cache_balance() -> None:
    cache = BlockCache()
    cache.put(b"x", 0, ["a", "b"])
    cache.put(b"y", 1, ["a"])
    assert cache.find([b"x", b"z"]) == [0]
    assert cache.oldest() == 1, "x was used since"
    assert cache.drop("b") == [0]
    assert cache.drop("a") == []
