"""Hostile and broken adapters against a live engine: each is refused for its own reason, and leaves no trace.

Three ways in: an upload, a folder copied into the registry, the check command. All three give the same reason. Then the
base is bit for bit what it was, the good adapter says what it said, and the engine holds what it held.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import files
import rig
import zoo
from adapter_server import cli
from adapter_server.config import EngineConfig
from adapter_server.core import Event, Finished, Spec, Token
from adapter_server.engine.engine import Engine
from adapter_server.engine.worker import Worker
from adapter_server.errors import AdapterRefused, AdapterServerError, RequestFailed
from adapter_server.registry import guard
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Store

BASE = "tiny-base"
PROMPT = (5, 9, 13, 40)
QUICK_S = 5.0  # what any refusal may take
Arrays = dict[str, np.ndarray]
Config = dict[str, Any]


@dataclass
class Live:
    """An engine at work, and its registry."""

    root: Path
    store: Store
    worker: Worker
    events: SimpleQueue[list[Event]]

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    def say(self, *names: str | None) -> list[list[int] | AdapterServerError | None]:
        """Greedy tokens of each adapter, all in one batch; the refusal of one that fails."""
        requests = [rig.ask(self.engine, name, PROMPT, logprobs=0) for name in names]
        said: dict[str, Any] = {request.id: [] for request in requests}
        for request in requests:
            self.worker.submit(request)
        left = set(said)
        while left:
            for event in self.events.get(timeout=20):
                if isinstance(event, Token):
                    said[event.request_id].append(event.id)
                elif isinstance(event, Finished):
                    left.discard(event.request_id)
                    if event.error:
                        said[event.request_id] = event.error
        return list(said.values())

    def forget(self, name: str) -> None:
        """As the watch does when a name goes."""
        for held, version, _ in self.held():
            if held == name:
                self.worker.call("unload", Spec(name, version, "", "", {}, 0)).result(20)

    def held(self) -> set[tuple[str, str, bool]]:
        """On the device and its way there, and in the host tier."""
        pool = self.engine.pool
        return set(pool.holdings) | {(*key, False) for key in pool.host.held()}

    def state(self) -> tuple[str, object, set[tuple[str, str, bool]]]:
        return self.engine.model.digest(), self.say("good", None), self.held()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("registry")
    shutil.copytree(saved(), root / "good")
    store = Store(root, reserved=[BASE], settle_s=0)
    engine = Engine(zoo.tiny_base("llama"), EngineConfig(kv_bytes=16 << 20), store, BASE)
    store.judge = engine.pool.judge
    events: SimpleQueue[list[Event]] = SimpleQueue()
    worker = Worker(engine, events.put)
    worker.start()
    made = Live(root, store, worker, events)
    made.say("good")
    yield made
    worker.stop()


@functools.cache
def saved(arch_seed: int = 0, **other: Any) -> Path:
    """A sound LoRA as PEFT saves it."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    base = functools.partial(zoo.tiny_base, "llama", arch_seed)
    zoo.save_adapter(base, zoo.lora(**other)(base()), folder)
    return folder


# What a case does to a sound adapter

Harm = Callable[[Config, Arrays], None]
LAYER = "base_model.model.model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"


def extra(name: str, shape: tuple[int, ...]) -> Harm:
    return lambda config, arrays: arrays.update({name: np.ones(shape, np.float32)})


def setting(**fields: Any) -> Harm:
    return lambda config, arrays: config.update(fields)


def without(count: int) -> Harm:
    def harm(config: Config, arrays: Arrays) -> None:
        for name in sorted(arrays)[:count]:
            del arrays[name]

    return harm


def poison(value: float) -> Harm:
    def harm(config: Config, arrays: Arrays) -> None:
        arrays[f"{Q}.lora_A.weight"].flat[17] = value

    return harm


def swapped(dtype: type[Any]) -> Harm:
    def harm(config: Config, arrays: Arrays) -> None:
        arrays[f"{Q}.lora_A.weight"] = arrays[f"{Q}.lora_A.weight"].astype(dtype)

    return harm


