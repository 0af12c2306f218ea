"""Tiny bases and real PEFT adapters with random weights, for every architecture and every option that is served.

base = tiny_base("llama")
config = ADAPTERS["dora"](base)                          # a PEFT config that fits this base
save_adapter(lambda: tiny_base("llama"), config, folder)
spec, tensors = read(folder)
oracle = load_peft(tiny_base("llama"), folder)           # PEFT alone, to compare with
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from peft import (
    CartridgeConfig,
    CPTConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeloraConfig,
    create_arrow_model,
    get_peft_model,
)
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from adapter_server.core import Spec
from adapter_server.families.base import Adapter, AnyPatch, ModuleShape, linear_params
from adapter_server.families.facts import describe
from adapter_server.registry import guard

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
}
ARCHS = tuple(CONFIGS)
ZERO_CENTRED_NORMS = ("gemma2", "gemma3")

# What warnings a sound adapter causes in PEFT: saved embeddings, biases where the base has none, tied weights.
UNAVOIDABLE = (
    "`is_gradient_checkpointing` is deprecated",
    "Setting `save_embedding_layers` to `True`",
    "`lora_bias=True` was passed but the targeted layer",
    "Model has `tie_word_embeddings=True`",
    "You have requested `ensure_weight_tying`",
    "Position ids are not supported",  # for every soft prompt
    r"The following (rank|alpha)_pattern keys did not match",  # PEFT's own, for models with experts
    "Detected that the base layer has no bias term",  # BEFT
    "Unsupported layer type",  # LN tuning, of every norm
    "Failed to load the CUDA extension",  # BOFT
    "Setting boft_n_butterfly_factor to 1",
    "save_precomputed_indices=False",
    "Sparse invariant checks are implicitly disabled",  # FRoD and SHiRA, when they run
    "Invalid `(oft_block_size|r)`",  # OFT, which then adjusts it
    "Specified to not (save|load) ",  # seeded projections
    r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape",  # lora_B.bias, which has one dimension
)


def tiny_base(arch: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A causal LM of two layers, float32, in eval mode, with weights large enough for clear-cut logits."""
    return copy.deepcopy(_tiny_base(arch, seed))  # in half the time that it takes to make one


@functools.cache
def _tiny_base(arch: str, seed: int) -> transformers.PreTrainedModel:
    config = CONFIGS[arch]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if param.dim() > 1:
            param.data = 0.3 * noise
        elif name.endswith("bias"):
            param.data = 0.2 * noise
        elif arch in ZERO_CENTRED_NORMS:
            param.data = 0.2 * noise + (5 if "post_" in name else 0)  # or else the scaled embeddings drown the layers
        else:
            param.data = 1 + 0.2 * noise
    model.tie_weights()
    model.generation_config.do_sample = False
    return model.eval()


@dataclass(frozen=True)
class Case:
    """One way to configure a kind; `archs` are the bases it fits."""

    make: Callable[[nn.Module], PeftConfig]
    archs: tuple[str, ...] = ARCHS

    def __call__(self, base: nn.Module) -> PeftConfig:
        with quiet():
            return self.make(base)


@dataclass(frozen=True)
class Names:
    """An architecture's module names."""

    attention: list[str]
    key_value: list[str]
    mlp: list[str]
    down: str
    norm: str
    embed: str
    layers: str = "layers"
    block: str = "self_attn"
    prefix: str = "model.layers"


def names(base: nn.Module) -> Names:
    kind = base.config.model_type
    if kind == "gpt2":
        return Names(
            ["c_attn"], ["c_attn"], ["c_fc", "mlp.c_proj"], "mlp.c_proj", "ln_f", "wte", "h", "attn", "transformer.h"
        )
    if kind == "phi3":
        return Names(["qkv_proj", "o_proj"], ["qkv_proj"], ["gate_up_proj", "down_proj"], "down_proj", "norm", EMBED)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    return Names(attention, ["k_proj", "v_proj"], mlp, "down_proj", "model.norm", EMBED)


EMBED = "embed_tokens"


