"""Settings, each with its one default. Flags and environment variables are derived from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

GIB = 1 << 30
PACKAGE = Path(__file__).parent
DEMO_BASE = PACKAGE / "demo" / "base"
DEMO_ADAPTERS = (PACKAGE.parents[1] / "adapters", PACKAGE / "demo" / "adapters")  # a source tree, a wheel


def demo_adapters() -> Path:
    """The folder of the demo's adapters, wherever this package runs from."""
    return next((folder for folder in DEMO_ADAPTERS if folder.is_dir()), DEMO_ADAPTERS[-1])


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the base is held and rows are run."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "nf4", "fp4", "int8", "cpu-int8"] = "none"  # the base's Linears
    adapter_dtype: Literal["float32", "base"] = "float32"  # float32: PEFT's own rule over bases in fewer bits
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    max_model_len: int = 0  # tokens of context per row; 0: the base's own, or what leaves --kv-bytes room for 16 rows
    max_rows: int = 64  # rows that run at once
    max_step_tokens: int = 512  # token budget of one step, prefill chunks and decodes together
    max_waiting: int = 1024  # requests in the queue before 429
    max_waiting_tokens: int = 4 << 20  # of their prompts and answers, the same
    kv_bytes: int = 2 * GIB  # memory for keys and values
    kv_layout: Literal["auto", "slots", "pages"] = "auto"  # auto: slots on the CPU, pages on CUDA
    page_tokens: int = 16  # also the blocks in which beginnings of prompts are kept
    prefix_cache_bytes: int = GIB // 4  # for beginnings computed before: beside --kv-bytes, or 0: keep none
    adapter_bytes: int = 2 * GIB  # device memory for adapters and snapshots together
    auto_merge: bool = True  # mode auto may make a snapshot of the adapter that most rows ask for, where that pays
    host_bytes: int = 2 * GIB  # main memory for compiled adapters, on the device or evicted from it
    ring_bytes: int = 64 << 20  # CUDA: page-locked memory through which adapters reach the device; 0: none
    pack_weights: bool = True  # CPU float32: packed copies of the base's weights, faster and larger
    kernels: bool = True  # Triton's on CUDA, where they agree with torch; C's on the CPU in float32
    fuse: bool = True  # modules of the base in few kernels, where they agree with their own forward
    graphs: bool = True  # CUDA: steps in which every row gets one token as captured graphs
    max_grammar_bytes: int = 32 << 10  # of one response_format
    threads: int = 0  # torch threads on the CPU; 0: torch's own choice, one for a base under 8M parameters
    profile: str | None = None  # a file for a trace of some steps


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the service listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    adapters: str = "./adapters"
    engine_process: Literal["auto", "on", "off"] = "auto"  # the engine in a process of its own; auto: on CUDA
    max_adapter_bytes: int = 4 * GIB  # of one adapter's weights
    strict_base: bool = False  # refuse adapters that name another base
    max_uploads: int = 2  # at once; each may take max_adapter_bytes of memory and of temporary disk
    keep_versions: int = 5  # published versions of each adapter
    preload: tuple[str, ...] = ()  # adapters, or aliases, that are in memory before the first request
    preload_pinned: bool = False
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 64 << 10
    body_timeout_s: float = 30.0  # for a request's body to come; for an upload, between two parts of it
    stream_buffer_tokens: int = 16_384  # that wait for a client that does not read its stream
    write_timeout_s: float = 60.0  # for a client to take some of its answer
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    insecure: bool = False
    api_key: tuple[str, ...] = field(default=(), repr=False)  # any of them may ask; none: everybody may
    admin_key: tuple[str, ...] = field(default=(), repr=False)  # for the adapters' routes
    api_keys_file: str | None = None  # more keys, each with its rights and limits
    cors_origin: tuple[str, ...] = ()  # whose pages may ask from a browser
    adapter_chat_templates: bool = False
    gateway_metrics: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"
