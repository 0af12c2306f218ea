"""vLLM's two routes for adapters: a name of the caller's for a folder of the registry, and its end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from adapter_server.api import access, aliases
from adapter_server.api.described import PLAIN, refused
from adapter_server.api.refusals import error_shape, speak
from adapter_server.api.schemas import AdapterRef, Body, Lenient, document, parse
from adapter_server.api.service import Service, note, service_of
from adapter_server.core import Spec
from adapter_server.errors import AdapterNotFound, AdapterServerError, InvalidRequest
from adapter_server.registry.aliases import Target

TYPES = {400: "InvalidUserInput", 404: "NotFoundError"}
MISSHAPEN = "Bad Request"  # what vLLM says of a body that is no such body
BOTH = "Both 'lora_name' and 'lora_path' must be provided."
TAKEN = "has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."


class Misshapen(InvalidRequest):
    """The body is no JSON, or lacks a field, or has one of another type."""


def worded(error: AdapterServerError) -> tuple[int, dict[str, Any]]:
    """A refusal in vLLM's types; what the caller can mend is a 400."""
    content = error_shape(error)
    status = 400 if error.status == 422 else error.status
    kind = MISSHAPEN if isinstance(error, Misshapen) else TYPES.get(status)
    content["error"]["type"] = kind or content["error"]["type"]
    return status, content


async def _speak(request: Request) -> None:
    speak(request, worded)


router = APIRouter(
    prefix="/v1",
    dependencies=[Depends(_speak), Depends(access.admin)],
    default_response_class=Response,
    responses=PLAIN | refused(400, 401, 404, 424, 503),
)


class LoadBody(Lenient):
    """The body of POST /v1/load_lora_adapter. A path may be relative to the adapters folder."""

    lora_name: AdapterRef
    lora_path: Annotated[str, Field(max_length=4096)]
    load_inplace: bool = False


class UnloadBody(Lenient):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: AdapterRef


@router.post("/load_lora_adapter", summary="As vLLM loads", openapi_extra=document(LoadBody))
async def load(request: Request) -> Response:
    """Answers once the adapter is in memory; its name is known from then on, until it is unloaded."""
    service, body = service_of(request), _parsed(LoadBody, await request.body())
    service.check_open()
    access.caller_of(request).check([body.lora_name, Path(body.lora_path).name], "lora_name")
    if not body.lora_name or not body.lora_path:
        raise InvalidRequest(BOTH, param="lora_path" if body.lora_name else "lora_name")
    _check_free(service, body)
    spec = await asyncio.to_thread(_found, service, body)
    await asyncio.wrap_future(service.worker.call("load", spec))
    _check_free(service, body)  # another may have been quicker
    await aliases.put(service, body.lora_name, (Target(spec.name),))
    note(request, x_adapter=spec.name, x_adapter_version=spec.version)
    return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")


@router.post("/unload_lora_adapter", summary="As vLLM unloads", openapi_extra=document(UnloadBody))
async def unload(request: Request) -> Response:
    """The name is unknown from now on. The adapter leaves the memory once no row runs on it, unless it is pinned."""
    service, name = service_of(request), _parsed(UnloadBody, await request.body()).lora_name
    if not name:
        raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
    access.caller_of(request).check([name], "lora_name")
    led = {target.name for target in await aliases.drop(service, name)}
    if not led:
        raise AdapterNotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
    for folder in led - {target.name for targets in service.aliases.all().values() for target in targets}:
        await _let_go(service, folder)
    return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")


def _parsed(model: type[Body], raw: bytes) -> Body:
    try:
        return parse(model, raw)
    except InvalidRequest as error:
        raise Misshapen(error.message, param=error.param) from None


def _found(service: Service, body: LoadBody) -> Spec:
    """The folder meant, if it is one of the registry's and may bear another name."""
    root = service.store.root.resolve()
    try:
        folder = (root / body.lora_path).resolve()
        if folder.parent != root:
            raise AdapterNotFound("")
        spec = service.store.resolve(folder.name)
    except (AdapterNotFound, ValueError):  # a path with a null byte is none
        where = "give the path of a folder inside the adapters folder"
        message = f"Loading lora {body.lora_name} failed: No adapter found for {body.lora_path}: {where}"
        raise AdapterNotFound(message, param="lora_path") from None
    _check_name(service, body, spec)
    return spec


def _check_name(service: Service, body: LoadBody, spec: Spec) -> None:
    name = body.lora_name
    if name == service.info.model:
        raise InvalidRequest(f"The lora adapter '{name}' conflicts with a served base model.", param="lora_name")
    if name == spec.name:
        return
    try:
        service.store.check_name(name)
    except AdapterServerError as error:
        raise InvalidRequest(error.message, param="lora_name") from None
    if Path(service.store.root, name).exists():
        raise InvalidRequest(f"The lora adapter '{name}' conflicts with a folder of that name.", param="lora_name")


def _check_free(service: Service, body: LoadBody) -> None:
    if service.aliases.get(body.lora_name) and not body.load_inplace:
        raise InvalidRequest(f"The lora adapter '{body.lora_name}' {TAKEN}", param="lora_name")


async def _let_go(service: Service, folder: str) -> None:
    held = [r for r in service.worker.stats().residents if r.name == folder and not r.pinned]
    for resident in held:
        spec = Spec(folder, resident.version, "", resident.family, {}, 0)
        await asyncio.wrap_future(service.worker.call("unload", spec))
