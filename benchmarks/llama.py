"""llama-server as a rival: the base and its LoRA adapters as GGUF files in float32, and requests to its /completion.

LLAMA_SERVER names the binary. The files are written here with the package gguf: tensors are renamed, and the rows of q
and k put into llama.cpp's order of rotary pairs. Its vocabulary is made up, since prompts are token ids.
All else is as llama-server has it by default: keys and values in float16, for one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import httpx
import numpy as np
from safetensors.numpy import load_file

from adapter_server.bench.workloads import Shape, Workload
from adapter_server.errors import BaseNotSupported, RequestFailed

LLAMA = "llama-server f32"
START_S = 120.0
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def place(module: str) -> str:
    """GGUF's name of a module of a Llama."""
    if module in TOP:
        return TOP[module]
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{PLACES[rest]}"


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads · dim, …] of q or k: halves of a head become pairs, as llama.cpp rotates them."""
    dim = weight.shape[0] // heads
    return weight.reshape(heads, 2, dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _ordered(name: str, weight: np.ndarray, shape: Shape) -> np.ndarray:
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(name.rpartition(".")[2])
    return np.ascontiguousarray(weight if heads is None else rotated(weight, heads))


def write_base(workload: Workload, path: Path) -> None:
    """The base as GGUF."""
    shape, config = workload.shape, json.loads((workload.model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_vocabulary(writer, shape.vocab)
    for name, weight in load_file(workload.model / "model.safetensors").items():
        own = place(name.removesuffix(".weight"))
        writer.add_tensor(f"{own}.weight", _ordered(own, weight.astype(np.float32), shape))
    _write(writer)


def _add_vocabulary(writer: gguf.GGUFWriter, vocab: int) -> None:
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (vocab - len(kinds))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_adapter(folder: Path, path: Path, shape: Shape) -> None:
    """A LoRA adapter as PEFT saved it, as GGUF."""
    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        own = place(module)
        tensor = weight.astype(np.float32)
        tensor = _ordered(own, tensor, shape) if side == "B" else np.ascontiguousarray(tensor)
        writer.add_tensor(f"{own}.weight.lora_{side.lower()}", tensor)
    _write(writer)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaServer:
    """A running llama-server."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.version = str(http.get("/props").json().get("build_info", "of unknown version"))

    def batch(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[int | None], new: int
    ) -> list[tuple[int, ...]]:
        """All requests at once; each gives its tokens."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda asked: self._ask(*asked, new), zip(prompts, adapters, strict=True)))
        return [tuple(answer["tokens"]) for answer in answers]

    def ms_per_token(self, prompt: Sequence[int], new: int) -> float:
        """One stream on the first adapter, by the server's own clock."""
        return float(self._ask(prompt, 0, new)["timings"]["predicted_per_token_ms"])

    def _ask(self, prompt: Sequence[int], adapter: int | None, new: int) -> dict[str, Any]:
        """Without a list of its own a request gets every adapter, so that the base asks for one at scale 0."""
        body = {
            "prompt": list(prompt),
            "n_predict": new,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": [{"id": adapter or 0, "scale": 0.0 if adapter is None else 1.0}],
        }
        answer = self.http.post("/completion", json=body)
        if answer.is_error:
            raise RequestFailed(f"llama-server refused: {answer.text[:200]}")
        found: dict[str, Any] = answer.json()
        return found


@contextmanager
def llama_server(
    workload: Workload, names: Sequence[str], rows: int, length: int, threads: int
) -> Iterator[LlamaServer]:
    """llama-server over the base and these adapters. Raises BaseNotSupported where it does not start."""
    with TemporaryDirectory(prefix="adapter-server-llama-") as folder:
        base = Path(folder, "base.gguf")
        write_base(workload, base)
        files = [Path(folder, f"{name}.gguf") for name in names]
        for name, file in zip(names, files, strict=True):
            write_adapter(workload.adapters / name, file, workload.shape)
        port = _free_port()
        loras = ["--lora", ",".join(map(str, files)), "--lora-init-without-apply"]
        command = [os.environ["LLAMA_SERVER"], "-m", str(base), *loras]
        command += ["-t", str(threads), "-np", str(rows), "-c", str(rows * (length + 16)), "--port", str(port)]
        with (
            open(Path(folder, "log"), "w+") as log,
            subprocess.Popen(command, stdout=log, stderr=log) as process,
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as http,
        ):
            try:
                _wait(process, http, Path(folder, "log"))
                _all_there(http, len(files))
                yield LlamaServer(http)
            finally:
                process.terminate()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _all_there(http: httpx.Client, count: int) -> None:
    """It must not be compared with fewer adapters than ours has."""
    if (found := len(http.get("/lora-adapters").json())) != count:
        raise BaseNotSupported(f"this build of llama-server took {found} of {count} adapters: take a newer one")


def _wait(process: subprocess.Popen[bytes], http: httpx.Client, log: Path) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
        time.sleep(0.1)
    raise BaseNotSupported(f"llama-server did not start: {log.read_text()[-500:]}")
