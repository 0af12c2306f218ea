"""The loop is open: what is due is sent at its time, and times count from there."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from adapter_server.bench import play
from adapter_server.bench.client import Reply
from adapter_server.bench.drive import Ask, Checker
from adapter_server.bench.play import Arrival, Deed, by_clock, check, figures, learn, quantile
from adapter_server.core import Finished, Token
from adapter_server.errors import RequestFailed

SLOW_S = 0.3


class SlowWorker:
    """Answers one request after another, each in SLOW_S, and notes when it was asked."""

    def __init__(self, engine: object, deliver: Any) -> None:
        self.deliver, self.asked, self.turn = deliver, list[float](), threading.Lock()

    def submit(self, request: Any) -> None:
        self.asked.append(time.perf_counter())
        threading.Thread(target=self._answer, args=[request], daemon=True).start()

    def _answer(self, request: Any) -> None:
        with self.turn:
            time.sleep(SLOW_S)
            reason = "error" if request.prompt == (0,) else "length"
            if reason == "length":
                self.deliver([Token(request.id, 0, 5)])
            self.deliver([Finished(request.id, reason, RequestFailed("so it was") if reason == "error" else None)])


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> play.Live:
    monkeypatch.setattr(play, "Worker", SlowWorker)
    monkeypatch.setattr(play, "Publisher", lambda store: None)
    return play.Live(SimpleNamespace(pool=SimpleNamespace(store=None)))  # type: ignore[arg-type]


def test_a_slow_server_does_not_slow_the_client_down(stage: play.Live) -> None:
    arrivals = [Arrival(0.02 * i, Ask((1 + i,)), 1) for i in range(3)]
    replies = stage.play(arrivals)
    sent = stage.worker.asked  # type: ignore[attr-defined]
    assert sent[-1] - sent[0] < SLOW_S
    assert [reply.due_s for reply in replies] == [0.0, 0.02, 0.04]
    assert replies[2].ttft_s > 2.5 * SLOW_S  # it waited for two others, and that counts


def test_a_request_that_fails_ends_the_play(stage: play.Live) -> None:
    with pytest.raises(RequestFailed, match="so it was"):
        stage.play([Arrival(0.0, Ask((0,)), 1)])


def test_deeds_are_done_in_time_and_in_order() -> None:
    done: list[str] = []
    start = time.perf_counter()
    by_clock([Deed(0.05, "late", lambda: done.append("late")), Deed(0.0, "soon", lambda: done.append("soon"))], start)
    assert done == ["soon", "late"]
    assert time.perf_counter() - start >= 0.05


class Echo:
    """A stage that answers with the prompt."""

    def play(self, arrivals: Sequence[Arrival], deeds: Sequence[Deed] = ()) -> list[Reply]:
        return [Reply(0.0, each.ask.prompt, [0.1] * len(each.ask.prompt)) for each in arrivals]


def test_a_torn_answer_is_wrong() -> None:
    asked = [Arrival(0.0, Ask((1, 2, 3)), 3), Arrival(0.0, Ask((4, 5, 6)), 3)]
    checker = Checker(lambda ask, known: 1.0)
    learn(Echo(), checker, asked)  # type: ignore[arg-type]
    check(checker, asked, [Reply(0, (1, 2, 3), ()), Reply(0, (4, 9, 9), ())])
    assert (checker.summary["alone"], checker.checked, checker.wrong) == (2, 2, 1)


def test_figures_count_from_when_a_request_was_due() -> None:
    found = figures([Reply(1.0, (1, 2, 3), (1.5, 1.6, 1.8)), Reply(0.0, (1, 2), (0.5, 2.0))])
    assert found["ttft_ms"] == pytest.approx(500)
    assert found["requests_per_s"] == pytest.approx(1)
    assert found["tokens_per_s"] == pytest.approx(2.5)
    assert found["itl_p99_ms"] == pytest.approx(1500)
    assert found["latency_ms"] == pytest.approx(1400)


def test_quantile() -> None:
    assert quantile(list(range(200)), 0.99) == 198
    assert quantile([3.0], 0.99) == 3
