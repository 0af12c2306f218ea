"""Notices new, changed and removed adapters while the server runs.

Two senses, neither trusted alone: the system's notices wake a scan at once, and a scan each second finds what no notice
told of (network file systems, a spent notice quota, a root that was replaced).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from watchfiles import awatch

from adapter_server.errors import AdapterUnavailable
from adapter_server.registry.store import Changes, Store

POLL_S = 1.0
NOTICE_RETRY_S = 5.0
GATHER_MS = 100  # notices closer than this wake one scan
LEAST_S = 0.05
REST = 4  # times as long as a scan took is the pause after it, unless a notice comes: thousands of folders take no core


async def watch(store: Store, on_change: Callable[[Changes], None], stop: asyncio.Event) -> None:
    """Calls `on_change` with what a scan found, until `stop` is set. A failing disk is reported once and waited out."""
    nudge = asyncio.Event()
    over = asyncio.ensure_future(stop.wait())
    notices = asyncio.ensure_future(_notice(store.root, nudge))
    failure = None
    try:
        while not stop.is_set():
            started = time.monotonic()
            changes = await asyncio.to_thread(_refresh, store)
            rest = REST * (time.monotonic() - started)
            if changes and (changes.error is None or changes.error != failure):
                on_change(changes)
            failure = changes.error
            await _pause(nudge, over, max(rest, store.settle_s, LEAST_S) if store.restless else max(rest, POLL_S))
    finally:
        over.cancel()
        notices.cancel()
        await asyncio.gather(over, notices, return_exceptions=True)


def _refresh(store: Store) -> Changes:
    try:
        return store.refresh()
    except AdapterUnavailable as error:
        return Changes(error=error.message)


async def _notice(root: Path, nudge: asyncio.Event) -> None:
    """Sets `nudge` at every notice below root. Without notices the scan each second does."""
    while True:
        try:
            async for _ in awatch(root, watch_filter=None, debounce=GATHER_MS, ignore_permission_denied=True):
                nudge.set()
        except (OSError, RuntimeError):  # no such folder yet, no notices left, or a file system without them
            nudge.set()
        await asyncio.sleep(NOTICE_RETRY_S)


async def _pause(nudge: asyncio.Event, over: asyncio.Task[Any], seconds: float) -> None:
    """Until a nudge, the end, or so many seconds."""
    woken: asyncio.Task[Any] = asyncio.ensure_future(nudge.wait())
    try:
        await asyncio.wait({woken, over}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        woken.cancel()
        nudge.clear()
