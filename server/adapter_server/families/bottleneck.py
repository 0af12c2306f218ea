"""What a bottleneck adapter is, in AdapterHub's terms: its tensors, its options, and the patch that it becomes.

Compacter's layers (`phm_layer`) are Kronecker sums, expanded to plain matrices:  H = Σᵢ ruleᵢ ⊗ Wᵢ   [in, out]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_server.errors import AdapterRefused
from adapter_server.families.base import Network
from adapter_server.families.deltas import TensorFields
from adapter_server.families.options import Config, as_integer, as_number, choice, flag, integer
from adapter_server.families.parts import Expected, Taker
from adapter_server.families.peanut import ACTIVATIONS

KNOWN = frozenset(
    {
        "adapter_residual_before_ln", "architecture", "cross_adapter", "dropout", "factorized_phm_W",
        "factorized_phm_rule", "hypercomplex_nonlinearity", "init_weights", "init_weights_seed", "inv_adapter",
        "inv_adapter_reduction_factor", "is_parallel", "learn_phm", "leave_out", "ln_after", "ln_before", "mh_adapter",
        "non_linearity", "original_ln_after", "original_ln_before", "output_adapter", "phm_bias", "phm_c_init",
        "phm_dim", "phm_init_range", "phm_layer", "phm_rank", "reduction_factor", "residual_before_ln", "scaling",
        "shared_W_phm", "shared_phm_rule", "stochastic_depth", "use_gating",
    }
)  # fmt: skip
NORM = ("weight", "bias")
MAX_WIDTH = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Gate(TensorFields):
    """Linear gates on a method of a union: each is one number, the mean over all tokens of a call."""

    weight: Tensor  # [n, d]
    bias: Tensor  # [n]

    def mean(self, x: Tensor) -> Tensor:
        """x [1, T, d] → [1, 1, n]."""
        return torch.sigmoid(F.linear(x, self.weight, self.bias)).mean(-2, keepdim=True)

    @staticmethod
    def expected(at: str, count: int, width: int) -> Expected:
        return {f"{at}weight": (count, width), f"{at}bias": (count,)}

    @classmethod
    def read(cls, at: str, take: Callable[[str], Tensor]) -> Gate:
        return cls(take(f"{at}weight"), take(f"{at}bias"))


@dataclass(frozen=True, slots=True, eq=False)
class Bottleneck(TensorFields):
    """A bottleneck on what a block adds to the residual stream (AdapterHub `methods/modeling.py`).

    f(x) = up · act(down · norm(x) + d) + u      the scaling is folded into up and u

    parallel     y' = y + norm(f(r))
    sequential   x = y + r or y;   y' = f(x) + (y or x), a norm around f or around the sum

    The library adds r to the outcome unless `adds` is false, and the base adds it always.
    """

    reads: str
    act: str
    down: Tensor  # [d, hidden]
    down_bias: Tensor  # [d]
    up: Tensor  # [hidden, d]
    up_bias: Tensor  # [hidden]
    before: Tensor | None = None  # [2, hidden], a norm's weight and bias
    after: Tensor | None = None
    parallel: bool = False
    joins: bool = False  # whether x is y + r
    own: bool = True  # whether the inner residual is y, not x
    inside: bool = False  # whether it is added before the norm
    adds: bool = True
    gate: Gate | None = None  # only where every call has all tokens

    def apply(self, y: Tensor, r: Tensor) -> Tensor:
        out = self._parallel(y, r) if self.parallel else self._sequential(y, r)
        return out if self.adds else out - r

    def network(self) -> Network | None:
        """The same without norms and gates; None where it has some."""
        if self.before is not None or self.after is not None or self.gate is not None:
            return None
        reads: Literal["y", "y + r", "r"] = "r" if self.parallel else "y + r" if self.joins else "y"
        again = int(not self.parallel and self.joins and not self.own) - int(not self.adds)
        return Network(self.down, self.down_bias, self.up, self.up_bias, self.act, reads, again)

    def _parallel(self, y: Tensor, r: Tensor) -> Tensor:
        return y + _norm(self._f(r), self.after)

    def _sequential(self, y: Tensor, r: Tensor) -> Tensor:
        x = y + r if self.joins else y
        residual = y if self.own else x
        if self.inside:
            return _norm(self._f(x) + residual, self.after)
        return _norm(self._f(x), self.after) + residual

    def _f(self, x: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.act](F.linear(_norm(x, self.before), self.down, self.down_bias))
        out = F.linear(hidden, self.up, self.up_bias)
        return out if self.gate is None else out * self.gate.mean(x)


def _norm(x: Tensor, norm: Tensor | None) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm[0], norm[1])


@dataclass(frozen=True, slots=True)
class Options:
    """A bottleneck's config, checked. `root` is where the tensors that all modules share stand in the file."""

    config: Config
    hidden: int
    root: str

    def __post_init__(self) -> None:
        config = self.config
        if config.get("residual_before_ln", True) not in (True, False):
            raise AdapterRefused("adapter_config.json: 'residual_before_ln' must be true or false for this base")

    def covers(self, layer: int, location: str) -> bool:
        return flag(self.config, location) and layer not in left_out(self.config)

    def width(self, layer: int) -> int:
        """The library's int(hidden // factor), at least 1."""
        factor = self.config.get("reduction_factor", 16)
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get("default"))
        number = as_number(factor, "reduction_factor")
        if not self.hidden / MAX_WIDTH <= number <= MAX_WIDTH:
            raise AdapterRefused(f"adapter_config.json: 'reduction_factor' must be a number above 0, not {number:g}")
        return max(int(self.hidden // number), 1)

    @property
    def gated(self) -> bool:
        return flag(self.config, "use_gating")

    @property
    def phm(self) -> bool:
        return flag(self.config, "phm_layer")

    def on(self, key: str) -> bool:
        """A flag of the Kronecker layers, with the library's default."""
        value = self.config.get(key)
        return key in ("factorized_phm_W", "phm_bias", "shared_phm_rule") if value is None else flag(self.config, key)

    @property
    def dim(self) -> int:
        return integer(self.config, "phm_dim", 4, most=64)

    @property
    def rank(self) -> int:
        return integer(self.config, "phm_rank", 1, most=1024)

    def expected(self, at: str, layer: int) -> Expected:
        """The tensors of one module, whose names begin with `at`."""
        d, h, first = self.width(layer), self.hidden, 1 if flag(self.config, "ln_before") else 0
        found = self._linear(f"{at}adapter_down.{first}.", "down", h, d)
        found |= self._linear(f"{at}adapter_up.", "up", d, h)
        norms = ["adapter_norm_before", "adapter_down.0"] * first
        norms += ["adapter_norm_after"] if flag(self.config, "ln_after") else []
        found |= {f"{at}{norm}.{name}": (h,) for norm in norms for name in NORM}
        if (scaling := self.config.get("scaling", 1.0)) in ("learned", "channel"):
            found[f"{at}scaling"] = (1,) if scaling == "learned" else (h,)
        return found | Gate.expected(f"{at}gate.", 1, h) if self.gated else found

    def _linear(self, at: str, where: str, inp: int, out: int) -> Expected:
        if not self.phm:
            return {f"{at}weight": (out, inp), f"{at}bias": (out,)}
        found: Expected = {f"{at}b": (out,)} if self.on("phm_bias") else {}
        if not self.on("shared_W_phm"):
            found |= self._factors(f"{at}W", inp, out)
        return found if self.on("shared_phm_rule") else found | self._rule(at)

    def _factors(self, at: str, inp: int, out: int) -> Expected:
        n, rank = self.dim, self.rank
        if inp % n or out % n:
            raise AdapterRefused(f"adapter_config.json: 'phm_dim' is {n}, which does not divide {inp} and {out}")
        if self.on("factorized_phm_W"):
            return {f"{at}_left": (n, inp // n, rank), f"{at}_right": (n, rank, out // n)}
        return {at: (n, inp // n, out // n)}

    def _rule(self, at: str) -> Expected:
        n = self.dim
        if self.on("factorized_phm_rule"):
            return {f"{at}phm_rule_left": (n, n, 1), f"{at}phm_rule_right": (n, 1, n)}
        return {f"{at}phm_rule": (n, n, n)}

    def shared(self) -> Expected:
        """The tensors that all Kronecker layers share."""
        if not self.phm:
            return {}
        found = self._rule(self.root) if self.on("shared_phm_rule") else {}
        if self.on("shared_W_phm"):
            width, h = self.width(0), self.hidden
            found |= self._factors(f"{self.root}W_down", h, width) | self._factors(f"{self.root}W_up", width, h)
        return found

    def patch(self, at: str, layer: int, reads: str, take: Callable[[str], Tensor]) -> Bottleneck:
        """One module's patch. `take` gives a tensor of the file by name, shared ones as often as asked."""
        config, first = self.config, 1 if flag(self.config, "ln_before") else 0
        act = choice({"non_linearity": _activation(config)}, "non_linearity", "relu", ACTIVATIONS)
        scaling = self._scaling(at, take)
        up, up_bias = self._read(f"{at}adapter_up.", "up", self.width(layer), self.hidden, take)
        down, down_bias = self._read(f"{at}adapter_down.{first}.", "down", self.hidden, self.width(layer), take)
        up = (scaling[:, None] * up).T.contiguous().T  # by column, as kernels read it
        before = _pair(f"{at}adapter_norm_before.", take) if first else None
        if before is not None and not torch.equal(before, _pair(f"{at}adapter_down.0.", take)):
            raise AdapterRefused(
                f"the file holds two different norms at {at}adapter_down.0 and {at}adapter_norm_before"
            )
        return Bottleneck(
            reads, act, down, down_bias, up, scaling * up_bias, before,
            _pair(f"{at}adapter_norm_after.", take) if flag(config, "ln_after") else None,
            parallel=flag(config, "is_parallel"),
            joins=flag(config, "original_ln_before"),
            own=config.get("residual_before_ln", True) is True,
            inside=flag(config, "adapter_residual_before_ln"),
            adds=config.get("original_ln_after", True) is True,
            gate=Gate.read(f"{at}gate.", take) if self.gated else None,
        )  # fmt: skip

    def _scaling(self, at: str, take: Callable[[str], Tensor]) -> Tensor:
        """[1] or [hidden]"""
        scaling = self.config.get("scaling", 1.0)
        if scaling in ("learned", "channel"):
            return take(f"{at}scaling")
        return torch.tensor([as_number(scaling, "scaling")])

    def _read(self, at: str, where: str, inp: int, out: int, take: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """A projection's weight [out, in] and bias [out]."""
        if not self.phm:
            return take(f"{at}weight"), take(f"{at}bias")
        W = f"{self.root}W_{where}" if self.on("shared_W_phm") else f"{at}W"
        rule = self.root if self.on("shared_phm_rule") else at
        sides = _product(W, self.on("factorized_phm_W"), take)
        rules = _product(f"{rule}phm_rule", self.on("factorized_phm_rule"), take)
        H = sum((torch.kron(a, b) for a, b in zip(rules, sides, strict=True)), torch.zeros(inp, out))
        return H.T.contiguous(), take(f"{at}b") if self.on("phm_bias") else torch.zeros(out)


def left_out(config: Config) -> frozenset[int]:
    value = config.get("leave_out") or []
    if not isinstance(value, list):
        raise AdapterRefused("adapter_config.json: 'leave_out' must be a list of layers")
    return frozenset(as_integer(layer, "leave_out", 0) for layer in value)


def _activation(config: Config) -> object:
    """The library's names in those of transformers."""
    name = config.get("non_linearity", "relu")
    return {"leakyrelu": "leaky_relu"}.get(name.lower(), name.lower()) if isinstance(name, str) else name


def _product(name: str, factorised: bool, take: Callable[[str], Tensor]) -> Tensor:
    return torch.bmm(take(f"{name}_left"), take(f"{name}_right")) if factorised else take(name)


def _pair(at: str, take: Callable[[str], Tensor]) -> Tensor:
    return torch.stack([take(f"{at}{name}") for name in NORM])


def again(take: Taker) -> Callable[[str], Tensor]:
    """A taker that gives a tensor as often as it is asked for."""
    kept: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in kept:
            kept[name] = take(name)
        return kept[name]

    return read
