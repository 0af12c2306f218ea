"""OFT and BOFT (PEFT `tuners/oft/layer.py`, `tuners/boft/layer.py`): the input is rotated, block by block.

OFT    y = W (x R) + b             R = blockdiag of (I − Q)(I + Q)⁻¹, or of its series
BOFT   y = s ∘ (W (x R)) + b       Q = (D − Dᵀ)/2
       several butterfly factors:  R = R_m … R_1, each of blocks between inputs that stand further apart: one W' = W Rᵀ
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Family, Patch
from adapter_server.families.deltas import Turn
from adapter_server.families.options import as_number, flag, integer
from adapter_server.families.orthogonal import MAX_TERMS, cayley, neumann, skew
from adapter_server.families.parts import Expected
from adapter_server.families.wrapping import TARGETS, Reader, Wrapped, Wrapping


class Oft(Wrapping):
    name = "OFT"
    known = TARGETS | {
        *("bias", "block_share", "coft", "eps", "fan_in_fan_out", "init_weights", "module_dropout"),
        *("num_cayley_neumann_terms", "oft_block_size", "r", "use_cayley_neumann"),
    }

    def tensors(self, at: Wrapped) -> Expected:
        size = _size(at)
        return {"oft_R.weight": (1 if flag(at.config, "block_share") else at.inp // size, size * (size - 1) // 2)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        Q = skew(read("oft_R.weight"), _size(at))
        Q = _near(Q, as_number(at.config.get("eps", 6e-5), "eps")) if flag(at.config, "coft") else Q
        if flag({"use_cayley_neumann": True, **at.config}, "use_cayley_neumann"):
            R = neumann(Q, integer(at.config, "num_cayley_neumann_terms", 5, most=MAX_TERMS))
        else:
            R = cayley(-Q)
        return Patch(turn=Turn(R))


class Boft(Wrapping):
    name = "BOFT"
    known = TARGETS | {
        *("bias", "boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor", "fan_in_fan_out"),
        "init_weights",
    }

    def tensors(self, at: Wrapped) -> Expected:
        factors, blocks, size = _blocks(at)
        return {"boft_R": (factors, blocks, size, size), "boft_s": (at.out, 1)}

    def patch(self, at: Wrapped, read: Reader, common: Any) -> Patch:
        each = [cayley((D.mT - D) / 2) for D in read("boft_R")]
        gain = read("boft_s").flatten()
        if len(each) == 1:
            return Patch(turn=Turn(each[0]), gain=gain)
        W = read.weight()
        for i, R in enumerate(each):
            order = _butterfly(at.inp, R.shape[-1], 1 << i)
            W[:, order] = (W[:, order].view(len(W), len(R), 1, -1) @ R.mT).flatten(1)
        return Patch(weight=W, gain=gain)


def _size(at: Wrapped) -> int:
    """A block's size, which divides the input: given, or by the number of blocks. PEFT adjusts what does not divide."""
    r, size = (integer(at.config, key, d, least=0) for key, d in (("r", 0), ("oft_block_size", 32)))
    if (r == 0) == (size == 0):
        raise AdapterRefused("adapter_config.json: exactly one of 'r' and 'oft_block_size' must be 0")
    found = _adjusted(at.inp, size) if size else at.inp // _adjusted(at.inp, r)
    if found < 2:
        raise AdapterRefused(f"adapter_config.json: blocks of {found} at {at.path} rotate nothing")
    return found


def _adjusted(inp: int, wanted: int) -> int:
    """The nearest divisor of the input's width, the smaller on a tie (PEFT `adjust_oft_parameters`)."""
    if wanted >= inp:
        return inp
    higher = next(n for n in range(wanted, inp + 1) if inp % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if inp % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _near(Q: Tensor, eps: float) -> Tensor:
    """Constrained OFT: each block within eps/√blocks of no rotation."""
    most, norm = eps / Q.shape[0] ** 0.5, Q.norm(dim=(1, 2), keepdim=True)
    return torch.where(norm <= most, Q, most * Q / norm)


def _butterfly(inp: int, size: int, apart: int) -> Tensor:
    """Which input stands at each place of a factor's blocks (PEFT `block_butterfly_perm`, turned round)."""
    halves = torch.arange(inp).view(-1, 2 * apart, size // 2)  # [groups, half blocks, half]
    return torch.cat([halves[:, ::2], halves[:, 1::2]], 1).flatten().argsort()


def _blocks(at: Wrapped) -> tuple[int, int, int]:
    """How many factors, of how many blocks, of which size."""
    factors = integer(at.config, "boft_n_butterfly_factor", 1, most=20)
    size, count = (integer(at.config, key, d, least=0) for key, d in (("boft_block_size", 4), ("boft_block_num", 0)))
    if (size == 0) == (count == 0):
        raise AdapterRefused("adapter_config.json: exactly one of 'boft_block_size' and 'boft_block_num' must be 0")
    other = at.parts(at.inp, size or count, "boft_block_size" if size else "boft_block_num")
    blocks, width = (other, size) if size else (count, other)
    if factors > 1 and (blocks % (1 << (factors - 1)) or width % 2):
        raise AdapterRefused(
            f"adapter_config.json: {factors} in 'boft_n_butterfly_factor' need even blocks, a multiple of "
            f"{1 << (factors - 1)} of them; at {at.path} there are {blocks} of {width}"
        )
    return factors, blocks, width


FAMILIES: tuple[Family, ...] = (Oft(), Boft())
