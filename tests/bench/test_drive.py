"""Where an engine runs decides what it is given."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapter_server.bench.drive import NEAR_TIE, NEAR_TIE_16, Setting, base_of, opened
from adapter_server.bench.workloads import many_loras
from adapter_server.config import EngineConfig


def test_on_cuda_adapters_are_in_the_bases_format_and_a_step_has_room_for_prompts() -> None:
    setting = Setting("cuda:1")
    config = replace(EngineConfig(), **setting.limits)
    assert (setting.dtype, setting.near) == (torch.bfloat16, NEAR_TIE_16)
    assert (config.adapter_dtype, config.max_step_tokens, config.prefix_cache_bytes) == ("base", 2048, 0)


def test_on_the_cpu_everything_is_as_it_is_by_default() -> None:
    setting = Setting()
    config = replace(EngineConfig(), **setting.limits)
    assert (setting.dtype, setting.near) == (torch.float32, NEAR_TIE)
    assert config.adapter_dtype == EngineConfig().adapter_dtype
    assert config.max_step_tokens == EngineConfig().max_step_tokens


def test_a_benchmark_may_ask_for_other_limits() -> None:
    with many_loras("tiny", 1, 2) as workload, opened(workload, Setting(), adapter_bytes=7 << 20, max_rows=3) as engine:
        assert (engine.config.adapter_bytes, engine.config.max_rows) == (7 << 20, 3)
        assert engine.config.prefix_cache_bytes == 0


def test_a_base_that_is_made_is_made_alike_each_time() -> None:
    with many_loras("tiny", 1, 2) as workload:
        in_place = replace(workload, size="8b")  # of the tiny one's shape
        one, other = (base_of(in_place, Setting()) for _ in range(2))
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