def narrow(config: Config, arrays: Arrays) -> None:
    """As if trained on a base of half the width."""
    for name, array in arrays.items():
        arrays[name] = array[:, : array.shape[1] // 2] if "lora_A" in name else array


def kind(peft_type: str, **fields: Any) -> Harm:
    def harm(config: Config, arrays: Arrays) -> None:
        config.clear()
        config.update(peft_type=peft_type, **fields)
        arrays.clear()
        arrays["prompt_embeddings"] = np.ones((2, 4), np.float32)

    return harm


HARMS: dict[str, tuple[Harm, str]] = {
    "a weight of the base": (extra(f"{LAYER}.mlp.down_proj.weight", (32, 48)), "1 tensors unexpected .*down_proj"),
    "the base's embedding": (extra("base_model.model.model.embed_tokens.weight", (97, 32)), "unexpected .*embed"),
    "the base's norm": (extra("base_model.model.model.norm.weight", (32,)), "unexpected .*norm.weight"),
    "a base layer": (extra(f"{Q}.base_layer.weight", (32, 32)), "unexpected .*base_layer"),
    "the base's head": (extra("base_model.model.lm_head.weight", (97, 32)), "unexpected .*lm_head"),
    "another adapter's key": (extra(f"{Q}.lora_B.good.weight", (32, 4)), r"unexpected .*lora_B\.good"),
    "missing tensors": (without(3), "3 tensors missing"),
    "a leftover": (extra("surplus", (1,)), "1 tensors unexpected .*'surplus'"),
    **{
        f"init {init}": (setting(init_lora_weights=init), "'init_lora_weights' is .*save the adapter again")
        for init in ("pissa_niter_4", "corda", "loftq", "lora_ga")
    },
    "replicated layers": (setting(layer_replication=[[0, 2], [1, 2]]), "'layer_replication' is not served"),
    "a pattern that hangs": (setting(target_modules="([\\w.]+)+!"), "matches no module"),
    "a pattern beyond RE2": (setting(target_modules="(a)\\1"), "does not compile in RE2"),
    "a rank pattern beyond RE2": (setting(rank_pattern={"(?=q)q_proj": 8}), "'rank_pattern' does not compile"),
    "a large rank": (setting(r=4096), r"of the wrong shape .*not \[4096"),
    "an absurd rank": (setting(r=1 << 40), "'r' must be an integer in"),
    "no rank": (setting(r=0), "'r' must be an integer in"),
    "a rank that is text": (setting(r="4"), "'r' must be an integer in"),
    "a rank that is true": (setting(r=True), "'r' must be an integer in"),
    "100,000 rank patterns": (setting(rank_pattern={f"m{i}": 1 for i in range(100_000)}), "bytes, allowed are 65,536"),
    "NaN": (poison(np.nan), "holds NaN or infinity"),
    "infinity": (poison(-np.inf), "holds NaN or infinity"),
    "a huge scaling": (setting(lora_alpha=1e30), "'lora_alpha' must be a finite number|scaling .* beyond"),
    "a large scaling": (setting(lora_alpha=1e9), "the scaling .* is beyond"),
    "a scaling that is NaN": (setting(lora_alpha=float("nan")), "NaN is no number"),
    "float64": (swapped(np.float64), "dtype 'F64'"),
    "int8": (swapped(np.int8), "dtype 'I8'"),
    "integers": (swapped(np.int32), "1 tensors of the wrong dtype"),
    "another width": (narrow, "14 tensors of the wrong shape"),
    "an unknown key": (setting(evil="import os"), "'evil' is not a key of this kind"),
    "a misspelt key": (setting(use_doraa=True), "did you mean 'use_dora'"),
    "Megatron": (setting(megatron_config={"x": 1}), "'megatron_config' is not served"),
    "a tokenizer's arguments": (setting(tokenizer_kwargs={"trust_remote_code": True}), "is not a key of this kind"),
    "modules that are a number": (setting(target_modules=7), "'target_modules' must be"),
    "no modules": (setting(target_modules=["nothing"]), "matches no module"),
    "an unknown kind": (setting(peft_type="EVIL"), "adapters of kind 'EVIL' are not served"),
    "a kind that is a path": (setting(peft_type="../../os"), '"peft_type" is'),
    "a kind that is a list": (setting(peft_type=["LORA"]), '"peft_type" is'),
    "no kind": (setting(peft_type=None), '"peft_type" is None'),
    "a million virtual tokens": (kind("PREFIX_TUNING", num_virtual_tokens=1 << 20), r"not \[1048576, 64\]"),
    "too many virtual tokens": (kind("PROMPT_TUNING", num_virtual_tokens=1 << 40), "'num_virtual_tokens' must be"),
    "tasks without end": (
        kind("MULTITASK_PROMPT_TUNING", num_virtual_tokens=2, num_tasks=1 << 20, num_ranks=1 << 20),
        "3 tensors|2 tensors missing",
    ),
}  # fmt: skip


def changed(harm: Harm) -> tuple[bytes, bytes]:
    config, arrays = json.loads((saved() / guard.CONFIG).read_text()), load_file(saved() / guard.WEIGHTS)
    harm(config, arrays)
    return json.dumps(config).encode(), framed(arrays)


def framed(arrays: Arrays) -> bytes:
    """Any dtype, which the library would refuse to name."""
    words = {"float32": "F32", "float64": "F64", "int8": "I8", "int32": "I32"}
    header, body = {}, b""
    for name, array in arrays.items():
        raw = array.tobytes()
        header[name] = files.entry(words[array.dtype.name], array.shape, len(body), len(body) + len(raw))
        body += raw
    return files.frame(header, body)


# What a case does to the bytes

SOUND = functools.cache(lambda: changed(lambda config, arrays: None))
ONE = {"x": files.entry("F32", (1,), 0, 4)}
EMPTY = b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(300_000))

