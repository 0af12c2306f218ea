"""What LoRA's variants make of its two factors (PEFT `tuners/lora/variants.py`, and the inits of `lora/layer.py`).

BD-LoRA         A or B block-diagonal, the file holding the blocks one above the other
KaSA            B diag(σ) A, over a base without its r smallest singular directions
PiSSA, OLoRA    B A, over a base without what A and B were at first:  A' = [A; V_r]  B' = [s·B, −U_r S_r];
                OLoRA: W = Q R,  A' = [A; R_r]  B' = [s·B, −s·Q_r]
QA-LoRA         A reads sums over groups of g inputs:  A'[:, i] = A[:, i div g] · in / g²
MonteCLoRA      plain at inference; its sampler is in the file all the same
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import ModuleShape
from adapter_server.families.options import Config, check_known, flag, integer, name_list, table
from adapter_server.families.parts import ROOT, Expected, Taker

SUBTRACTED = ("olora", "pissa")  # inits that take from the base, in a way that can be found again
BLOCKS = ("match_strict", "nblocks", "target_modules_bd_a", "target_modules_bd_b")
KASA = ("beta", "gamma")
MONTE = ("buffer_size", "dirichlet_prior", "kl_loss_weight", "num_samples", "sample_scaler", "use_entropy")
EXCLUSIVE = (
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


@dataclass(frozen=True, slots=True)
class Variant:
    init: str  # of SUBTRACTED, or ""
    kasa: bool
    samples: int  # of MonteCLoRA's sampler; 0: none
    blocks: int  # of BD-LoRA; 0: none
    group: int = 0  # inputs that QA-LoRA pools; 0: none
    block_a: tuple[str, ...] = ()  # parts of the names of modules whose A is in blocks
    block_b: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        return not (self.init or self.kasa or self.samples or self.blocks or self.group)

    @property
    def subtracts(self) -> bool:
        """Whether the base beneath the factors is not the base as it is."""
        return bool(self.init) or self.kasa

    def expected(self, path: str, rank: int, shape: ModuleShape) -> Expected:
        """The factors and what belongs to them, by the end of their name."""
        self._check(path, rank, shape)
        a, b = self._blocks(path)
        keys: Expected = {
            "lora_A.weight": (rank, _parted(shape.inp, rank, a, path) // (self.group or 1)),
            "lora_B.weight": (shape.out, _parted(rank, shape.out, b, path)),
        }
        if self.kasa:
            keys["lora_diag"] = (rank,)
        return keys | (_sampler(rank, self.samples) if self.samples else {})

    def factors(self, take: Taker, path: str, scaling: float, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """A [r,in] and s·B [out,r] over the base as it is; their rank is doubled where the init took from it."""
        key, (a, b) = f"{ROOT}{path}.", self._blocks(path)
        A, B = _diagonal(take(key + "lora_A.weight"), a), _diagonal(take(key + "lora_B.weight"), b)
        rank = A.shape[0]
        if self.group:
            A = A.repeat_interleave(self.group, 1) * (A.shape[1] / self.group)
        if self.kasa:
            B = B * take(key + "lora_diag")
        for name in _sampler(rank, self.samples) if self.samples else ():
            take(key + name)
        if not self.subtracts:
            return A, B.mul_(scaling)
        V, U = self._taken(weight(), rank, scaling)
        return torch.cat([A, V]), torch.cat([B * scaling, -U], 1)

    def _taken(self, W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
        """What the init took from the base: U V, [r,in] and [out,r]."""
        if self.init == "olora":
            Q, R = torch.linalg.qr(W)
            return R[:r], scaling * Q[:, :r]
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        part = slice(len(S) - r, None) if self.kasa else slice(r)
        return V[part], U[:, part] * S[part]

    def _blocks(self, path: str) -> tuple[int, int]:
        """How many blocks A and B have at a module: PEFT looks for the patterns in the last part of its name."""
        name = path.rpartition(".")[2]
        a, b = (self.blocks and any(part in name for part in parts) for parts in (self.block_a, self.block_b))
        if a and b:
            raise AdapterRefused(f"adapter_config.json: 'use_bdlora' splits both factors at {path}")
        return self.blocks if a else 1, self.blocks if b else 1

    def _check(self, path: str, rank: int, shape: ModuleShape) -> None:
        if (self.kasa or self.blocks or self.init == "olora") and shape.kind != "linear":
            raise AdapterRefused(f"adapter_config.json: 'target_modules' names {path}, which this variant cannot adapt")
        if self.group and (shape.kind != "linear" or shape.inp % self.group):
            raise AdapterRefused(
                f"adapter_config.json: 'qalora_group_size' is {self.group}, which does not divide the input at {path}"
            )
        if self.subtracts and rank >= min(shape.inp, shape.out) + (not self.kasa):
            raise AdapterRefused(f"adapter_config.json: the rank {rank} is too high at {path} for what the init takes")


def variant(config: Config) -> Variant:
    given = [key for key in EXCLUSIVE if config.get(key)]
    if len(given) > 1:
        raise AdapterRefused(f"adapter_config.json: '{given[0]}' together with '{given[1]}' is not defined; set one")
    for key, known in (("kasa_config", KASA), ("monteclora_config", MONTE), ("use_bdlora", BLOCKS)):
        check_known(table(config, key), known)
    init, monte, blocks = config.get("init_lora_weights"), table(config, "monteclora_config"), config.get("use_bdlora")
    parts = table(config, "use_bdlora")
    return Variant(
        init=init if isinstance(init, str) and init in SUBTRACTED else "",
        kasa=config.get("kasa_config") is not None,
        samples=integer(monte, "num_samples", 8, most=4096) if config.get("monteclora_config") is not None else 0,
        blocks=integer(parts, "nblocks", 1) if blocks is not None else 0,
        group=integer(config, "qalora_group_size", 16) if flag(config, "use_qalora") else 0,
        block_a=tuple(name_list(parts, "target_modules_bd_a")),
        block_b=tuple(name_list(parts, "target_modules_bd_b")),
    )


def _sampler(rank: int, samples: int) -> Expected:
    """MonteCLoRA's own tensors: only training reads them (PEFT `lora/monteclora.py`)."""
    shapes = {
        "expert_weights": (samples,),
        "expert_weights_prior": (samples,),
        "gaussian_var_prior": (rank, rank),
        "std_prior": (rank,),
    }
    return {f"lora_monteclora_sampler.{name}": shape for name, shape in shapes.items()}


def _parted(width: int, other: int, blocks: int, path: str) -> int:
    if width % blocks or other % blocks:
        raise AdapterRefused(f"adapter_config.json: 'nblocks' is {blocks}, which does not divide the factors at {path}")
    return width // blocks


def _diagonal(stacked: Tensor, blocks: int) -> Tensor:
    if blocks == 1:
        return stacked
    found: Tensor = torch.block_diag(*stacked.chunk(blocks))  # type: ignore[no-untyped-call]
    return found
