"""The files for llama-server hold the base and its adapters, in llama.cpp's names and order."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapter_server.bench.workloads import many_loras
from adapter_server.errors import BaseNotSupported


def test_rotary_pairs_stand_next_to_each_other(llama: ModuleType) -> None:
    rows = np.arange(8.0)[:, None]  # two heads of four: halves 0 1 | 2 3
    assert llama.rotated(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_files_hold_every_tensor(llama: ModuleType, tmp_path: Path) -> None:
    with many_loras("tiny", 1, 2) as made:
        llama.write_base(made, tmp_path / "base.gguf")
        llama.write_adapter(made.adapters / "lora-0", tmp_path / "lora.gguf", made.shape)
        weights = load_file(made.model / "model.safetensors")
        sides = load_file(made.adapters / "lora-0" / "adapter_model.safetensors")
    base = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    adapter = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    assert len(base) == len(weights)
    assert len(adapter) == len(sides)
    down = "model.layers.1.mlp.down_proj"
    assert np.array_equal(base["blk.1.ffn_down.weight"], weights[f"{down}.weight"])
    assert np.array_equal(adapter["blk.1.ffn_down.weight.lora_b"], sides[f"base_model.model.{down}.lora_B.weight"])
    assert adapter["blk.0.attn_q.weight.lora_a"].shape == (2, 64)


def test_scores_of_rotated_weights_are_those_of_the_base(llama: ModuleType) -> None:
    """q·k after rotating pairs (llama.cpp's order) equals q·k after rotating halves (transformers')."""
    dim, position = 8, 3.0
    q, k = (np.random.default_rng(i).normal(size=(dim, 4)) for i in (1, 2))
    x, angles = np.ones(4), position * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles), np.sin(angles)

    def halves(v: np.ndarray) -> np.ndarray:
        a, b = v[: dim // 2], v[dim // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])

    def pairs(v: np.ndarray) -> np.ndarray:
        a, b = v[::2], v[1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], 1).reshape(-1)

    own = halves(q @ x) @ (k @ x)
    theirs = pairs(llama.rotated(q, 1) @ x) @ (llama.rotated(k, 1) @ x)
    assert theirs == pytest.approx(own)


FAKE = """import http.server, json, sys
loras = sys.argv[sys.argv.index("--lora") + 1].split(",")
assert "--lora-init-without-apply" in sys.argv
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self): self.say({"/lora-adapters": loras[:TAKES], "/props": {"build_info": "b1"}}.get(self.path, {}))
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (one,) = asked["lora"]
        tokens = [asked["prompt"][0] + (one["id"] + 1) * int(one["scale"])] * asked["n_predict"]
        self.say({"tokens": tokens, "timings": {"predicted_per_token_ms": 7.5}})
    def say(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
at = sys.argv.index("--port")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[at + 1])), Handler).serve_forever()
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, takes: int) -> None:
    """A server with the routes and fields that llama-server's documentation names. It takes so many adapters."""
    binary = folder / "llama-server"
    binary.write_text(f"#!{sys.executable}\n{FAKE.replace('TAKES', str(takes))}")
    binary.chmod(0o755)
    monkeypatch.setenv("LLAMA_SERVER", str(binary))


def test_each_request_names_its_adapter_alone(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, takes=2)
    with many_loras("tiny", 2, 2) as made, llama.llama_server(made, ["lora-0", "lora-1"], 3, 16, 1) as running:
        assert running.batch([[10], [20], [30]], [0, 1, None], 2) == [(11, 11), (22, 22), (30, 30)]
        assert running.ms_per_token([10], 4) == 7.5
        assert running.version == "b1"


def test_a_build_that_takes_only_some_adapters_is_refused(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, takes=1)
    with (
        many_loras("tiny", 2, 2) as made,
        pytest.raises(BaseNotSupported, match="took 1 of 2 adapters"),
        llama.llama_server(made, ["lora-0", "lora-1"], 3, 16, 1),
    ):
        pass


def test_a_binary_that_does_not_start_is_said(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\necho no such model; exit 1\n")
    binary.chmod(0o755)
    monkeypatch.setenv("LLAMA_SERVER", str(binary))
    with (
        many_loras("tiny", 1, 2) as made,
        pytest.raises(BaseNotSupported, match="no such model"),
        llama.llama_server(made, ["lora-0"], 1, 16, 1),
    ):
        pass