def lora(**options: object) -> Callable[[nn.Module], PeftConfig]:
    """A LoRA config on attention and MLP; an option that is callable is given the base's names.

    PEFT saves patterns sorted and takes the first that matches, so that only a sorted table loads as it was trained.
    """

    def make(base: nn.Module) -> PeftConfig:
        own = names(base)
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": [*own.attention, *own.mlp], "task_type": "CAUSAL_LM"}
        chosen |= {key: value(own) if callable(value) else value for key, value in options.items()}
        return LoraConfig(**chosen, fan_in_fan_out=base.config.model_type == "gpt2")

    return make


def ia3(base: nn.Module) -> PeftConfig:
    own, transposed = names(base), base.config.model_type == "gpt2"
    return IA3Config(
        target_modules=[*own.key_value, own.down],
        feedforward_modules=[own.down],
        task_type="CAUSAL_LM",
        fan_in_fan_out=transposed,
    )


def ia3_saved(base: nn.Module) -> PeftConfig:
    """(IA)³ that scales the head's input too, and saves a norm."""
    config = ia3(base)
    config.feedforward_modules = {*config.feedforward_modules, "lm_head"}
    config.target_modules = {*config.target_modules, "lm_head"}
    config.modules_to_save = [names(base).norm]
    return config


def wraps(cls: type[PeftConfig], **options: object) -> Callable[[nn.Module], PeftConfig]:
    """A config of another kind on attention and MLP; an option that is callable is given the base's names."""

    def make(base: nn.Module) -> PeftConfig:
        own, keys = names(base), {f.name for f in dataclasses.fields(cls)}
        chosen = {"target_modules": [*own.attention, *own.mlp], "task_type": "CAUSAL_LM"}
        chosen |= {key: value(own) if callable(value) else value for key, value in options.items()}
        if "fan_in_fan_out" in keys:
            chosen["fan_in_fan_out"] = base.config.model_type == "gpt2"
        return cls(**chosen)

    return make


BOTH = ("llama", "gpt2")  # where PEFT's kind takes Conv1D too
LINEAR = ("llama", "qwen2")  # where it takes Linears alone: without biases and with
ONE = ("llama",)  # for an option of a kind that stands above
BIASED = ("qwen2", "gpt2")  # the bases whose Linears have biases