BYTES: dict[str, tuple[Callable[[], tuple[bytes, bytes]], str]] = {
    "a header of 300,000 tensors": (lambda: (SOUND()[0], files.frame(b"{" + EMPTY + b"}")), "a header of|brackets"),
    "a header of spaces": (lambda: (SOUND()[0], files.frame(b" " * (99 << 20))), "a header of 103,809,024 bytes"),
    "a truncated file": (lambda: (SOUND()[0], SOUND()[1][:-1]), "1 bytes are missing"),
    "a file cut in its header": (lambda: (SOUND()[0], SOUND()[1][:100]), "ends inside its header"),
    "an empty file": (lambda: (SOUND()[0], b""), "0 bytes are no safetensors file"),
    "a file too long": (lambda: (SOUND()[0], SOUND()[1] + b"\0"), "1 bytes too many"),
    "overlapping tensors": (lambda: (SOUND()[0], files.frame(ONE | {"y": ONE["x"]}, b"1234")), "overlaps"),
    "tensors out of range": (
        lambda: (SOUND()[0], files.frame({"x": files.entry("F32", (1,), 1 << 50, (1 << 50) + 4)}, b"1234")),
        "leaves a gap|bytes are missing",
    ),
    "a pickle by the weights' name": (lambda: (SOUND()[0], b"\x80\x02" + b"ctorch\n" * 9), "a header of"),
    "an empty config": (lambda: (b"", SOUND()[1]), "no valid JSON"),
    "a config that is a list": (lambda: (b"[]", SOUND()[1]), "a JSON object is needed"),
    "a config nested 10,000 deep": (lambda: (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", SOUND()[1]), "nested"),
    "a config over 64 KiB": (lambda: (SOUND()[0] + b" " * (64 << 10), SOUND()[1]), "bytes, allowed are 65,536"),
}


def contents() -> dict[str, tuple[Callable[[], tuple[bytes, bytes]], str]]:
    return {name: (functools.partial(changed, harm), fault) for name, (harm, fault) in HARMS.items()} | BYTES


# The three ways in


def by_upload(live: Live, name: str, config: bytes, weights: bytes) -> str:
    with pytest.raises(AdapterRefused) as refused:
        Publisher(live.store).publish(name, config, io.BytesIO(weights))
    assert not os.path.lexists(live.root / name)
    return refused.value.message


def by_copy(live: Live, name: str) -> str:
    """A load, as a request would cause it; what is held of the failure goes when the folder does."""
    live.store.refresh()  # as the watch does
    with pytest.raises(AdapterRefused) as refused:
        live.worker.call("load", live.store.resolve(name)).result(20)
    live.forget(name)
    return refused.value.message


def by_command(live: Live, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    @contextmanager
    def running(_: Engine) -> Iterator[tuple[Worker, None]]:
        yield live.worker, None

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_build", lambda *_: (Store(live.root, [BASE], settle_s=0), live.engine, None))
        patch.setattr(cli, "_running", running)
        result = CliRunner().invoke(cli.app, ["adapters", "check", name, "--model", BASE, "--adapters", str(live.root)])
    assert result.exit_code == 1, result.output
    live.forget(name)
    first, *rules = result.output.splitlines()
    assert [line.split()[1] for line in rules] == ["name", "files", "config", "header", "keys", "finite"]
    return first.removeprefix("refused ").removeprefix(f"{name}: ")


def reason(message: str, name: str) -> str:
    """Without the adapter's name, and on one line as the command prints it."""
    return " ".join(message.removeprefix(f"adapter {guard.show(name)}: ").split())


@contextmanager
def unharmed(live: Live) -> Iterator[None]:
    """Nothing of what happens inside stays, and it is over soon."""
    before, started = live.state(), time.monotonic()
    yield
    assert time.monotonic() - started < QUICK_S
    assert live.state() == before
    assert sorted(entry.name for entry in live.store.entries()) == ["good"]


def check_alike(said: list[str], fault: str) -> None:
    assert re.search(fault, said[0]), said[0]
    assert len(set(said)) == 1, said
    assert said[0].isprintable()
    assert len(said[0]) < 700


@pytest.mark.parametrize("case", list(contents()))
def test_bad_content_is_refused_alike_by_every_way(live: Live, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, fault = contents()[case]
    config, weights = make()
    with unharmed(live):
        said = [by_upload(live, "bad", config, weights)]
        folder = files.write(live.root / "bad", weights=weights)
        (folder / guard.CONFIG).write_bytes(config)
        try:
            said += [by_copy(live, "bad"), by_command(live, "bad", monkeypatch)]
        finally:
            shutil.rmtree(folder)
        check_alike([reason(message, "bad") for message in said], fault)


def replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def harm(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return harm


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"a pickle {pickle}": (
            lambda f, pickle=pickle: (f / guard.WEIGHTS).rename(f / pickle),  # type: ignore[misc]
            f"{pickle}: a pickle can run code.*python -c",
        )
        for pickle in guard.PICKLES
    },
    "no weights": (lambda f: (f / guard.WEIGHTS).unlink(), "adapter_model.safetensors: missing"),
    "weights that are a FIFO": (replaced(guard.WEIGHTS, os.mkfifo), "not a regular file"),
    "a config that is a FIFO": (replaced(guard.CONFIG, os.mkfifo), "not a regular file"),
    "weights that are a folder": (replaced(guard.WEIGHTS, os.mkdir), "not a regular file"),
    "weights from a device": (replaced(guard.WEIGHTS, lambda p: p.symlink_to("/dev/zero")), "leads out"),
    "weights from elsewhere": (replaced(guard.WEIGHTS, lambda p: p.symlink_to(saved() / guard.WEIGHTS)), "leads out"),
    "a config from elsewhere": (replaced(guard.CONFIG, lambda p: p.symlink_to("/etc/passwd")), "leads out"),
    "a link to itself": (replaced(guard.WEIGHTS, lambda p: p.symlink_to(p)), "cannot be opened"),
    "a file over the limit": (lambda f: os.truncate(f / guard.WEIGHTS, 1 << 40), "bytes, allowed are"),
}


@pytest.mark.parametrize("case", list(FOLDERS))
def test_bad_folders_are_refused_alike(live: Live, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    harm, fault = FOLDERS[case]
    with unharmed(live):
        folder = shutil.copytree(saved(), live.root / "bad")
        harm(folder)
        try:
            said = [by_copy(live, "bad"), by_command(live, "bad", monkeypatch)]
        finally:
            shutil.rmtree(folder)
        check_alike([reason(message, "bad") for message in said], fault)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an adapter says, nobody is asked for anything."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a connection was made")

    for call in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, call, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


ANY_NAMES = {"base": "reserved", BASE: "reserved", "Good": "by case only", "a b": "not allowed", "-rf": "not allowed"}
ANY_NAMES |= dict.fromkeys(("g\u043e\u043ed", "\uff47ood", "good\u200b", "go\u0308od", "x" * 200), "not allowed")
NO_FOLDERS = ("../x", "/etc", "a/b", ".", "..", "a\0", "x" * 300, "")


@pytest.mark.parametrize("name", list(ANY_NAMES))
def test_bad_names_are_refused_alike(live: Live, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with unharmed(live):
        said = [by_upload(live, name, *SOUND())]
        folder = shutil.copytree(saved(), live.root / name)
        try:
            said.append(by_copy(live, name))
            if not name.startswith("-"):
                said.append(by_command(live, name, monkeypatch))
        finally:
            shutil.rmtree(folder)
        check_alike([reason(message, name) for message in said], ANY_NAMES[name])


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_names_that_no_folder_can_have_reach_no_file(live: Live, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with unharmed(live):
        monkeypatch.setattr(Publisher, "_alone", None)
        with pytest.raises(AdapterRefused, match="not allowed"):
            Publisher(live.store).publish(name, SOUND()[0], io.BytesIO(SOUND()[1]))
        with pytest.raises(AdapterServerError, match="there is no adapter"):
            live.store.resolve(name)


# What looks bad and is not


HARMLESS: dict[str, Harm] = {
    "a class to import": setting(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
    "a Megatron module": setting(megatron_core="os"),
    "run-time settings": setting(runtime_config={"ephemeral_gpu_offload": True}),
    "another base's name": setting(base_model_name_or_path="../../etc/passwd", revision="main"),
    "an initialisation that left the base alone": setting(init_lora_weights="eva"),
    "a pattern that would hang": setting(rank_pattern={"([\\w.]+)+!": 7}),
    "an option of a later PEFT, off": setting(future_option=None, another=False),
}


@pytest.mark.parametrize("case", list(HARMLESS))
def test_strings_of_a_config_do_nothing(live: Live, case: str) -> None:
    config, weights = changed(HARMLESS[case])
    publisher, before = Publisher(live.store), live.state()
    spec = publisher.publish("twin", config, io.BytesIO(weights))
    assert live.say("twin") == live.say("good")
    publisher.delete("twin")
    live.forget(spec.name)
    assert live.state() == before


def test_another_base_is_refused_alike_where_that_is_strict(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = changed(setting(base_model_name_or_path="org/other-base"))
    with unharmed(live), monkeypatch.context() as patch:
        patch.setattr(live.store, "base", guard.Base((BASE,)))
        patch.setattr(live.store, "strict_base", True)
        said = [by_upload(live, "bad", config, weights)]
        folder = files.write(live.root / "bad", weights=weights)
        (folder / guard.CONFIG).write_bytes(config)
        said.append(by_copy(live, "bad"))
        shutil.rmtree(folder)
        check_alike([reason(message, "bad") for message in said], "trained on 'org/other-base', and 'tiny-base' is")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_takes_from_the_base_is_computed_beside_it(live: Live, init: str) -> None:
    config, weights = changed(setting(init_lora_weights=init))
    publisher, before = Publisher(live.store), live.state()
    spec = publisher.publish("raw", config, io.BytesIO(weights))
    [raw] = live.say("raw")
    assert isinstance(raw, list)
    assert live.engine.pool.holdings[(*spec.key, False)].rank == 2 * json.loads(config)["r"]
    publisher.delete("raw")
    live.forget(spec.name)
    assert live.state() == before


def test_templates_and_tokenizers_beside_an_adapter_are_not_read(live: Live) -> None:
    before, folder = live.state(), shutil.copytree(saved(), live.root / "twin")
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "modeling.py", "added_tokens.json"):
        (folder / file).write_text("{{ 1/0 }} raise SystemExit")
    spec = live.store.resolve("twin")
    assert live.say("twin") == live.say("good")
    shutil.rmtree(folder)
    live.forget(spec.name)
    assert live.state() == before


def test_numbers_that_overflow_fail_their_own_row_alone(live: Live) -> None:
    def swell(config: Config, arrays: Arrays) -> None:
        for array in arrays.values():
            array[:] = 3e38

    config, weights = changed(swell)
    publisher, before = Publisher(live.store), live.state()
    spec = publisher.publish("swollen", config, io.BytesIO(weights))
    [good, swollen, base] = live.say("good", "swollen", None)
    assert isinstance(swollen, RequestFailed)
    assert [good, base] == before[1]
    publisher.delete("swollen")
    live.forget(spec.name)
    assert live.state() == before
