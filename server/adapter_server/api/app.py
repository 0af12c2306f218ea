"""The application: the routes put together, and what runs beside them while it lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware

from adapter_server import __version__
from adapter_server.api import access, adapters, aliases, generate, lorax, openai, refusals, vllm
from adapter_server.api.bridge import Bridge, Worker
from adapter_server.api.described import ANYWHERE, KEYED, PLAIN, LoraxRefusal, Refusal, refused
from adapter_server.api.envelope import Envelope
from adapter_server.api.hosts import guards_host
from adapter_server.api.resolve import prompt_ids
from adapter_server.api.schemas import DetokenizeBody, TokenizeBody, document, parse
from adapter_server.api.service import Service, service_of
from adapter_server.api.sse import reply
from adapter_server.config import ServerConfig
from adapter_server.core import Event, Info
from adapter_server.errors import AdapterServerError, InvalidRequest, Unavailable
from adapter_server.metrics import CONTENT_TYPE, Metrics
from adapter_server.registry.aliases import Aliases
from adapter_server.registry.store import Changes, Store
from adapter_server.registry.watch import watch
from adapter_server.text import Text

Deliver = Callable[[list[Event]], None]
Connect = Callable[[Deliver], Worker]
LORAXS = ("/", "/generate_stream")  # paths that nobody but LoRAX's clients ask
PULSE_S = 0.2  # how often the engine is felt for life
probes = APIRouter()  # for whoever keeps the process running, without a key
router = APIRouter(dependencies=[Depends(access.inference)], responses=KEYED)
log = structlog.get_logger()


def create_app(
    connect: Connect,
    store: Store,
    text: Text,
    info: Info,
    config: ServerConfig,
    on_death: Callable[[], None] | None = None,
) -> FastAPI:
    """`connect` is given where to deliver events and gives the worker; `on_death` is called if the engine dies."""
    metrics = Metrics(config.gateway_metrics)
    metrics.build.info({"version": __version__, "model": info.model, "device": info.device, "dtype": info.dtype})
    bridge = Bridge(metrics, config.stream_buffer_tokens)
    bridge.worker = connect(bridge.deliver)
    known = Aliases(store.root)
    service = Service(bridge.worker, bridge, store, text, info, config, metrics, known, starting=bool(config.preload))
    app = FastAPI(
        title="adapter-server", version=__version__, lifespan=_lifespan(service, on_death), responses=ANYWHERE
    )
    metrics.gateway.aliases = known.all
    app.state.service = service
    app.state.keys = access.Keys(config)
    for part in (probes, router, *(each.router for each in (generate, openai, lorax, vllm, adapters, aliases))):
        app.include_router(part)
    refusals.install(app)
    _wrap(app, config)
    return app


def _wrap(app: FastAPI, config: ServerConfig) -> None:
    """What stands around every route, the innermost first."""
    if guards_host(config):
        app.add_middleware(access.HostGuard, own=config.host)
    app.add_middleware(Envelope, config=config, wordings=dict.fromkeys(LORAXS, lorax.worded))
    if config.cors_origin:  # refusals, too, are for a page to read
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )


def _lifespan(service: Service, on_death: Callable[[], None] | None) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.bridge.open()
        service.worker.start()
        over = asyncio.Event()
        beside = [asyncio.create_task(_keep_watch(service, over)), asyncio.create_task(_pulse(service, on_death))]
        try:
            yield
        finally:
            over.set()
            beside[1].cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await service.renderer.close()
            await asyncio.to_thread(service.worker.stop)

    return lifespan


async def _pulse(service: Service, on_death: Callable[[], None] | None) -> None:
    """Ends every request, and the server, when the engine's loop is no more."""
    while service.worker.alive:
        await asyncio.sleep(PULSE_S)
    log.error("the engine stopped")
    service.bridge.fail_all()
    if on_death is not None:
        on_death()


