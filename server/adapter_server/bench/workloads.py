"""What is measured: bases by size, adapters by kind, prompts, who asks for which adapter, and when.

demo                    the base that comes with the package, and its trained adapters
tiny, 35m, 200m         random weights, written to a folder, and real PEFT adapters, made on the spot from a seed
0.6b, 1b, 8b            the same, but the weights are made on the device and lie in no file

0.6b, 1b and 8b have the sizes of Qwen3-0.6B, Llama-3.2-1B and Llama-3.1-8B, as a Llama.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from adapter_server.config import DEMO_BASE, demo_adapters
from adapter_server.errors import InvalidRequest

Popularity = Literal["identical", "distinct", "uniform", "skewed"]
ZIPF = 1.5  # Punica's skew (arXiv 2310.18547)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # what S-LoRA's adapters touch
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
VIRTUAL_TOKENS = 16
REDUCTION = 16  # of a bottleneck
BLOCKS = ("attention_adapters", "output_adapters")  # where AdapterHub keeps them
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
    head_dim: int
    tied: bool = False

    @classmethod
    def read(cls, model: Path) -> Shape:
        """The sizes that a model folder states."""
        config = json.loads((model / "config.json").read_text())
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        hidden, layers, heads, kv_heads, mlp, vocab = (
            config[name] for name in (*names, "intermediate_size", "vocab_size")
        )
        dim = config.get("head_dim") or hidden // heads
        return cls(hidden, layers, heads, kv_heads, mlp, vocab, dim, bool(config.get("tie_word_embeddings")))


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 96, 256, 16),
    "35m": Shape(512, 8, 8, 8, 1408, 8192, 64),
    "200m": Shape(1024, 16, 16, 16, 2816, 8192, 64),
    "0.6b": Shape(1024, 28, 16, 8, 3072, 151936, 128, tied=True),
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, 64, tied=True),
    "8b": Shape(4096, 32, 32, 8, 14336, 128256, 128),
}
IN_PLACE = ("0.6b", "1b", "8b")  # too large to write and read again
Weight = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]  # (name, as PEFT begins, a generator)
Filed = Literal["float32", "bfloat16"]
Size = Literal["demo", "tiny", "35m", "200m", "0.6b", "1b", "8b"]


@dataclass(frozen=True, slots=True)
class Workload:
    """A base on disk, a folder of adapters, and which adapter stands for each kind."""

    size: str
    model: Path
    adapters: Path
    kinds: Mapping[str, str]
    shape: Shape
    seed: int = 0


def lora(rank: int, targets: Sequence[str] = LINEARS, **options: Any) -> Any:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM", **options)


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
        save_bottleneck(SHAPES[size], adapters / "bottleneck", seed)
        names = (*kinds(), "bottleneck")
        yield Workload(size, model, adapters, {name: name for name in names}, SHAPES[size], seed)


@contextmanager
def many_loras(
    size: str,
    count: int,
    rank: int = 16,
    seed: int = 0,
    targets: Sequence[str] = LINEARS,
    files: int | None = None,
    device: str = "cpu",
    filed: Filed | None = None,
) -> Iterator[Workload]:
    """A base with `count` LoRA adapters of one rank, `lora-0`, `lora-1`, …, filed in the format of a base on this
    device, or in the one that is named.

    Of more than `files` adapters the others are hard links to the first, in turn, so that the disk holds little.
    """
    with any_base(size, seed) as (model, adapters, shape):
        bare = Workload(size, model, adapters, {}, shape, seed)
        made = with_loras(bare, files or count, rank, targets, device, filed=filed)
        own = list(made.kinds)
        more = [f"lora-{i}" for i in range(len(own), count)]
        for i, name in enumerate(more):
            link(adapters / own[i % len(own)], adapters / name)
        yield replace(made, kinds={name: name for name in (*own, *more)})


def with_loras(
    base: Workload,
    count: int,
    rank: int,
    targets: Sequence[str] = LINEARS,
    device: str = "cpu",
    prefix: str = "lora",
    filed: Filed | None = None,
) -> Workload:
    """The workload with `count` more adapters in its folder, `PREFIX-0`, `PREFIX-1`, …"""
    names = [f"{prefix}-{i}" for i in range(count)]
    folders = [base.adapters / name for name in names]
    save_adapters(base.model, lora(rank, targets), folders, base.seed, device=device, filed=filed)
    return replace(base, kinds={**base.kinds, **{name: name for name in names}})


def link(adapter: Path, folder: Path) -> None:
    """The same adapter under another name."""
    folder.mkdir(parents=True)
    for file in adapter.iterdir():
        os.link(file, folder / file.name)


@contextmanager
def any_base(size: str, seed: int) -> Iterator[tuple[Path, Path, Shape]]:
    """(model folder, an empty folder for adapters, shape): the demo's base, or a random one."""
    if size == "demo":
        with TemporaryDirectory(prefix="adapter-server-bench-") as adapters:
            yield _demo().model, Path(adapters), _demo().shape
        return
    with random_base(size, seed) as (model, adapters):
        yield model, Path(adapters), SHAPES[size]


