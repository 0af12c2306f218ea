"""What goes in at one end of the line comes out at the other, whatever its size; an end that is gone is noticed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from adapter_server.core import Event, Finished, Folded, Loaded, Resident, Stats, Token
from adapter_server.engine.link import Done, Line, News
from adapter_server.engine.worker import Room
from adapter_server.errors import QueueFull

Ends = tuple[Line, Line]
EVENTS: list[Event] = [
    Token("a", 0, 5, -0.5, ((5, -0.5), (6, -1.5)), ((-0.25, ()),), "merged"),
    Token("b", 7, 9),
    Finished("a", "length", completion_tokens=1, ttft_s=0.5, mode="merged"),
    Loaded("shout", "1f2e3d4c5b6a", 0.1, warning="odd"),
    Folded("shout", "1f2e3d4c5b6a", 0.2, "no"),
]


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, other = (Line(end.detach()) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_events_keep_their_classes_and_fields(ends: Ends) -> None:
    stats = Stats(running=2, residents=(Resident("shout", "1f2e3d4c5b6a", "ready", "LORA"),), hits={"disk": 3})
    ends[0].send(News.of(EVENTS, stats, 4, Room(1, 20, 0.01)))
    news = ends[1].receive()
    assert news.events == EVENTS
    assert list(map(type, news.events)) == list(map(type, EVENTS))
    assert (news.stats, news.seen, news.room) == (stats, 4, Room(1, 20, 0.01))


def test_an_error_keeps_its_type_and_all_that_it_says(ends: Ends) -> None:
    ends[0].send(Done(3, QueueFull("full", param="prompt", retry_after=2.5)))
    number, error = ends[1].receive()
    assert number == 3
    assert isinstance(error, QueueFull)
    assert (error.message, error.param, error.retry_after) == ("full", "prompt", 2.5)


def test_messages_of_several_threads_are_not_torn(ends: Ends) -> None:
    messages = [(i, bytes([i]) * (1 << 18)) for i in range(8)]  # larger than a socket holds
    threads = [threading.Thread(target=ends[0].send, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    assert sorted(ends[1].receive() for _ in threads) == messages
    for thread in threads:
        thread.join()


def test_an_end_that_is_gone_is_noticed(ends: Ends) -> None:
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()
    with pytest.raises(OSError, match="pipe"):
        ends[1].send("anybody?")