async def _keep_watch(service: Service, over: asyncio.Event) -> None:
    """Follows the adapters folder. What it sets off runs beside it, so that a slow unload delays no news."""
    running: set[asyncio.Task[None]] = set()

    def on_change(changes: Changes) -> None:
        log.info("adapters changed", **_told(changes))
        for name in changes.removed:
            service.metrics.forget(name)
            service.bridge.usage.pop(name, None)
        for name in (*changes.removed, *changes.changed):
            task = asyncio.create_task(_logged(_let_go(service, name), name))
            running.add(task)
            task.add_done_callback(running.discard)

    await watch(service.store, on_change, over)
    for task in tuple(running):
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _told(changes: Changes) -> dict[str, Any]:
    fields = {name: getattr(changes, name) for name in ("added", "changed", "removed", "error")}
    return {name: value for name, value in fields.items() if value}


async def _let_go(service: Service, name: str) -> None:
    """Frees the versions that requests no longer reach."""
    try:
        current = await asyncio.to_thread(service.store.resolve, name)
    except AdapterServerError:  # gone, or not servable as it is now
        current = None
    await adapters.drop(service, name, current)


async def _logged(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except AdapterServerError as error:
        log.warning("an old version stays in memory", adapter=name, reason=error.message)


@probes.get("/livez", summary="Is the engine's loop alive?", responses=refused(503))
async def livez(request: Request) -> Response:
    """503 once the engine has died."""
    if service_of(request).worker.alive:
        return Response('{"status":"ok"}', media_type="application/json")
    return refusals.answer(Unavailable("the engine is not running", retry_after=5))


@probes.get("/readyz", summary="Are requests taken?", responses=refused(503))
@probes.get("/health", summary="The same as /readyz", responses=refused(503))
async def readyz(request: Request) -> Response:
    """503 while draining, and once the engine has died."""
    try:
        service_of(request).check_open()
    except Unavailable as error:
        return refusals.answer(error)
    return Response('{"status":"ok"}', media_type="application/json")


@probes.get("/version", summary="The server's version")
async def version() -> dict[str, str]:
    """As in the package."""
    return {"version": __version__}


@router.get("/info", summary="The base model and the limits")
async def info(request: Request) -> dict[str, Any]:
    """What a client may want to know before it asks."""
    service = service_of(request)
    base = service.info
    return {
        "version": __version__,
        "model": base.model,
        "max_model_len": base.max_model_len,
        "vocab_size": base.vocab,
        "device": base.device,
        "dtype": base.dtype,
        "lane": base.lane,
        "lane_why": base.lane_why,
        "max_body_bytes": service.config.max_body_bytes,
        "request_timeout_s": service.config.request_timeout_s,
        **lorax.info(base),
    }


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses=PLAIN,
    dependencies=[Depends(access.whole)],
)
async def metrics(request: Request) -> Response:
    """The gauges are of this moment."""
    service = service_of(request)
    entries = await asyncio.to_thread(service.store.entries)
    text = service.metrics.render(service.worker.stats(), {entry.name: entry.spec for entry in entries})
    return Response(text, headers={"content-type": CONTENT_TYPE})


@router.post(
    "/tokenize",
    summary="Text to token ids",
    openapi_extra=document(TokenizeBody, {"prompt": "red cat>"}),
    responses=refused(408, 413, 422, 431, shape=Refusal | LoraxRefusal),
)
async def tokenize(request: Request) -> Response:
    """The ids that /generate would see. A body in LoRAX's form gets LoRAX's answer."""
    service, raw = service_of(request), await request.body()
    if lorax.spoken(raw):
        return await lorax.tokenize(request, raw)
    body = parse(TokenizeBody, raw)
    ids = await asyncio.to_thread(prompt_ids, body.prompt, service.text, service.info)
    return reply({"token_ids": ids, "count": len(ids)})


@router.post(
    "/detokenize",
    summary="Token ids to text",
    openapi_extra=document(DetokenizeBody, {"token_ids": [114, 101, 100]}),
    responses=refused(422),
)
async def detokenize(request: Request) -> dict[str, str]:
    """Special tokens have no text."""
    service = service_of(request)
    ids = parse(DetokenizeBody, await request.body()).token_ids
    wrong = next((id for id in ids if id >= service.info.vocab), None)
    if wrong is not None:
        raise InvalidRequest(f"token id {wrong} is not below {service.info.vocab}", param="token_ids")
    return {"text": service.text.decode(ids)}
