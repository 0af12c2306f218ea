"""What is measured: bases by size, adapters by kind, prompts, and who asks for which adapter.

demo   the base that comes with the package, and its trained adapters
tiny, 35m, 200m   Llama shapes with random weights and real PEFT adapters, made on the spot from a seed
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapter_server.config import DEMO_BASE, demo_adapters
from adapter_server.errors import InvalidRequest

Popularity = Literal["identical", "distinct", "uniform", "skewed"]
ZIPF = 1.5  # Punica's skew (arXiv 2310.18547)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VIRTUAL_TOKENS = 16
FIRST_TOKEN = 3  # prompts leave out the ids below, which are special in most vocabularies


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @classmethod
    def read(cls, model: Path) -> Shape:
        """The sizes that a model folder states."""
        config = json.loads((model / "config.json").read_text())
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return cls(*(config[name] for name in (*names, "intermediate_size", "vocab_size")))


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 96, 256),
    "35m": Shape(512, 8, 8, 8, 1408, 8192),
    "200m": Shape(1024, 16, 16, 16, 2816, 8192),
}
SIZES = ("demo", *SHAPES)


@dataclass(frozen=True, slots=True)
class Workload:
    """A base on disk, a folder of adapters, and which adapter stands for each kind."""

    size: str
    model: Path
    adapters: Path
    kinds: Mapping[str, str]
    shape: Shape


def lora(rank: int, **options: Any) -> Any:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM", **options)


def kinds() -> dict[str, Any]:
    """The configs of the latency table, one per kind."""
    return {
        "lora-r8": lora(8),
        "dora-r8": lora(8, use_dora=True),
        "ia3": IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "prefix": PrefixTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM"),
    }


@contextmanager
def one_of_each(size: str, seed: int = 0) -> Iterator[Workload]:
    """A base of this size with one adapter of each kind."""
    if size == "demo":
        yield _demo()
        return
    with random_base(size, seed) as (model, adapters):
        for i, (kind, config) in enumerate(kinds().items()):
            save_adapters(model, config, [adapters / kind], seed + i)
        yield Workload(size, model, adapters, {kind: kind for kind in kinds()}, SHAPES[size])


@contextmanager
def many_loras(size: str, count: int, rank: int = 16, seed: int = 0) -> Iterator[Workload]:
    """A random base with `count` LoRA adapters of one rank on all linears, `lora-0`, `lora-1`, …"""
    with random_base(size, seed) as (model, adapters):
        names = [f"lora-{i}" for i in range(count)]
        save_adapters(model, lora(rank), [adapters / name for name in names], seed)
        yield Workload(size, model, adapters, {name: name for name in names}, SHAPES[size])


@contextmanager
def random_base(size: str, seed: int) -> Iterator[tuple[Path, Path]]:
    """(model folder, an empty folder for adapters), both gone afterwards."""
    if size not in SHAPES:
        raise InvalidRequest(f"there is no random base of size {size!r}: choose one of {', '.join(SHAPES)}")
    with TemporaryDirectory(prefix="adapter-server-bench-") as root:
        model, adapters = Path(root, "base"), Path(root, "adapters")
        _llama(SHAPES[size], seed).save_pretrained(model)
        _tokenizer(SHAPES[size].vocab).save_pretrained(model)
        yield model, adapters


def _llama(shape: Shape, seed: int) -> Any:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def _tokenizer(vocab: int) -> Any:
    """One word per id, so that a server has something to decode with."""
    words = {f"t{i}": i for i in range(vocab)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")))


def save_adapters(model: Path, config: Any, folders: list[Path], seed: int) -> None:
    """PEFT adapters of one config over one base, each with random weights of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        peft = get_peft_model(LlamaForCausalLM.from_pretrained(model, dtype=torch.float32), config)
        fresh = {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}
        for i, folder in enumerate(folders):
            noise = torch.Generator().manual_seed(1000 * seed + i)
            for name, param in peft.named_parameters():
                if name in fresh:
                    param.data = _random(name, fresh[name], noise)
            peft.save_pretrained(folder)


def _random(name: str, fresh: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Large enough to be seen in the tokens, small enough to leave the base's scale."""
    noise = torch.randn(fresh.shape, generator=generator)
    if "magnitude" in name or "ia3_l" in name:
        return fresh * (1 + 0.2 * noise)
    return fresh + 0.5 * noise if "prompt_encoder" in name else 0.02 * noise


def _demo() -> Workload:
    adapters = demo_adapters()
    if not DEMO_BASE.is_dir():
        raise InvalidRequest(f"the demo's base is not installed: choose a --size of {', '.join(SHAPES)}")
    return Workload("demo", DEMO_BASE, adapters, demo_kinds(adapters), Shape.read(DEMO_BASE))


def demo_kinds(adapters: Path) -> dict[str, str]:
    """The first trained adapter of each kind, by name."""
    found: dict[str, str] = {}
    for path in sorted(adapters.glob("*/adapter_config.json")):
        if kind := _kind(json.loads(path.read_text())):
            found.setdefault(kind, path.parent.name)
    return found


def _kind(config: Mapping[str, Any]) -> str | None:
    if config["peft_type"] == "LORA":
        if config.get("rank_pattern") or config.get("use_rslora") or config.get("r") != 8:
            return None
        return "dora-r8" if config.get("use_dora") else "lora-r8"
    return {"IA3": "ia3", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}.get(config["peft_type"])


def prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random token ids; the first prompts of a longer list are those of a shorter one."""
    draw = random.Random(seed)
    return [tuple(draw.randrange(FIRST_TOKEN, vocab) for _ in range(length)) for _ in range(count)]


def choose(law: Popularity, rows: int, adapters: int, seed: int = 0) -> list[int]:
    """Which adapter each row asks for.

    identical   all the first            distinct   each its own
    uniform     each equally often       skewed     the k-th with probability ∝ k^−1.5
    """
    if law == "identical":
        return [0] * rows
    if law == "distinct" and adapters < rows:
        raise InvalidRequest(f"{rows} rows with an adapter each need {rows} adapters, there are {adapters}")
    if law != "skewed":
        return [i % adapters for i in range(rows)]
    weights = [(k + 1) ** -ZIPF for k in range(adapters)]
    return random.Random(seed).choices(range(adapters), weights, k=rows)
