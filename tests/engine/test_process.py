"""The engine elsewhere: what goes over the line arrives whole and in order, and no end of either process is missed."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import fake_engine
import files
import live
from adapter_server.core import Event, Finished, Request, Sampling, Spec, Token
from adapter_server.engine import process
from adapter_server.engine.process import EngineProcess
from adapter_server.errors import (
    AdapterRefused,
    AdapterServerError,
    BaseNotSupported,
    InvalidRequest,
    NotMergeable,
    QueueFull,
    RequestFailed,
    Unavailable,
)
from adapter_server.registry.store import Blob, Store

TESTS = Path(fake_engine.__file__).parent
PATIENCE_S = 30.0
SPEC = Spec("shout", "1f2e3d4c5b6a", "/adapters/shout", "LORA", {"r": 8}, 3)


class Mail:
    """What was delivered, by request."""

    def __init__(self) -> None:
        self.batches: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self.tokens: dict[str, list[Token]] = {}
        self.ends: dict[str, Finished] = {}

    def end(self, id: str) -> Finished:
        until = time.monotonic() + PATIENCE_S
        while id not in self.ends:
            for event in self.batches.get(timeout=max(0.01, until - time.monotonic())):
                if isinstance(event, Token):
                    self.tokens.setdefault(event.request_id, []).append(event)
                elif isinstance(event, Finished):
                    assert event.request_id not in self.ends, "an end came twice"
                    self.ends[event.request_id] = event
        return self.ends[id]


def begun(tmp_path: Path, step_s: float = 0.0) -> tuple[EngineProcess, Mail]:
    mail = Mail()
    made = EngineProcess(partial(fake_engine.make, step_s, tmp_path), fake_engine.CONFIG, Store(tmp_path, settle_s=0))
    assert made.ready().info == fake_engine.INFO
    made.connect(mail.batches.put)
    made.start()
    return made, mail


@pytest.fixture(scope="module", autouse=True)
def _child_finds_the_tests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineProcess, Mail]]:
    level = logging.getLogger().level  # the child takes it over, whatever another test has made of it
    logging.getLogger().setLevel(logging.WARNING)
    made, mail = begun(tmp_path_factory.mktemp("adapters"), step_s=0.002)
    logging.getLogger().setLevel(level)
    yield made, mail
    made.stop()
    assert not made.alive
    assert made._process.returncode == 0


def ask(id: str, prompt: tuple[int, ...] = (1, 2, 3), new: int = 5) -> Request:
    return Request(id, prompt, Sampling(max_new_tokens=new))


def until(true: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    give_up = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_each_gets_its_own_whole_and_in_order(shared: tuple[EngineProcess, Mail]) -> None:
    made, mail = shared
    threads = [threading.Thread(target=made.submit, args=(ask(f"t{i}", (i, 9), 20),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for i, thread in enumerate(threads):
        thread.join()
        end = mail.end(f"t{i}")
        assert (end.reason, end.completion_tokens) == ("length", 20)
        assert [(token.index, token.id) for token in mail.tokens[f"t{i}"]] == [(n, (i, 9)[n % 2]) for n in range(20)]


def test_refusals_keep_their_type_and_field(
    shared: tuple[EngineProcess, Mail], caplog: pytest.LogCaptureFixture
) -> None:
    made, mail = shared
    made.submit(ask("bad", (fake_engine.BAD,)))
    error = mail.end("bad").error
    assert isinstance(error, InvalidRequest)
    assert (error.message, error.param) == ("this prompt is bad", "prompt")
    with caplog.at_level(logging.ERROR):
        made.submit(ask("broken", (fake_engine.BROKEN,)))
        assert isinstance(mail.end("broken").error, RequestFailed)
        until(lambda: "what really happened" in caplog.text)


def test_a_full_queue_is_refused_at_once_and_empties(shared: tuple[EngineProcess, Mail]) -> None:
    made, mail = shared
    requests = iter([ask(f"q{i}", new=150) for i in range(40)])
    with pytest.raises(QueueFull) as full:
        any(made.submit(request) for request in requests)  # type: ignore[func-returns-value]
    assert 1 <= (full.value.retry_after or 0) <= 60
    accepted = [f"q{i}" for i in range(39 - len(list(requests)))]
    assert len(accepted) >= fake_engine.CONFIG.max_waiting
    for id in accepted:
        made.cancel(id)
    assert {mail.end(id).reason for id in accepted} <= {"cancelled", "length"}
    until(lambda: made._room.requests == 0 and not made._unseen and not made._open)
    made.submit(ask("after"))
    assert mail.end("after").reason == "length"


def test_tokens_that_wait_have_a_bound(shared: tuple[EngineProcess, Mail]) -> None:
    made, mail = shared
    made.submit(ask("huge", new=2000))  # an empty queue takes any
    waiting = [ask(f"w{i}", new=500) for i in range(4)]
    with pytest.raises(QueueFull, match="tokens"):
        any(made.submit(request) for request in waiting)  # type: ignore[func-returns-value]
    for id in ("huge", "w0", "w1", "w2"):
        made.cancel(id)
    assert mail.end("huge").reason == "cancelled"
    until(lambda: not made._open)


def test_calls_end_and_what_they_changed_is_seen(
    shared: tuple[EngineProcess, Mail], caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = shared
    with caplog.at_level(logging.WARNING, "fake"):
        made.call("load", SPEC).result(PATIENCE_S)
    assert [resident.name for resident in made.stats().residents] == ["shout"]
    assert ("fake", logging.WARNING, "load of shout") in caplog.record_tuples
    with pytest.raises(NotMergeable, match="no merged form"):
        made.call("merge", SPEC).result(PATIENCE_S)


def test_what_a_reader_found_wrong_is_known_to_who_resolves(shared: tuple[EngineProcess, Mail]) -> None:
    made, _ = shared
    files.age(files.write(made.store.root / "shout", 0))
    spec = made.store.resolve("shout")
    made.call("unload", spec).result(PATIENCE_S)
    with pytest.raises(AdapterRefused, match="its files are broken"):
        made.store.resolve("shout")


def test_an_adapter_is_judged_there(shared: tuple[EngineProcess, Mail]) -> None:
    made, _ = shared
    made.judge(SPEC, Blob(bytearray(3), {}))
    with pytest.raises(AdapterRefused, match="2 bytes are no 3"):
        made.judge(SPEC, Blob(bytearray(2), {}))
    large = Spec("large", "0" * 12, "", "LORA", {}, 30 << 20)
    made.judge(large, Blob(bytearray(large.bytes), {}))


def test_a_killed_engine_ends_everything(tmp_path: Path) -> None:
    made, mail = begun(tmp_path, step_s=0.05)
    made.submit(ask("open", new=1000))
    mail.batches.get(timeout=PATIENCE_S)
    made._process.kill()
    assert isinstance(mail.end("open").error, Unavailable)
    assert not made.alive
    with pytest.raises(Unavailable):
        made.submit(ask("late"))
    with pytest.raises(Unavailable):
        made.call("load", SPEC).result(PATIENCE_S)
    with pytest.raises(Unavailable):
        made.judge(SPEC, Blob(bytearray(3), {}))
    made.stop()


def test_an_engine_whose_loop_dies_says_so_and_its_process_ends(tmp_path: Path) -> None:
    made, mail = begun(tmp_path)
    made.submit(ask("fatal", (fake_engine.DIES,)))
    error = mail.end("fatal").error
    assert isinstance(error, Unavailable)
    assert "MemoryError" in error.message
    assert made._process.wait(PATIENCE_S) == 1
    until(lambda: not made.alive)
    made.stop()


def test_stopping_lets_rows_finish_or_cancels_them(tmp_path: Path) -> None:
    made, mail = begun(tmp_path, step_s=0.02)
    made.submit(ask("last", new=20))
    made.stop(drain_s=20)
    assert mail.end("last").reason == "length"
    assert made._process.returncode == 0
    with pytest.raises(Unavailable):
        made.submit(ask("late"))


def test_an_engine_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LEAVE_S", 0.5)
    made, mail = begun(tmp_path)
    made.submit(ask("stuck", (fake_engine.HANGS,)))
    until(lambda: not made._unseen)
    made.stop()
    assert isinstance(mail.end("stuck").error, Unavailable)
    assert made._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("make", "error"), [(fake_engine.refused, BaseNotSupported), (fake_engine.gone, Unavailable)])
def test_an_engine_that_cannot_be_made_is_a_refusal(
    tmp_path: Path, make: Callable[[Path], object], error: type[AdapterServerError]
) -> None:
    made = EngineProcess(partial(make, tmp_path), fake_engine.CONFIG, Store(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(error, match="no base fits" if error is BaseNotSupported else "status 7"):
        made.ready()
    assert made._process.returncode is not None


PARENT = """
import sys, time
from functools import partial
from pathlib import Path
import fake_engine
from adapter_server.engine.process import EngineProcess
from adapter_server.registry.store import Store

if __name__ == "__main__":
    root = Path(sys.argv[1])
    made = EngineProcess(partial(fake_engine.make, 0.01, root), fake_engine.CONFIG, Store(root))
    print(made._process.pid, flush=True)
    made.ready()
    made.start()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_nothing_is_left_of_a_server_that_was_killed(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "server")])}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
    until(lambda: live.is_gone(child))