@contextmanager
def random_base(size: str, seed: int) -> Iterator[tuple[Path, Path]]:
    """(model folder, an empty folder for adapters), both gone afterwards."""
    if size not in SHAPES:
        raise InvalidRequest(f"there is no random base of size {size!r}: choose one of {', '.join(SHAPES)}")
    with TemporaryDirectory(prefix="adapter-server-bench-") as root:
        model, adapters = Path(root, "base"), Path(root, "adapters")
        adapters.mkdir()
        if size in IN_PLACE:
            _config(SHAPES[size]).save_pretrained(model)
        else:
            llama(SHAPES[size], seed).save_pretrained(model)
        _tokenizer(SHAPES[size].vocab).save_pretrained(model)
        yield model, adapters


def llama(shape: Shape, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Random weights, made where they are to lie. One seed gives other weights on another device."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(_config(shape), dtype=dtype).eval()


def _config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _tokenizer(vocab: int) -> Any:
    """One word per id, so that a server has something to decode with."""
    words = {f"t{i}": i for i in range(vocab)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")))


def base_dtype(device: str) -> torch.dtype:
    """What a benchmark's base is held in: float32 on the CPU, bfloat16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def format_of(filed: Filed | None, device: str) -> torch.dtype:
    """Of adapters' files."""
    return base_dtype(device) if filed is None else getattr(torch, filed)


def another(filed: Filed | None, device: str) -> Filed | None:
    """A format that is not the base's own."""
    return None if format_of(filed, device) == base_dtype(device) else filed


def save_adapters(
    model: Path,
    config: Any,
    folders: Sequence[Path],
    seed: int,
    weight: Weight | None = None,
    device: str = "cpu",
    filed: Filed | None = None,
) -> None:
    """PEFT adapters of one config over one base, each with random weights of its own, drawn on the device and saved in
    its base's format, or in the one that is named.
    """
    weight, dtype = weight or _random, format_of(filed, device)
    with quiet():
        peft = get_peft_model(_module(model, config), config)
        fresh = {name: p.detach() for name, p in peft.named_parameters() if p.requires_grad}
        for i, folder in enumerate(folders):
            noise = torch.Generator(device).manual_seed(1000 * seed + i)
            weights = {name: weight(name, value, noise).to(dtype).cpu() for name, value in fresh.items()}
            peft.save_pretrained(folder, state_dict=peft.state_dict() | weights)


def save_bottleneck(shape: Shape, folder: Path, seed: int) -> None:
    """Two networks a layer, behind attention and behind the MLP (Houlsby), a sixteenth as wide, as AdapterHub saves."""
    noise, inner = torch.Generator().manual_seed(seed), shape.hidden // REDUCTION
    parts = {
        "adapter_down.0.weight": (inner, shape.hidden), "adapter_down.0.bias": (inner,),
        "adapter_up.weight": (shape.hidden, inner), "adapter_up.bias": (shape.hidden,),
    }  # fmt: skip
    blocks = [f"model.layers.{i}.{at}" for i in range(shape.layers) for at in BLOCKS]
    tensors = {
        f"{block}.adapters.mine.{part}": torch.randn(size, generator=noise).mul_(0.02)
        for block in blocks
        for part, size in parts.items()
    }
    own = {"mh_adapter": True, "output_adapter": True, "reduction_factor": REDUCTION, "non_linearity": "swish"}
    config = {"model_type": "llama", "name": "mine", "version": "adapters.1.3.0", "config": own}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def _module(model: Path, config: Any) -> Any:
    """The base. One in no file has no values where the adapter's do not come from them, else some of the same size."""
    if (model / "model.safetensors").exists():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain = isinstance(config, LoraConfig) and not config.use_dora
    with torch.device("meta" if plain else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of PEFT's that a sound adapter cannot avoid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _random(name: str, fresh: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Large enough to be seen in the tokens, small enough to leave the base's scale."""
    noise = torch.randn(fresh.shape, generator=generator, device=generator.device)
    if "magnitude" in name or "ia3_l" in name:
        return fresh.to(noise.device) * (1 + 0.2 * noise)
    return fresh.to(noise.device) + 0.5 * noise if "prompt_encoder" in name else noise.mul_(0.02)


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


@dataclass(frozen=True, slots=True)
class Trace:
    """S-LoRA's synthetic trace (arXiv 2311.03285, its `benchmarks/trace.py`): rate per second, lengths [low, high)."""

    adapters: int
    rate: float
    seconds: float
    prompt: tuple[int, int] = (8, 512)
    new: tuple[int, int] = (8, 512)
    alpha: float = 1.0  # P(index < k) = (k / adapters) ** alpha
    cv: float = 1.0  # of the gaps between arrivals; 1: Poisson
    seed: int = 42


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a trace."""

    adapter: int
    prompt: int
    new: int
    at_s: float


def calls(trace: Trace) -> list[Call]:
    """The trace's requests, number by number those of S-LoRA's generator; the order of the draws matters."""
    draw = np.random.RandomState(trace.seed)
    count = int(trace.rate * trace.seconds)
    adapters = (draw.power(trace.alpha, count) * trace.adapters).astype(int)
    prompt, new = (draw.randint(low, high, count) for low, high in (trace.prompt, trace.new))
    gaps = draw.gamma(1 / trace.cv**2, trace.cv**2 / trace.rate, count)
    rows = zip(adapters.tolist(), prompt.tolist(), new.tolist(), np.cumsum(gaps).tolist(), strict=True)
    return [Call(*row) for row in rows]