ADAPTERS: dict[str, Case] = {
    "lora": Case(lora()),
    "rslora": Case(lora(use_rslora=True)),
    "dora": Case(lora(use_dora=True)),
    "lora_patterns": Case(
        lora(
            target_modules=lambda own: own.attention,
            rank_pattern=lambda own: dict(sorted({own.attention[0]: 2, rf"{own.layers}\.1\..*": 3}.items())),
            alpha_pattern=lambda own: {rf"{own.layers}\.1\..*{own.attention[0]}": 5},
        )
    ),
    "lora_layers": Case(lora(layers_to_transform=[1])),
    "lora_excluded": Case(lora(target_modules="all-linear", exclude_modules=lambda own: [own.down])),
    "lora_regex": Case(lora(target_modules=lambda own: rf".*\.1\..*\.({'|'.join(own.attention)})")),
    "lora_bias_all": Case(lora(target_modules=lambda own: own.attention, bias="all")),
    "lora_bias_only": Case(lora(bias="lora_only"), BIASED),
    "lora_lora_bias": Case(lora(lora_bias=True)),
    "lora_saved": Case(lora(modules_to_save=lambda own: ["lm_head", own.norm])),
    "lora_embed": Case(lora(target_modules=lambda own: [own.embed, *own.attention])),
    "lora_embed_dora": Case(lora(target_modules=lambda own: [own.embed, *own.attention], use_dora=True)),
    "lora_head": Case(lora(target_modules=lambda own: ["lm_head", *own.attention]), tuple(set(ARCHS) - {"gpt2"})),
    "lora_tied": Case(
        lora(target_modules=lambda own: [own.embed, *own.attention], ensure_weight_tying=True), ("gemma2",)
    ),
    "lora_tied_saved": Case(
        lora(target_modules=lambda own: own.attention, modules_to_save=["lm_head"], ensure_weight_tying=True),
        ("gemma2", "gpt2"),
    ),
    "lora_saved_block": Case(
        lora(target_modules=lambda own: own.mlp, modules_to_save=lambda own: [f"{own.layers}.1.{own.block}"])
    ),
    "velora": Case(lora(velora_config=VeloraConfig(num_groups=5))),
    "pissa": Case(lora(init_lora_weights="pissa", rank_pattern=lambda own: {own.down: 3}), BOTH),
    "pissa_dora": Case(lora(init_lora_weights="pissa", use_dora=True), ONE),
    "olora": Case(lora(init_lora_weights="olora", use_rslora=True), LINEAR),
    "kasa": Case(lora(kasa_config=KasaConfig()), LINEAR),
    "monteclora": Case(lora(monteclora_config=MontecloraConfig(num_samples=3)), BOTH),
    "bdlora": Case(
        lora(
            use_bdlora=lambda own: BdLoraConfig(
                target_modules_bd_a=["o_proj", "down"],
                target_modules_bd_b=["q_proj", "v_proj"],
                nblocks=2,
                match_strict=False,
            )
        ),
        LINEAR,
    ),
    "alora": Case(lora(alora_invocation_tokens=[9], lora_bias=True)),
    "lora_tokens": Case(lora(trainable_token_indices=[5, 9, 13, 40]), (*BOTH, "gemma2")),
    "lora_tokens_head": Case(lora(trainable_token_indices={"embed_tokens": [5, 9], "lm_head": [13, 40, 7]}), ONE),
    "lora_tokens_apart": Case(lora(trainable_token_indices={"wte": [5, 9], "lm_head": [13, 40, 7]}), ("gpt2",)),
    "trainable_tokens": Case(
        lambda base: peft.TrainableTokensConfig(token_indices=[5, 9, 13, 40], task_type="CAUSAL_LM"), (*BOTH, "gemma2")
    ),
    "ia3": Case(ia3),
    "ia3_saved": Case(ia3_saved, tuple(set(ARCHS) - {"gpt2"})),
    "adalora": Case(wraps(peft.AdaLoraConfig, total_step=10, init_r=4, bias="all"), BOTH),
    "adalora_pruned": Case(
        wraps(
            peft.AdaLoraConfig,
            total_step=10,
            init_r=4,
            rank_pattern=lambda own: {
                f"{own.prefix}.1.{own.block}.{name}.lora_E": [i == 0, True, False, i < 2]
                for i, name in enumerate(own.attention)
            },
        ),
        ONE,
    ),
    "loha": Case(wraps(peft.LoHaConfig, r=2, rank_pattern=lambda own: {own.down: 3}), LINEAR),
    "loha_high": Case(wraps(peft.LoHaConfig, r=6, alpha_pattern=lambda own: {own.down: 3}), ONE),
    "hra": Case(wraps(peft.HRAConfig, r=4, bias="hra_only"), LINEAR),
    "hra_gs": Case(wraps(peft.HRAConfig, r=4, apply_GS=True), ONE),
    "vera": Case(wraps(peft.VeraConfig, r=8), BOTH),
    "vera_seeded": Case(wraps(peft.VeraConfig, r=8, save_projection=False, projection_prng_key=5), ONE),
    "pvera": Case(wraps(peft.PveraConfig, r=8), BOTH),
    "pvera_seeded": Case(wraps(peft.PveraConfig, r=8, save_projection=False), ONE),
    "delora": Case(wraps(peft.DeloraConfig, r=4, rank_pattern=lambda own: {own.down: 3}, delora_lambda=3), LINEAR),
    "gralora": Case(wraps(peft.GraloraConfig, r=4, alpha=4, hybrid_r=2), BOTH),
    "gralora_plain": Case(wraps(peft.GraloraConfig, r=8, alpha=4, gralora_k=4), ONE),
    "miss": Case(wraps(peft.MissConfig, r=5), LINEAR),
    "miss_mini": Case(wraps(peft.MissConfig, r=4, mini_r=8, init_weights="mini"), ONE),
    "miss_bat": Case(wraps(peft.MissConfig, r=8, init_weights="bat", bias="miss_only"), ("qwen2",)),
    "vblora": Case(wraps(peft.VBLoRAConfig, r=2, num_vectors=16, vector_length=8), BOTH),
    "vblora_topk": Case(
        wraps(peft.VBLoRAConfig, r=2, num_vectors=16, vector_length=8, topk=3, save_only_topk_weights=True), ONE
    ),
    "unilora": Case(wraps(peft.UniLoraConfig, r=2, theta_d_length=100), BOTH),
    "unilora_saved": Case(wraps(peft.UniLoraConfig, r=2, theta_d_length=64, save_indices=True), ONE),
    "tinylora": Case(wraps(peft.TinyLoraConfig, r=2, u=4, weight_tying=0.5), BOTH),
    "tinylora_seeded": Case(wraps(peft.TinyLoraConfig, r=2, u=4, weight_tying=0.7, save_projection=False), ONE),
    "psoft": Case(wraps(peft.PsoftConfig, r=4), LINEAR),
    "psoft_series": Case(
        wraps(
            peft.PsoftConfig,
            r=4,
            psoft_alpha=9,
            ab_svd_init="pissa_init",
            psoft_mag_a=False,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=6,
            cayley_neumann_eps=0.5,
        ),
        ONE,
    ),
    "psoft_free": Case(wraps(peft.PsoftConfig, r=4, psoft_orth=False, psoft_mag_b=False), ONE),
    "peanut": Case(wraps(peft.PeanutConfig, r=4, depth=2, scaling=0.3), LINEAR),
    "peanut_flat": Case(wraps(peft.PeanutConfig, r=4, act_fn="gelu", scaling=0.3), ONE),
    "deft": Case(wraps(peft.DeftConfig, r=4, alpha=6, bias="all"), BOTH),
    "deft_qr": Case(wraps(peft.DeftConfig, r=4, decomposition_method="qr"), ONE),
    "deft_para": Case(wraps(peft.DeftConfig, r=4, para=True), ONE),
    "osf": Case(wraps(peft.OSFConfig, modules_to_save=["lm_head"]), LINEAR),
    "osf_low": Case(wraps(peft.OSFConfig, effective_rank=0.9, rank_pattern={r"k_proj|v_proj": 13}), ONE),
    "beft": Case(wraps(peft.BeftConfig), LINEAR),
    "ln_tuning": Case(wraps(peft.LNTuningConfig, target_modules=lambda own: [own.norm]), ("llama", "gpt2", "gemma2")),
    "road": Case(wraps(peft.RoadConfig, group_size=16), LINEAR),
    "road_2": Case(wraps(peft.RoadConfig, group_size=8, variant="road_2"), ONE),
    "road_4": Case(wraps(peft.RoadConfig, group_size=8, variant="road_4"), ONE),
    "glora": Case(wraps(peft.GloraConfig, r=2, config_D_E="vector"), LINEAR),
    "glora_vectors": Case(
        wraps(peft.GloraConfig, config_A_B="vector", config_C="vector", config_D_E="constant"), ("qwen2",)
    ),
    "glora_constants": Case(wraps(peft.GloraConfig, config_A_B="constant", config_C="none"), ("qwen2",)),
    "lokr": Case(wraps(peft.LoKrConfig, r=2), LINEAR),
    "lokr_both": Case(wraps(peft.LoKrConfig, r=2, decompose_both=True, decompose_factor=8), ONE),
    "oft": Case(wraps(peft.OFTConfig, oft_block_size=8), LINEAR),
    "oft_exact": Case(wraps(peft.OFTConfig, r=5, oft_block_size=0, use_cayley_neumann=False), ONE),
    "oft_near": Case(wraps(peft.OFTConfig, oft_block_size=8, block_share=True, coft=True, eps=0.5), ONE),
    "boft": Case(wraps(peft.BOFTConfig, boft_block_size=4, bias="boft_only"), LINEAR),
    "fourierft": Case(wraps(peft.FourierFTConfig, n_frequency=60, scaling=30), BOTH),  # as large as the base's weights
    "waveft": Case(wraps(peft.WaveFTConfig, n_frequency=60, scaling=3), BOTH),
    "waveft_db4": Case(wraps(peft.WaveFTConfig, n_frequency=60, scaling=3, wavelet_family="db4"), ONE),
    "waveft_shared_out": Case(
        wraps(peft.WaveFTConfig, n_frequency=60, scaling=3, use_idwt=False, proportional_parameters=True), ONE
    ),
    "c3a": Case(wraps(peft.C3AConfig, block_size=8, block_size_pattern=lambda own: {own.down: 16}), LINEAR),
    "randlora": Case(wraps(peft.RandLoraConfig, r=5, randlora_alpha=5), BOTH),
    "frod": Case(wraps(peft.FrodConfig, progressbar=False, sparse_rate=0.05), BOTH),
    "hira": Case(wraps(peft.HiraConfig, r=4), BOTH),
    "hira_head": Case(wraps(peft.HiraConfig, r=4, target_modules=["lm_head", "q_proj"]), ("llama", "gemma2")),
    "shira": Case(wraps(peft.ShiraConfig, r=2), LINEAR),
    "supertuning": Case(wraps(peft.SupertuningConfig, sparsity=0.9, r=2, lora_alpha=1), LINEAR),
    "supertuning_found": Case(
        wraps(peft.SupertuningConfig, sparsity=0.9, select_top=False, save_precomputed_indices=False), ONE
    ),
    "poly": Case(wraps(peft.PolyConfig, r=4, n_tasks=3, n_skills=2), LINEAR),
    "poly_split": Case(
        wraps(peft.PolyConfig, r=2, n_tasks=2, n_skills=3, n_splits=4, modules_to_save=["lm_head"]), ONE
    ),
    "adaption_prompt": Case(
        lambda base: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
        ("llama", "mistral", "gpt2"),
    ),
    "adaption_prompt_top": Case(
        lambda base: peft.AdaptionPromptConfig(adapter_len=7, adapter_layers=1, task_type="CAUSAL_LM"), BOTH
    ),
    "prefix": Case(lambda base: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
    "prefix_projected": Case(
        lambda base: PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
        )
    ),
    "prompt": Case(lambda base: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
    "ptuning": Case(
        lambda base: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM")
    ),
    "cartridge": Case(lambda base: CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, task_type="CAUSAL_LM")),
    "cpt": Case(
        lambda base: CPTConfig(
            cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4], task_type="CAUSAL_LM"
        ),
    ),
    "multitask": Case(
        lambda base: MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=3, num_ranks=2, task_type="CAUSAL_LM")
    ),
}

