"""Small stand-ins: a tokenizer of bytes, and a worker that echoes the prompt's ids."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from adapter_server.core import Event, Finished, Info, Mode, Request, Resident, Spec, Stats, Token
from adapter_server.errors import AdapterServerError, QueueFull, Unavailable

EOS = 256
INFO = Info(
    model="tiny-base",
    max_model_len=256,
    vocab=257,
    eos=frozenset({EOS}),
    device="cpu",
    dtype="float32",
    parameters=0,
    lane="paged",
    lane_why="a fake",
    has_encoder=False,
)


@dataclass
class FakeWorker:
    """Echoes: one token each `step_s`, then the end. `script` may answer a request with an error instead."""

    deliver: Callable[[list[Event]], None]
    step_s: float = 0.0
    limit: int = 64
    script: Callable[[Request], AdapterServerError | None] = lambda request: None
    refuse: AdapterServerError | None = None
    alive: bool = False
    rows: dict[str, str | None] = field(default_factory=dict)  # the reason to end with, once there is one
    requests: list[Request] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    residents: tuple[Resident, ...] = ()
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self.alive = True

    def stop(self, drain_s: float = 0.0) -> None:
        self.alive = False
        self.rows.update(dict.fromkeys(self.rows, "cancelled"))
        for thread in self.threads:
            thread.join()

    def submit(self, request: Request) -> None:
        if not self.alive:
            raise Unavailable("stopped", retry_after=1)
        if len(self.rows) >= self.limit:
            raise QueueFull("the queue is full: retry", retry_after=1.5)
        self.requests.append(request)
        self.rows[request.id] = None
        self.threads.append(threading.Thread(target=self._run, args=(request,)))
        self.threads[-1].start()

    def cancel(self, request_id: str, reason: str = "cancelled") -> None:
        if request_id in self.rows:
            self.rows[request_id] = reason

    def call(self, op: str, spec: Spec) -> Future[None]:
        self.calls.append((op, spec.name))
        done: Future[None] = Future()
        done.set_exception(self.refuse) if self.refuse else done.set_result(None)
        return done

    def stats(self) -> Stats:
        return Stats(running=len(self.rows), kv_total_tokens=1024, residents=self.residents)

    def _run(self, request: Request) -> None:
        error, sent, reason = self.script(request), 0, "error"
        if error is None:
            sent, reason = self._echo(request)
        self.rows.pop(request.id)
        total = time.monotonic() - request.arrived
        mode = self._mode(request)
        self.deliver([Finished(request.id, reason, error, sent, queue_s=0.001, ttft_s=0.002, total_s=total, mode=mode)])

    def _mode(self, request: Request) -> Mode:
        """A snapshot that is there is taken."""
        if request.mode != "auto":
            return request.mode
        folded = {(r.name, r.version) for r in self.residents if r.snapshot_bytes}
        return "merged" if request.may_merge and request.members[0].spec.key in folded else "unmerged"

    def _echo(self, request: Request) -> tuple[int, str]:
        most = request.sampling.max_new_tokens
        for index, id in enumerate([*request.prompt, EOS][:most]):
            time.sleep(self.step_s)
            if reason := self.rows[request.id]:
                return index, reason
            top = ((id, -0.5),) * request.sampling.logprobs
            count = 0 if index else request.sampling.prompt_logprobs
            rated = tuple((-0.5, ((read, -0.5),) * count) for read in request.prompt[1:] if count)
            self.deliver([Token(request.id, index, id, -0.5 if top else None, top, rated)])
        return min(most, len(request.prompt) + 1), "length" if most <= len(request.prompt) else "eos"


def save_byte_tokenizer(folder: Path) -> Path:
    """256 bytes and an end token, as a fast tokenizer on disk."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{c: i for i, c in enumerate(letters)}, "</s>": EOS}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder
