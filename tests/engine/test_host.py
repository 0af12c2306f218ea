"""The host tier: a budget of bytes, the least recently used first, pins, and what is shared counted once."""

from __future__ import annotations

import torch

from adapter_server.core import Spec
from adapter_server.engine.host import Host, held_bytes
from adapter_server.families.base import Adapter, Patch

SIZE = 64


def adapter(name: str, size: int = SIZE) -> Adapter:
    return Adapter(Spec(name, "1", "", "LORA", {}, 0), {"m": Patch(bias=torch.zeros(size // 4))})


def names(host: Host) -> list[str]:
    return [name for name, _ in host.held()]


def test_the_least_recently_used_goes_first() -> None:
    host = Host(3 * SIZE)
    for name in "abc":
        host.put(adapter(name))
    host.touch(("a", "1"))
    host.put(adapter("d"))
    assert names(host) == ["c", "a", "d"]
    assert host.used == 3 * SIZE
    assert host.get(("b", "1")) is None
    assert host.bytes_of(("b", "1")) == 0


def test_what_is_pinned_stays_and_what_cannot_fit_pushes_nobody_out() -> None:
    host = Host(2 * SIZE)
    host.pinned.add(("a", "1"))
    for name in "ab":
        host.put(adapter(name))
    host.put(adapter("huge", 2 * SIZE))
    assert names(host) == ["a", "b"]
    host.put(adapter("c"))
    assert names(host) == ["a", "c"]
    host.drop(("a", "1"))
    host.put(adapter("huge", 2 * SIZE))
    assert names(host) == ["huge"]


def test_the_same_again_counts_once() -> None:
    host = Host(2 * SIZE)
    host.put(adapter("a"))
    host.put(adapter("a"))
    assert host.used == SIZE
    shared = torch.zeros(SIZE)
    twice = Adapter(adapter("s").spec, {"m": Patch(bias=shared[:8]), "n": Patch(bias=shared[8:])})
    assert held_bytes(twice) == shared.nbytes
