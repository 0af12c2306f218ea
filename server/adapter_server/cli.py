"""The command line: serve, demo, generate, adapters, merge, bench.

Flags come from the fields of config.py, each with its default and an environment variable ADAPTER_SERVER_<FIELD>.
Heavy imports wait until a command needs them, so that `--help` is quick.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import queue
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from adapter_server import __version__
from adapter_server.config import DEMO_BASE, EngineConfig, ServerConfig, demo_adapters
from adapter_server.core import Event, Finished, Token
from adapter_server.errors import AdapterRefused, AdapterServerError, InvalidRequest, RequestFailed

if TYPE_CHECKING:
    from adapter_server.api.app import Connect
    from adapter_server.core import Info
    from adapter_server.engine.engine import Engine
    from adapter_server.engine.worker import Worker
    from adapter_server.registry.guard import Expect
    from adapter_server.registry.publish import Publisher
    from adapter_server.registry.sources import Place
    from adapter_server.registry.store import Entry, Store
    from adapter_server.text import Text

ENV = "ADAPTER_SERVER_"
DEMO_NAME = "adapter-server-demo"  # the demo base's id
DEMO_ADAPTER, DEMO_PROMPT = "shout", "red cat>"
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
MAY_BE_0 = ("max_model_len", "threads", "port")
HELP = {
    "dtype": "Number format of the base; auto: float32 on the CPU, the checkpoint's own elsewhere",
    "quantize": "Hold the base's Linears in fewer bits: nf4, fp4 or int8 by bitsandbytes, or cpu-int8",
    "adapter_dtype": "What adapters are held and added in: float32, as PEFT does, or the base's own, half the memory",
    "device": "auto, cpu, cuda, or one of several such as cuda:1",
    "max_model_len": "Tokens of context per request; 0: the base's own, or what --kv-bytes has room for",
    "max_rows": "Requests that run at once",
    "max_step_tokens": "Tokens of one step, prompts and new tokens together",
    "max_waiting": "Requests that may wait before others get 429",
    "max_waiting_tokens": "Tokens that waiting requests may add up to, prompts and answers, before others get 429",
    "kv_bytes": "Memory for keys and values, such as 2G",
    "kv_layout": "How keys and values lie in memory; auto: slots on the CPU, pages on CUDA",
    "page_tokens": "Tokens of one page of keys and values, and of one block of a prompt that is kept",
    "prefix_cache_bytes": "Memory for beginnings of prompts that were computed before, beside --kv-bytes; 0: keep none",
    "adapter_bytes": "Memory for adapters and merged snapshots together, such as 512M",
    "auto_merge": "Let mode auto make a merged snapshot of an adapter that most requests ask for, where that pays",
    "host_bytes": "Main memory for compiled adapters, so that one evicted from the device comes back quickly",
    "ring_bytes": "On CUDA, page-locked memory through which adapters are copied to the device; 0: each by itself",
    "pack_weights": "Keep packed copies of the base's weights on the CPU: faster, larger",
    "kernels": "Run kernels: Triton's on CUDA once they agree with torch, C's on the CPU; without: plain torch",
    "fuse": "Run norms, attention and MLPs in few kernels where that agrees with the modules themselves",
    "graphs": "On CUDA, run steps of single tokens as captured graphs",
    "max_grammar_bytes": "Largest schema, expression or grammar of a response_format, such as 64K",
    "threads": "Threads of torch on the CPU; 0: torch's own choice, one for a tiny base",
    "profile": "Write a trace of 64 steps here, for Perfetto or chrome://tracing",
    "host": "Address to listen on",
    "port": "Port to listen on; 0: any free one",
    "adapters": "Folder of adapters, one sub-folder each",
    "engine_process": "Run the engine in a process of its own, so that HTTP takes no time of its steps; auto: on CUDA",
    "max_adapter_bytes": "Largest weights file of an adapter, such as 512M",
    "strict_base": "Refuse adapters whose config names another base; without it they are served with a warning",
    "max_uploads": "Uploads of adapters at once; others get 429",
    "keep_versions": "Published versions that are kept of each adapter, beside those in use",
    "preload": "Adapters to load before requests are taken, with commas between; may be repeated",
    "preload_pinned": "Never evict these",
    "max_body_bytes": "Largest body of a request",
    "max_header_bytes": "Most bytes of a request's headers",
    "body_timeout_s": "Time that a client has to send its body, in seconds; an upload has it again with each part",
    "stream_buffer_tokens": "Tokens that may wait for a client that does not read its stream; then it is cut off",
    "write_timeout_s": "Time for a client to take a part of its answer, in seconds; then it is cut off",
    "request_timeout_s": "Longest time for one request, in seconds",
    "drain_timeout_s": "Time that running requests get after SIGTERM, in seconds",
    "insecure": "Listen on an address that others can reach, without keys",
    "api_key": "Key that may ask, sent as Authorization: Bearer; may be repeated",
    "admin_key": "Key that may also change adapters; may be repeated",
    "api_keys_file": "TOML file of keys, each with the adapters that it may use and its limits",
    "cors_origin": "Origin whose pages may ask from a browser, such as https://example.com; may be repeated",
    "adapter_chat_templates": "Let an adapter's own chat template put its conversations together",
    "gateway_metrics": "Also report metrics by the names that LoRA-aware gateways read",
    "log_level": "How much the log says",
}

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class Friendly(typer.core.TyperGroup):
    """Every refusal is one line that says what to do, and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AdapterServerError as error:
            err.print(f"[bold red]error:[/] {_plain(error.message)}", highlight=False)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Friendly, no_args_is_help=True, add_completion=False, help=__doc__.partition("\n")[0])