UNFOLDABLE = (
    *("prefix", "prefix_projected", "cartridge", "prompt", "ptuning", "cpt", "multitask"),  # before the prompt
    "alora",  # on some of its tokens
    *("poly", "poly_split"),  # per task
    *("adaption_prompt", "adaption_prompt_top"),  # at an attention
)
TASKED = ("multitask", "poly", "poly_split")

# What PEFT itself runs; X-LoRA and Arrow, which route among others, are made by `save_xlora` and `save_arrow`.
GRAFTS: dict[str, Case] = {
    "lily": Case(wraps(peft.LilyConfig, r=4, stride_A=2, num_B=2), LINEAR),
    "shadow": Case(lambda base: peft.ShadowConfig(r=4, task_type="CAUSAL_LM"), ONE),
    "adamss": Case(wraps(peft.AdamssConfig, r=8, num_subspaces=3, subspace_rank=2), LINEAR),
}

PAIRS = [(arch, name) for name, case in ADAPTERS.items() for arch in ARCHS if arch in case.archs]


@contextmanager
def quiet() -> Iterator[None]:
    """Lets through every warning but those that a sound adapter cannot avoid."""
    with warnings.catch_warnings():
        for message in UNAVOIDABLE:
            warnings.filterwarnings("ignore", message=message)
        yield


