"""The engine's thread: what goes in comes out once, in order; it drains, it sleeps, and it says so when it dies."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

import rig
from adapter_server.core import Event, Finished, Stats, Token
from adapter_server.engine.worker import Pace, Worker
from adapter_server.errors import NotMergeable, PromptTooLong, QueueFull, RequestFailed, Unavailable


class Mail:
    """Everything that the worker delivered, by request."""

    def __init__(self) -> None:
        self.batches: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.answers: dict[str, rig.Answer] = {}

    def wait(self, ids: list[str], timeout_s: float = 30) -> list[rig.Answer]:
        ends = time.monotonic() + timeout_s
        while not all(self._ended(id) for id in ids):
            for event in self.batches.get(timeout=max(0.01, ends - time.monotonic())):
                if isinstance(event, Token | Finished):
                    self.answers.setdefault(event.request_id, rig.Answer())
                    rig.collect([event], self.answers)
        return [self.answers[id] for id in ids]

    def _ended(self, id: str) -> bool:
        return id in self.answers and self.answers[id].end is not None


@pytest.fixture
def mail() -> Mail:
    return Mail()


@pytest.fixture
def worker(mail: Mail) -> Iterator[Worker]:
    made = Worker(rig.engine("llama", max_waiting=6, max_rows=4), mail.batches.put)
    made.start()
    yield made
    made.stop()
    assert not made.alive


def test_the_collector_leaves_alone_what_was_there_when_it_began(mail: Mail) -> None:
    made = Worker(rig.engine("llama"), mail.batches.put)
    assert gc.get_freeze_count() == 0
    made.start()
    made.submit(rig.ask(made.engine, None, rig.PROMPTS[0], id="one", max_new_tokens=1))
    mail.wait(["one"])
    assert gc.get_freeze_count() > 10_000
    made.stop()
    assert gc.get_freeze_count() == 0


def test_many_threads_submit_and_each_gets_its_own(worker: Worker, mail: Mail) -> None:
    worker.engine.config = replace(worker.engine.config, max_waiting=100)
    cases = [(name, rig.PROMPTS[i % 5]) for i, name in enumerate([None, "lora", "ia3", "prefix", "dora", "prompt"] * 4)]
    requests = [rig.ask(worker.engine, name, prompt, id=f"r{i}") for i, (name, prompt) in enumerate(cases)]
    threads = [threading.Thread(target=worker.submit, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for (name, prompt), answer in zip(cases, mail.wait([r.id for r in requests]), strict=True):
        assert tuple(answer.ids) == rig.peft_alone("llama", name, prompt)[0]
    for thread in threads:
        thread.join()


def test_a_full_queue_is_refused_at_once_with_a_time_to_retry(worker: Worker, mail: Mail) -> None:
    requests = iter([rig.ask(worker.engine, None, (5,), id=f"q{i}", max_new_tokens=250) for i in range(40)])
    with pytest.raises(QueueFull) as refused:
        any(worker.submit(request) for request in requests)  # submit answers None: goes on until it raises
    assert 1 <= refused.value.retry_after <= 60
    accepted = [f"q{i}" for i in range(39 - len(list(requests)))]
    for id in accepted:
        worker.cancel(id)
    assert {a.end.reason for a in mail.wait(accepted)} <= {"cancelled", "length"}
    worker.submit(rig.ask(worker.engine, None, (5,), id="after"))
    assert mail.wait(["after"])[0].end.reason == "length"


def test_waiting_tokens_have_a_bound_and_an_empty_queue_takes_any_request(worker: Worker, mail: Mail) -> None:
    worker.engine.config = replace(worker.engine.config, max_waiting=1000, max_waiting_tokens=300)
    requests = iter([rig.ask(worker.engine, None, (5,), id=f"t{i}", max_new_tokens=200) for i in range(20)])
    with pytest.raises(QueueFull, match="tokens"):
        any(worker.submit(request) for request in requests)
    accepted = [f"t{i}" for i in range(19 - len(list(requests)))]
    assert accepted
    for id in accepted:
        worker.cancel(id)
    mail.wait(accepted)
    worker.submit(rig.ask(worker.engine, None, (5,), id="large", max_new_tokens=250))
    assert mail.wait(["large"])[0].end.reason == "length"
    assert (worker._cost, worker._open) == (0, {})


def test_the_pace_is_of_the_time_in_which_something_was_done() -> None:
    pace = Pace(0.0)
    assert pace.seconds(1000) == 0
    pace.add(100, 1.0)
    pace.rest(1000.0)
    pace.add(100, 1001.0)
    assert pace.seconds(1000) == pytest.approx(10)
    for second in range(1002, 1302):
        pace.add(10, second)
    assert pace.seconds(1000) == pytest.approx(100, rel=0.02)


def test_a_refusal_of_the_engine_comes_as_the_end(worker: Worker, mail: Mail) -> None:
    worker.submit(rig.ask(worker.engine, None, (5,), id="long", max_new_tokens=1000))
    assert isinstance(mail.wait(["long"])[0].end.error, PromptTooLong)


def test_calls_answer_and_the_picture_shows_it(worker: Worker) -> None:
    spec = worker.engine.pool.store.resolve("lora")
    worker.call("load", spec).result(10)
    assert worker.stats().residents[0].state == "ready"
    worker.call("merge", spec).result(10)
    assert worker.stats().residents[0].snapshot_bytes > 0
    worker.call("unload", spec).result(10)
    assert worker.stats().residents == ()
    with pytest.raises(NotMergeable):
        worker.call("merge", worker.engine.pool.store.resolve("prefix")).result(10)


def test_a_picture_that_takes_long_is_taken_seldom(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of adapters, it would take half of the time."""
    made = Worker(rig.engine("llama"), mail.batches.put)
    plain, taken = made.engine.stats, []

    def slow() -> Stats:
        taken.append(time.sleep(0.1))
        return plain()

    monkeypatch.setattr(made.engine, "stats", slow)
    for _ in range(4):
        made._turn()
    assert len(taken) == 1
    made._again = 0.0
    made._turn()
    assert len(taken) == 2
    made.engine.close()