adapters_app = typer.Typer(no_args_is_help=True, help="The adapters folder: look, check, publish, roll back, delete.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure.")
app.add_typer(adapters_app, name="adapters")
app.add_typer(bench_app, name="bench")

Model = Annotated[str, typer.Argument(help="Hub id or local folder of the base model", show_default="the demo's base")]
ModelFlag = Annotated[
    str, typer.Option("--model", help="Hub id or local folder of the base", show_default="the demo's base")
]


def parse_bytes(text: str | int) -> int:
    """2147483648, 2G, 2GiB, 512M. Units are powers of 1024."""
    word = str(text).strip().lower().removesuffix("ib").removesuffix("b")
    number, unit = word.rstrip("kmgt"), word[len(word.rstrip("kmgt")) :]
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size > 0:
        return size
    raise typer.BadParameter(f"{text!r} is no size: write bytes, or 512M, or 2G")


def with_settings(
    *kinds: type[Any], without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command a flag for every field of these dataclasses, and the dataclasses as its first arguments."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            chosen = [_take(kind, given) for kind in kinds]
            command(*chosen, **given)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(kinds) :]
        flags = [_flag(kind, name) for kind in kinds for name in _names(kind) if name not in without]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in (*own, *flags)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


def _take(kind: type[Any], given: dict[str, Any]) -> Any:
    """The flags that were given, or have a default; a repeated one is a tuple."""
    taken = {name: given.pop(name) for name in _names(kind) if name in given}
    settings = {name: value for name, value in taken.items() if value is not None}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})