def _no_card(*_: object) -> None:
    """Which no test reads, and which takes PEFT as long as the weights."""


PeftModel.create_or_update_model_card = _no_card  # type: ignore[method-assign]


def save_adapter(base_factory: Callable[[], nn.Module], config: PeftConfig, folder: Path, seed: int = 1) -> None:
    """Saves a PEFT adapter whose every trained parameter is random, large enough to be seen in the logits."""
    base = base_factory()
    with quiet(), torch.random.fork_rng([]):
        torch.manual_seed(seed)  # PEFT's own beginnings are in the file too
        model = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        for name, param in model.named_parameters():
            if param.requires_grad:
                _randomise(name, param.data, generator)
        model.eval().save_pretrained(folder)


def xlora(base: nn.Module, experts: Mapping[str, Path], seed: int = 3) -> PeftModel:
    """X-LoRA over saved experts, its classifier random."""
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, xlora_size=16, layerwise_scalings=True,
        adapters={str(i): str(folder) for i, folder in enumerate(experts.values())},
    )  # fmt: skip
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for param in model.internal_xlora_classifier.parameters():
        param.data = 0.5 * torch.randn(param.shape, generator=generator)
    return model.eval()


def save_xlora(model: PeftModel, experts: Mapping[str, Path], folder: Path) -> None:
    """As documented: PEFT's own save leaves out the layers that are numbered like an expert."""
    config = model.peft_config["default"].to_dict() | {"adapters": {str(i): name for i, name in enumerate(experts)}}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config, default=lambda kind: kind.value))
    tensors = {k: v.clone() for k, v in model.state_dict().items() if "internal_xlora_classifier" in k}
    save_file(tensors, folder / "adapter_model.safetensors")