def test_stopping_lets_rows_finish_and_takes_nothing_new(worker: Worker, mail: Mail) -> None:
    worker.submit(rig.ask(worker.engine, "lora", (5, 6), id="last", max_new_tokens=30))
    worker.stop(drain_s=20)
    assert mail.wait(["last"])[0].end.reason == "length"
    with pytest.raises(Unavailable):
        worker.submit(rig.ask(worker.engine, None, (5,)))


def test_stopping_without_patience_cancels(worker: Worker, mail: Mail) -> None:
    worker.submit(rig.ask(worker.engine, None, (5, 6), id="cut", max_new_tokens=250))
    worker.stop()
    assert mail.wait(["cut"])[0].end.reason == "cancelled"


def test_an_idle_worker_does_not_spin(worker: Worker) -> None:
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_loop_dies_everybody_is_told(worker: Worker, mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.submit(rig.ask(worker.engine, None, (5,), id="open", max_new_tokens=250))
    monkeypatch.setattr(worker.engine, "step", lambda: 1 / 0)
    assert isinstance(mail.wait(["open"])[0].end.error, Unavailable)
    with pytest.raises(Unavailable):
        worker.submit(rig.ask(worker.engine, None, (5,)))
    assert not worker.alive


def test_what_made_rows_fail_is_told_in_the_log_once(
    worker: Worker, mail: Mail, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(worker.engine.model, "forward", lambda *_: 1 / 0)
        for id in ("a", "b"):
            worker.submit(rig.ask(worker.engine, None, (5,), id=id))
        for answer in mail.wait(["a", "b"]):
            assert isinstance(answer.end.error, RequestFailed)
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()
    worker.submit(rig.ask(worker.engine, None, (5,), id="long", max_new_tokens=1000))
    mail.wait(["long"])
    assert caplog.text == ""
