"""Aliases: names of the operator's for adapters, switched in one step, and shares of requests for a new version."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from adapter_server.api import access
from adapter_server.api.described import KEYED, refused
from adapter_server.api.schemas import AdapterRef, MemberName, Parts, Strict, Unions, document, parse
from adapter_server.api.service import Service, service_of
from adapter_server.errors import AdapterNotFound, AdapterRefused, InvalidRequest, VersionConflict
from adapter_server.registry.aliases import Target, Targets

MOST_TARGETS = 8
router = APIRouter(prefix="/aliases", dependencies=[Depends(access.admin)], responses=KEYED)


class TargetBody(Strict):
    """One of the adapters that an alias shares requests out among."""

    name: MemberName
    share: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0


class AliasBody(Strict):
    """The body of PUT /aliases/{name}."""

    parts: ClassVar[Parts] = (TargetBody,)
    unions: ClassVar[Unions] = {"adapter": 'a name, or a list of {"name", "share"}'}

    adapter: AdapterRef | Annotated[list[TargetBody], Field(min_length=1, max_length=MOST_TARGETS)]

    @property
    def targets(self) -> Targets:
        if isinstance(self.adapter, str):
            return (Target(self.adapter),)
        return tuple(Target(body.name, body.share) for body in self.adapter)


@router.get("", summary="Every alias and where it leads")
async def list_aliases(request: Request) -> dict[str, Any]:
    """By name, as far as the key may use them."""
    service, caller = service_of(request), access.caller_of(request)
    known = sorted(service.aliases.all().items())
    return {"aliases": [_view(name, targets) for name, targets in known if caller.may_use(name)]}


@router.get("/{name}", summary="Where one leads", responses=refused(404))
async def show_alias(request: Request, name: str) -> dict[str, Any]:
    """As in the list."""
    return _view(name, _known(service_of(request), name))


@router.put(
    "/{name}",
    summary="Make an alias, or lead it elsewhere",
    openapi_extra=document(AliasBody),
    responses=refused(404, 409, 422, 424),
)
async def put_alias(request: Request, name: str) -> dict[str, Any]:
    """Requests from now on go there; those under way finish where they are."""
    service, body = service_of(request), parse(AliasBody, await request.body())
    access.caller_of(request).check([target.adapter for target in body.targets])
    await put(service, name, body.targets)
    return _view(name, body.targets)


@router.delete("/{name}", status_code=204, summary="Forget an alias", responses=refused(404))
async def delete_alias(request: Request, name: str) -> Response:
    """The adapters stay."""
    service = service_of(request)
    _known(service, name)
    await drop(service, name)
    return Response(status_code=204)


async def put(service: Service, name: str, targets: Targets) -> None:
    """Checks the name and where it is to lead, and makes it so."""
    async with service.changing:
        await asyncio.to_thread(_check, service, name, targets)
        await asyncio.to_thread(service.aliases.put, name, targets)


async def drop(service: Service, name: str) -> Targets:
    async with service.changing:
        return await asyncio.to_thread(service.aliases.drop, name)


def _check(service: Service, name: str, targets: Targets) -> None:
    if service.store.has(name) and all(target.adapter == name for target in targets):
        return  # vLLM's clients load an adapter by its own name
    try:
        service.store.check_name(name)
    except AdapterRefused as error:
        raise InvalidRequest(error.message, param="name") from None
    if name == service.info.model or service.store.has(name):
        raise VersionConflict(
            f"{name} is the name of an adapter or of the base: an alias takes no other's", param="name"
        )
    for target in targets:
        service.store.resolve(target.adapter)


def _known(service: Service, name: str) -> Targets:
    if targets := service.aliases.get(name):
        return targets
    raise AdapterNotFound("there is no alias of that name: GET /aliases lists them", param="name")


def _view(name: str, targets: Targets) -> dict[str, Any]:
    return {"name": name, "adapter": [{"name": target.adapter, "share": target.share} for target in targets]}