def arrow(base: nn.Module, experts: Mapping[str, Path], general: Mapping[str, Path]) -> PeftModel:
    """Arrow's routing over saved experts, less what the general ones know."""
    config = ArrowConfig(top_k=2, use_gks=True, rng_seed=42)
    folders = [[str(folder) for folder in each.values()] for each in (experts, general)]
    return create_arrow_model(base, folders[0], config, folders[1]).eval()


def save_arrow(model: PeftModel, experts: Mapping[str, Path], general: Mapping[str, Path], folder: Path) -> None:
    """PEFT's router, its experts under their names here."""
    model.save_pretrained(folder.parent / "routers", selected_adapters=["arrow_router"])
    (folder.parent / "routers" / "arrow_router").rename(folder)
    (folder.parent / "routers").rmdir()
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["arrow_config"] |= {"task_adapter_names": [*experts], "gks_adapter_names": [*general]}
    file.write_text(json.dumps(config))


def load_peft(base: nn.Module, folder: Path, **options: bool) -> PeftModel:
    """PEFT alone, with this one adapter: what everything is compared with."""
    with quiet():
        return PeftModel.from_pretrained(base, folder, **options).eval()


def _randomise(name: str, data: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(data.shape, generator=generator)
    if "magnitude" in name or "ia3_l" in name:
        data.mul_(1 + 0.3 * noise)
    elif "lora_" in name:
        data.copy_(0.15 * noise)
    elif "prefix_task" in name:
        data.copy_(0.8 * noise)
    else:
        data.add_(0.3 * noise)


def read(folder: Path) -> tuple[Spec, dict[str, torch.Tensor]]:
    """A saved adapter as its spec and its tensors."""
    config = guard.parse_config((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return Spec(folder.name, "0" * 12, str(folder), config["peft_type"], config, size), tensors


TOLERANCE = 1e-5  # float32, relative to the largest output


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() <= TOLERANCE * right.abs().max())


def inputs(shape: ModuleShape) -> torch.Tensor:
    """All token ids for an embedding, noise for anything else."""
    generator = torch.Generator().manual_seed(3)
    if shape.kind == "embedding":
        return torch.arange(shape.inp)[None]
    width = shape.inp if shape.kind != "other" else shape.params["weight"][-1]
    return torch.randn(3, 7, width, generator=generator)


def folded(patch: AnyPatch, x: torch.Tensor, module: nn.Module, shape: ModuleShape) -> torch.Tensor:
    """The module's output at x with the patch folded into its parameters."""
    params = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    if shape.kind not in ("linear", "conv1d"):
        return torch.func.functional_call(module, patch.fold(params), (x,))
    params["weight"] = linear_params(module)[0].detach().clone()
    new = patch.fold(params)
    return F.linear(x, new["weight"], new.get("bias"))


@torch.no_grad()
def differences(base: nn.Module, adapter: Adapter, oracle: PeftModel) -> dict[str, str]:
    """Where an adapter, applied or folded, is not what PEFT computes: {module path: how}."""
    wrong: dict[str, str] = {}
    for path, shape in describe(base).modules.items():
        x, module, patch = inputs(shape), base.get_submodule(path), adapter.patches.get(path)
        with quiet():
            want, plain = oracle.base_model.model.get_submodule(path)(x), module(x)
        if not same(plain if patch is None else patch.apply(x, module), want):
            wrong[path] = "apply"
        elif patch is not None and not same(folded(patch, x, module, shape), want):
            wrong[path] = "fold"
        elif patch is not None and same(plain, want):
            wrong[path] = "a patch that does nothing"
    return wrong