def _flag(kind: type[Any], name: str) -> inspect.Parameter:
    default = next(field.default for field in fields(kind) if field.name == name)
    kind_of_value = get_type_hints(kind)[name]
    limits: dict[str, Any] = {"min": 0 if name in MAY_BE_0 else 1} if kind_of_value is int else {}
    if name.endswith("_bytes"):
        limits = {"parser": parse_bytes, "metavar": "<bytes>"}
    if kind_of_value == tuple[str, ...]:
        default, kind_of_value = None, list[str] | None
        limits = {"metavar": {"preload": "<name>", "cors_origin": "<origin>"}.get(name, "<key>")}
    option = typer.Option(envvar=ENV + name.upper(), help=HELP[name], **limits)
    hint = Annotated[kind_of_value, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version")] = False) -> None:
    """Serve many PEFT adapters over one resident base model."""
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
@with_settings(EngineConfig, ServerConfig)
def serve(engine: EngineConfig, server: ServerConfig, model: Model = str(DEMO_BASE)) -> None:
    """Serve a base model and a folder of adapters over HTTP."""
    _serve(model, engine, server, lambda store, address: err.print(f"serving {_plain(model)} on {address}"))


@app.command()
@with_settings(EngineConfig, ServerConfig, without=("adapters",))
def demo(engine: EngineConfig, server: ServerConfig) -> None:
    """Serve the small base that comes with the package, and its adapters."""
    _serve(str(DEMO_BASE), engine, replace(server, adapters=str(demo_adapters())), _welcome)


def _welcome(store: Store, address: str) -> None:
    names = store.names()
    name = DEMO_ADAPTER if DEMO_ADAPTER in names else next(iter(names), None)
    body = json.dumps({"prompt": DEMO_PROMPT, "adapter": name})
    curl = f"curl -s {address}/generate -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    out.print(f"adapter-server on {address}, adapters: {', '.join(names) or 'none'}\n\n  {curl}\n", highlight=False)


def _serve(model: str, engine: EngineConfig, server: ServerConfig, announce: Callable[[Store, str], None]) -> None:
    from adapter_server.api.hosts import check_host
    from adapter_server.api.logs import configure_logs
    from adapter_server.engine.process import is_apart
    from adapter_server.engine.worker import settled

    check_host(server)
    configure_logs(server.log_level)
    apart = is_apart(server.engine_process, engine.device)
    store, text, info, connect = (_apart if apart else _within)(model, engine, server)
    _publisher(store)
    import structlog

    from adapter_server.api.server import Server

    structlog.get_logger().info("lane", model=info.model, lane=info.lane, why=info.lane_why)
    running = Server(connect, store, text, info, server, lambda at: announce(store, at))
    with settled():
        running.run()
    if running.failure:
        raise running.failure
    raise typer.Exit(running.exit_code)


Ready = tuple["Store", "Text", "Info", "Connect"]


def _within(model: str, engine: EngineConfig, server: ServerConfig) -> Ready:
    """The engine on a thread of this process."""
    from adapter_server.engine.worker import Worker

    store, built, text = _build(model, engine, Path(server.adapters))
    store.max_bytes, store.strict_base = server.max_adapter_bytes, server.strict_base
    return store, text, built.info, lambda deliver: Worker(built, deliver)


def _apart(model: str, engine: EngineConfig, server: ServerConfig) -> Ready:
    """The engine in a process of its own."""
    _check_model(model)
    with err.status(f"loading {_plain(model)}"):
        from adapter_server.engine.process import EngineProcess, Shelf, build_over
        from adapter_server.registry.guard import Base
        from adapter_server.registry.store import Store

        name, root = _called(model), Path(server.adapters)
        shelf = Shelf(root, (model, name or Path(model).name), server.max_adapter_bytes, server.strict_base)
        store = Store(root, shelf.reserved, max_bytes=shelf.max_bytes)
        worker = EngineProcess(partial(build_over, model, engine, shelf, name), engine, store)
        text = _meanwhile(model)
        ready = worker.ready()
        store.judge, store.strict_base = worker.judge, shelf.strict_base
        store.base = Base((model, ready.info.model), ready.info.commit)
        return store, text, ready.info, worker.connect


def _meanwhile(model: str) -> Text:
    """What this process needs, while the other one loads the base: the first request need not wait for it."""
    from adapter_server.families import known
    from adapter_server.text import Text

    importlib.import_module("adapter_server.api.server")
    known()
    return Text(model)


def _called(model: str) -> str | None:
    """What the base goes by; None: by its folder or its id."""
    return DEMO_NAME if Path(model) == DEMO_BASE else None


def _build(model: str, config: EngineConfig, adapters: Path) -> tuple[Store, Engine, Text]:
    """The adapters, the engine over its base, and the base's tokenizer."""
    _check_model(model)
    _quiet()
    with err.status(f"loading {_plain(model)}"):
        from adapter_server.engine.engine import build
        from adapter_server.registry.guard import Base
        from adapter_server.registry.store import Store
        from adapter_server.text import Text

        text = Text(model)
        name = _called(model)
        store = Store(adapters, reserved=(model, name or Path(model).name))
        built = build(model, config, store, name)
        store.judge = built.pool.judge
        store.base = Base((model, built.info.model), built.info.commit)
        return store, built, text


def _quiet() -> None:
    """No progress bars of the library's: the log is ours, and standard output may be read by a program."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _check_model(model: str) -> None:
    """A path that leads nowhere would be taken for a hub id, and its error would speak of tokens and networks."""
    looks_local = model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    if looks_local and not Path(model).is_dir():
        raise InvalidRequest(f"{model}: no such folder. Give a folder with a model's config.json, or a hub id")


@app.command()
@with_settings(EngineConfig)
def generate(
    engine: EngineConfig,
    prompt: Annotated[str, typer.Argument(help="The text to go on from")],
    adapter: Annotated[str | None, typer.Option(help="An adapter's name; none: the base model")] = None,
    model: ModelFlag = str(DEMO_BASE),
    adapters: Annotated[Path | None, typer.Option(help="Folder of adapters", show_default="the demo's")] = None,
    mode: Annotated[Literal["auto", "unmerged", "merged"], typer.Option(help="How the adapter is applied")] = "auto",
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens at most")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest token each time")] = None,
    seed: Annotated[int | None, typer.Option(help="For the same random choices again")] = None,
    scale: Annotated[float | None, typer.Option(help="Multiplies the adapter's effect")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated")] = None,
) -> None:
    """Answer one prompt in this process, and print the text as it comes."""
    from adapter_server.api.schemas import GenerateBody, parse

    asked: dict[str, Any] = {"prompt": prompt, "adapter": adapter, "mode": mode, "max_new_tokens": max_new_tokens}
    asked |= {"temperature": temperature, "seed": seed, "scale": scale, "stop": stop or None}
    given = {name: value for name, value in asked.items() if value is not None}
    body = parse(GenerateBody, json.dumps(given).encode())
    store, built, text = _build(model, engine, adapters or demo_adapters())
    with _running(built) as (worker, events):
        _answer(body, store, text, worker, events)


@contextmanager
def _running(engine: Engine) -> Iterator[tuple[Worker, queue.SimpleQueue[list[Event]]]]:
    """A worker over this engine, and what it reports."""
    from adapter_server.engine.worker import Worker

    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    worker = Worker(engine, events.put)
    worker.start()
    try:
        yield worker, events
    finally:
        worker.stop()


def _answer(body: Any, store: Store, text: Text, worker: Worker, events: queue.SimpleQueue[list[Event]]) -> None:
    from adapter_server.api import resolve

    info = worker.engine.info
    ids = resolve.prompt_ids(body.prompt, text, info)
    request = resolve.admissible(body, ids, store, info, time.monotonic())
    stream = text.stream(() if info.has_encoder else ids, body.stops, info.eos)
    worker.submit(request)
    while not stream.stopped:
        for event in events.get():
            if isinstance(event, Token):
                _write(stream.push(event.id))
            elif isinstance(event, Finished):
                if event.reason == "error":
                    raise event.error or RequestFailed("the engine gave no answer and no reason")
                _write(stream.finish() + "\n")
                return
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


Folder = Annotated[Path, typer.Option("--adapters", envvar=ENV + "ADAPTERS", help=HELP["adapters"])]
ADAPTERS = Path(ServerConfig().adapters)


@adapters_app.command("ls")
def adapters_ls(adapters: Folder = ADAPTERS) -> None:
    """Every adapter, sound or not."""
    table = Table("name", "family", "bytes", "state", box=None, header_style="bold")
    for entry in _store(adapters).entries():
        spec = entry.spec
        row = (spec.family, f"{spec.bytes:,}", "ok") if spec else ("", "", f"refused: {entry.reason}")
        table.add_row(*map(_plain, (entry.name, *row)))
    out.print(table)


@adapters_app.command("show")
def adapters_show(
    name: Annotated[str, typer.Argument(help="Name, or name@version")], adapters: Folder = ADAPTERS
) -> None:
    """One adapter: its version, its files, its config."""
    spec = _store(adapters).resolve(name)
    facts = {"name": spec.name, "version": spec.version, "family": spec.family, "bytes": spec.bytes, "path": spec.path}
    out.print_json(json.dumps(facts | {"config": dict(spec.config)}))


@adapters_app.command("check")
def adapters_check(
    name: Annotated[str | None, typer.Argument(help="One adapter; none: all of them")] = None,
    adapters: Folder = ADAPTERS,
    model: Annotated[str | None, typer.Option(help="Also load each over this base")] = None,
) -> None:
    """Read adapters to the last byte, and say which are sound; of the others, what each rule says. Status 1 if any."""
    if model is None:
        store = _store(adapters)
        good = _check(store, name, lambda ref: store.read(store.resolve(ref)))
    else:
        store, built, _ = _build(model, EngineConfig(), adapters)
        with _running(built) as (worker, _):
            good = _check(
                store, name, lambda ref: worker.call("load", store.resolve(ref)).result(), built.pool.expected
            )
    raise typer.Exit(0 if good else 1)


def _check(store: Store, name: str | None, check: Callable[[str], object], expected: Expect | None = None) -> bool:
    entries: list[Entry] = store.entries()
    names = [name] if name else [entry.name for entry in entries]
    refs = [ref for each in names for ref in (each, *_old(store, each))]
    return not [ref for ref in refs if not _sound(store, ref, check, expected)]


def _old(store: Store, name: str) -> list[str]:
    """The published versions of a name but the current one."""
    from adapter_server.registry import versions

    current = versions.linked(store.root, name)
    return [f"{name}@v{version.number}" for version in store.versions(name) if version.id != current]


def _sound(store: Store, name: str, check: Callable[[str], object], expected: Expect | None) -> bool:
    try:
        check(name)
    except AdapterServerError as error:
        out.print(f"[red]refused[/] {_plain(name)}: {_plain(error.message)}", highlight=False)
        if isinstance(error, AdapterRefused) and "@" not in name:
            _print_rules(store.root / name.partition("@")[0], expected)
        return False
    warning = store.warning(store.resolve(name))
    out.print(f"[green]ok[/]      {_plain(name)}{_plain(f' (warning: {warning})') if warning else ''}", highlight=False)
    return True


def _print_rules(folder: Path, expected: Expect | None) -> None:
    from adapter_server.registry import guard

    for finding in guard.report(folder, expected):
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "–"}[finding.ok]
        said = "" if finding.ok else f"  {_plain(finding.message)}"
        out.print(f"  {mark}  {finding.rule}{said}", highlight=False)


@adapters_app.command("add")
def adapters_add(
    source: Annotated[str, typer.Argument(help="A folder that PEFT saved, OWNER/NAME@COMMIT, s3://… or gs://…")],
    name: Annotated[str | None, typer.Option(help="Its name", show_default="the folder's")] = None,
    adapters: Folder = ADAPTERS,
    model: Annotated[str | None, typer.Option(help="Also check it against this base")] = None,
    allow_source: Annotated[
        list[str] | None,
        typer.Option(envvar=ENV + "ALLOW_SOURCE", help="hub, s3 or gs; may be repeated"),
    ] = None,
    max_adapter_bytes: Annotated[
        int,
        typer.Option(
            parser=parse_bytes, metavar="<bytes>", envvar=ENV + "MAX_ADAPTER_BYTES", help=HELP["max_adapter_bytes"]
        ),
    ] = ServerConfig().max_adapter_bytes,
) -> None:
    """Publish a new version: checked whole, then current in one step."""
    place = None if Path(source).is_dir() else _source(source)
    store = _store(adapters) if model is None else _build(model, EngineConfig(), adapters)[0]
    store.max_bytes = max_adapter_bytes
    with _opened_folder(Path(source)) if place is None else _opened_source(place, allow_source or []) as opened:
        known, label, config, weights = opened
        spec = _publisher(store).publish(name or known, config, weights, source=label)
    out.print(f"{_plain(spec.name)}@{spec.version} is current", highlight=False)


Opened = tuple[str, str, bytes, IO[bytes]]  # a name, where from, the config, the weights


@contextmanager
def _opened_folder(folder: Path) -> Iterator[Opened]:
    from adapter_server.registry import guard

    folder = folder.absolute()
    guard.check_files(folder)
    config = guard.read_private(folder / guard.CONFIG, folder, guard.MAX_CONFIG_BYTES)
    with guard.open_regular(folder / guard.WEIGHTS, folder) as weights:
        yield folder.name, f"folder {folder.name}", bytes(config), weights


def _source(ref: str) -> Place:
    from adapter_server.registry import sources

    return sources.parse(ref)


@contextmanager
def _opened_source(place: Place, allowed: list[str]) -> Iterator[Opened]:
    from adapter_server.registry import sources

    if unknown := sorted(set(allowed) - set(sources.KINDS)):
        raise InvalidRequest(f"--allow-source {unknown[0]}: known are {', '.join(sources.KINDS)}")
    with sources.opened(place, allowed) as (config, weights):
        yield place.name, place.label, config, weights


@adapters_app.command("compose")
def adapters_compose(
    members: Annotated[list[str], typer.Argument(metavar="NAME=WEIGHT...", help="The adapters; no weight is 1")],
    out_name: Annotated[str, typer.Option("--out", help="The new adapter's name")],
    by: Annotated[str, typer.Option(help="PEFT's combination type: linear, cat, svd, ties, dare_linear, …")] = "linear",
    density: Annotated[float | None, typer.Option(help="Share that ties, dare and magnitude_prune keep")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank that svd cuts to", show_default="the largest")] = None,
    model: ModelFlag = str(DEMO_BASE),
    adapters: Folder = ADAPTERS,
) -> None:
    """Publish a new adapter that PEFT's add_weighted_adapter makes of several."""
    _check_model(model)
    store, weighted = _store(adapters), [_weighted(member) for member in members]
    if len({name for name, _ in weighted}) < len(weighted):
        raise InvalidRequest("an adapter is named twice: add its weights up")
    _quiet()
    with err.status("composing"):
        from adapter_server.engine.snapshot import composed
        from adapter_server.families.compose import Way

        specs = [(store.resolve(name), weight) for name, weight in weighted]
        config, weights = composed(model, specs, Way(by, density, rank), store)
    told = ", ".join(f"{spec.name}@{spec.version}={weight:g}" for spec, weight in specs)
    spec = _publisher(store).publish(out_name, config, io.BytesIO(weights), source=f"composition: {by} of {told}")
    out.print(f"{_plain(spec.name)}@{spec.version} is current", highlight=False)


def _weighted(member: str) -> tuple[str, float]:
    name, equals, text = member.partition("=")
    try:
        weight = float(text) if equals else 1.0
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise InvalidRequest(f"{member!r} is no NAME=WEIGHT, such as shout=0.7")
    return name, weight


@adapters_app.command("rollback")
def adapters_rollback(name: Annotated[str, typer.Argument(help="The adapter")], adapters: Folder = ADAPTERS) -> None:
    """Go back to the version before the current one."""
    spec = _publisher(_store(adapters)).rollback(name)
    out.print(f"{_plain(spec.name)}@{spec.version} is current", highlight=False)


@adapters_app.command("rm")
def adapters_rm(name: Annotated[str, typer.Argument(help="The adapter")], adapters: Folder = ADAPTERS) -> None:
    """Delete an adapter and its versions. A server that runs: better ask it, it knows which are in use."""
    _publisher(_store(adapters)).delete(name)
    out.print(f"{_plain(name)} is deleted", highlight=False)


def _publisher(store: Store) -> Publisher:
    from adapter_server.registry.publish import Publisher

    publisher = Publisher(store)
    publisher.recover()
    return publisher


def _store(folder: Path) -> Store:
    from adapter_server.registry.store import Store

    if not folder.is_dir():
        raise InvalidRequest(f"{folder}: no such folder. Name the adapters' folder with --adapters")
    return Store(folder)


@app.command()
def merge(
    name: Annotated[str, typer.Argument(help="The adapter")],
    target: Annotated[Path, typer.Option("--out", help="A new folder")],
    model: ModelFlag = str(DEMO_BASE),
    adapters: Folder = ADAPTERS,
) -> None:
    """Write the base with an adapter folded in, as an ordinary transformers folder."""
    _check_model(model)
    store = _store(adapters)
    spec = store.resolve(name)
    _quiet()
    with err.status(f"folding {_plain(name)}"):
        from adapter_server.engine.snapshot import export

        export(model, spec, store, target)
    out.print(f"{_plain(name)}@{spec.version} is folded into {_plain(target)}", highlight=False)


BENCHES = {
    "latency": "Base, unmerged and merged, by family and batch size.",
    "popularity": "32 rows that share adapters or each have their own, beside the base alone.",
    "prefill": "Prompts alone, on the base and on adapters.",
    "trace": "S-LoRA's trace: arrivals by a clock, from one registered adapter to 2,000.",
    "skew": "Merged, unmerged and auto, by the share of one adapter.",
    "hotload": "What running rows feel while adapters load, are published, merged and evicted.",
    "fairness": "One adapter's trickle beside another's flood.",
    "kinds": "Every kind that PEFT has, alone and all in one batch.",
    "memory": "Bytes of adapters on the device and on disk, and how many fit.",
}


def _bench(name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        importlib.import_module("adapter_server.bench.command").main(name, context.args)

    return run


for _name, _about in BENCHES.items():
    bench_app.command(
        _name,
        help=_about,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )(_bench(_name))


def _plain(value: object) -> str:
    """Text as it is, on one line: nothing of a file or a flag is taken for markup."""
    from rich.markup import escape

    return escape(" ".join(str(value).split()))


if __name__ == "__main__":
    app()
