"""The adapters: what there is and where, loading, pinning and merging them, publishing, going back and deleting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast, get_args

import structlog
from fastapi import APIRouter, Depends, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from adapter_server.api import access
from adapter_server.api.bridge import Operation, Usage
from adapter_server.api.described import KEYED, refused
from adapter_server.api.service import Service, note, service_of
from adapter_server.core import TIERS, Resident, Spec, Tier
from adapter_server.errors import (
    AdapterRefused,
    AdapterServerError,
    DeadlineExceeded,
    InvalidRequest,
    NotMergeable,
    QueueFull,
    VersionConflict,
)
from adapter_server.families import lane_of
from adapter_server.registry import guard, versions
from adapter_server.registry.publish import Publisher
from adapter_server.registry.store import Entry

FILES = (guard.CONFIG, guard.WEIGHTS)
FORM = {
    "type": "object",
    "required": list(FILES),
    "properties": {file: {"type": "string", "format": "binary"} for file in FILES},
}
HOW = f"send both files as multipart/form-data: curl -X PUT {' '.join(f'-F {file}=@{file}' for file in FILES)}"
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}
log = structlog.get_logger()
router = APIRouter(prefix="/adapters", dependencies=[Depends(access.admin)], responses=KEYED)


@router.get("", summary="Every adapter and its state")
async def list_adapters(request: Request) -> dict[str, Any]:
    """What is in the registry, joined with what the engine holds."""
    service, caller = service_of(request), access.caller_of(request)
    entries = [entry for entry in await asyncio.to_thread(service.store.entries) if caller.may_use(entry.name)]
    held = residents_by_name(service.worker.stats().residents)
    views = [_view(service, entry, held.get(entry.name, [])) for entry in entries]
    return {"base": service.info.model, "adapters": views}


@router.get("/{name}", summary="One adapter and its versions", responses=refused(404, 422, 424))
async def show_adapter(request: Request, name: str) -> dict[str, Any]:
    """The same for one, with every version that is served or still held."""
    return await _show(service_of(request), name)


@router.put(
    "/{name}",
    status_code=201,
    summary="Publish a new version",
    openapi_extra=UPLOAD,
    responses=refused(409, 422, 424, 429, 503, 504),
)
async def publish(request: Request, name: str) -> dict[str, Any]:
    """Both files as multipart; checked whole, and compiled, before anybody sees it."""
    service = service_of(request)
    service.check_open()
    _check_no_alias(service, name)
    with _slot(service):
        spec = await _published(request, service, name)
    note(request, x_adapter=spec.name, x_adapter_version=spec.version)
    return await _show(service, spec.name)


@router.post("/{name}/rollback", summary="Go back to the version before", responses=refused(404, 409, 422, 424))
async def rollback(request: Request, name: str) -> dict[str, Any]:
    """Requests from now on get the version before; those under way finish on theirs."""
    service = service_of(request)
    spec = await asyncio.to_thread(_publisher(service).rollback, name)
    note(request, x_adapter=spec.name, x_adapter_version=spec.version)
    return await _show(service, spec.name)


@router.delete(
    "/{name}", status_code=204, summary="Take an adapter out of the registry", responses=refused(404, 409, 422)
)
async def delete(request: Request, name: str) -> Response:
    """The name and all its versions go; requests under way finish."""
    await asyncio.to_thread(_publisher(service_of(request)).delete, name)
    return Response(status_code=204)


@router.post(
    "/{name}/{operation}",
    summary="Load, unload, pin, unpin, merge or unmerge",
    responses=refused(404, 409, 422, 424, 503),
)
async def operate(request: Request, name: str, operation: str) -> dict[str, Any]:
    """Answers once it is done, with the adapter as it is then."""
    service = service_of(request)
    if operation not in get_args(Operation):
        raise HTTPException(404)
    service.check_open()
    spec = await asyncio.to_thread(service.store.resolve, name)
    note(request, x_adapter=spec.name, x_adapter_version=spec.version)
    try:
        await asyncio.wrap_future(service.worker.call(cast(Operation, operation), spec))
    except NotMergeable as error:
        conflict = NotMergeable(error.message, param=error.param)  # a copy: requests may wait for the same fold
        conflict.status = 409
        raise conflict from error
    return await _show(service, spec.name)


def residents_by_name(residents: Iterable[Resident]) -> dict[str, list[Resident]]:
    """What the engine holds, a list of versions for each name."""
    held: dict[str, list[Resident]] = {}
    for resident in residents:
        held.setdefault(resident.name, []).append(resident)
    return held


async def drop(service: Service, name: str, current: Spec | None) -> None:
    """Lets go of every version but the current one; a pin goes on to that. Rows that run finish first."""
    held = residents_by_name(service.worker.stats().residents).get(name, [])
    kept = await asyncio.to_thread(service.aliased, name) | ({current.version} if current else set())
    for old in (resident for resident in held if resident.version not in kept):
        spec = Spec(name, old.version, "", old.family, {}, 0)
        if old.pinned and current is not None:
            await _pin(service, current)
        if old.pinned:
            await asyncio.wrap_future(service.worker.call("unpin", spec))
        await asyncio.wrap_future(service.worker.call("unload", spec))


def _check_no_alias(service: Service, name: str) -> None:
    if service.aliases.get(name) and not service.store.has(name):
        raise VersionConflict(f"{name} is an alias: delete it first, or publish under another name", param="name")


async def _pin(service: Service, spec: Spec) -> None:
    try:
        await asyncio.wrap_future(service.worker.call("pin", spec))
    except AdapterServerError as error:
        log.warning("the pin is lost", adapter=spec.name, version=spec.version, reason=error.message)


def _publisher(service: Service) -> Publisher:
    return Publisher(service.store, service.needed, service.config.keep_versions)


@contextmanager
def _slot(service: Service) -> Iterator[None]:
    """One of the few uploads that may be under way: what they take of memory and disk is bounded."""
    if service.uploads >= service.config.max_uploads:
        raise QueueFull(f"{service.uploads} uploads are under way, which is the limit: retry", retry_after=5)
    service.uploads += 1
    try:
        yield
    finally:
        service.uploads -= 1


async def _published(request: Request, service: Service, name: str) -> Spec:
    try:
        async with asyncio.timeout(service.config.request_timeout_s):  # one that stalls gives its place up
            form = await _form(request)
    except TimeoutError:
        raise DeadlineExceeded("the upload took too long: send it faster, or raise --request-timeout-s") from None
    try:
        config, weights = (_part(form, file) for file in FILES)
        raw = await config.read(guard.MAX_CONFIG_BYTES + 1)
        return await asyncio.to_thread(_publisher(service).publish, name, raw, weights.file, "upload")
    except AdapterRefused as refused:
        refused.status = 422
        raise
    finally:
        await form.close()


async def _form(request: Request) -> FormData:
    """The parts, the large ones in files that go with them."""
    try:
        return await request.form(max_files=len(FILES), max_fields=len(FILES))
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidRequest(f"the body is no such form ({error.detail}): {HOW}") from error


def _part(form: FormData, file: str) -> UploadFile:
    part = form.get(file)
    if isinstance(part, UploadFile):
        return part
    raise InvalidRequest(f"{file} is missing; {HOW}", param=file)


async def _show(service: Service, name: str) -> dict[str, Any]:
    entries = await asyncio.to_thread(service.store.entries)
    entry = next((entry for entry in entries if entry.name == name), None)
    if entry is None or entry.reason is None:
        spec = await asyncio.to_thread(service.store.resolve, name)
        entry = Entry(spec.name, spec)
    held = residents_by_name(service.worker.stats().residents).get(entry.name, [])
    return _view(service, entry, held) | {"versions": await asyncio.to_thread(_versions, service, entry, held)}


def _view(service: Service, entry: Entry, held: list[Resident]) -> dict[str, Any]:
    spec, usage = entry.spec, service.bridge.usage.get(entry.name, Usage())
    version = spec.version if spec else ""
    now = next((resident for resident in held if resident.version == version), None)
    return {
        "name": entry.name,
        "family": spec.family if spec else None,
        "state": _state(entry, now),
        "reason": entry.reason or (now.error if now else None),
        "warning": service.store.warning(spec) if spec else None,
        "version": version or None,
        "rank": now.rank if now else None,
        "bytes": spec.bytes if spec else 0,
        "device_bytes": now.bytes if now else 0,
        "snapshot_bytes": now.snapshot_bytes if now else 0,
        "host_bytes": now.host_bytes if now else 0,
        "tiers": _tiers(now),
        "pinned": bool(now and now.pinned),
        "merged": bool(now and now.snapshot_bytes),
        "lane": lane_of(spec, service.info.lane) if spec else service.info.lane,
        "running": sum(resident.running for resident in held),
        "waiting": sum(resident.waiting for resident in held),
        "served": usage.served,
        "last_used": usage.last_used,
    }


def _tiers(now: Resident | None) -> list[Tier]:
    held: dict[Tier, object] = {"disk": True, "host": now and now.host_bytes, "device": now and now.state == "ready"}
    return [tier for tier in TIERS if held[tier]]


def _state(entry: Entry, now: Resident | None) -> str:
    if entry.reason is not None:
        return "failed"
    return now.state if now else "registered"


def _versions(service: Service, entry: Entry, held: list[Resident]) -> list[dict[str, Any]]:
    """The current one, those published before, newest first, and what is held of others."""
    published = {version.id: version for version in reversed(service.store.versions(entry.name))}
    current = versions.linked(service.store.root, entry.name) or (entry.spec.version if entry.spec else "")
    states = {resident.version: resident.state for resident in held}
    known = dict.fromkeys([*filter(None, [current]), *published, *states])
    return [
        {"version": id, "current": id == current, "state": states.get(id, "registered")} | _history(published.get(id))
        for id in known
    ]


def _history(version: versions.Version | None) -> dict[str, Any]:
    """What the manifest says; a folder copied by hand has none."""
    if version is None:
        return {}
    shown = ("number", "time", "source", "family", "base", "peft_version")
    return {name: getattr(version, name) for name in shown} | {"bytes": version.size}
