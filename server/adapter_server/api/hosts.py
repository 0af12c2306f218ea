"""Which addresses a server may listen on, by who could reach them there."""

from __future__ import annotations

import ipaddress

from adapter_server.config import ServerConfig
from adapter_server.errors import InvalidRequest


def guards_host(config: ServerConfig) -> bool:
    """With keys a page elsewhere gains nothing: it has none."""
    return is_loopback(config.host) and not _has_keys(config) and not config.insecure


def _has_keys(config: ServerConfig) -> bool:
    return bool(config.api_key or config.api_keys_file)


def check_host(config: ServerConfig) -> None:
    """Without keys only this machine may ask, unless somebody says otherwise."""
    if config.insecure or _has_keys(config) or is_loopback(config.host):
        return
    raise InvalidRequest(
        f"{config.host} is not a loopback address and anybody who reaches it could use this server: "
        "listen on 127.0.0.1, or set --api-key, or add --insecure if the network is trusted",
        param="host",
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
