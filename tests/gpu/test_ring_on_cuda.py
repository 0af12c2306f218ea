"""The ring before a real device: copies are whole although pieces are filled again while others are under way."""

from __future__ import annotations

import torch

from adapter_server.engine.ring import PIECES, ring


def test_what_arrives_is_what_was_sent(device: torch.device) -> None:
    small, draw = ring(PIECES << 14, device), torch.Generator().manual_seed(0)
    assert small is not None
    stream = torch.cuda.Stream(device)
    for _ in range(20):
        sent = [torch.randn(int(n), 3, generator=draw) for n in torch.randint(1, 20_000, (12,), generator=draw)]
        with torch.cuda.stream(stream):
            arrived = small.send(sent)
        stream.synchronize()
        assert all(torch.equal(a.cpu(), s) for a, s in zip(arrived, sent, strict=True))
