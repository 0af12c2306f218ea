"""Choosing tokens: biases, penalties, the tokens that a constraint allows, temperature, top-k, top-p, min-p, and a
random stream of a row's own.

Order and meaning of the filters are transformers' (`generation/logits_process.py`). A row's random numbers come from
(seed, index of the token) alone, so what else is in the batch never changes them. Where the device has a kernel that
draws, it draws here too: a sum that is rounded otherwise could choose a neighbour, and a token must not depend on which
step it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_server.core import Sampling, Top

_MASK = (1 << 64) - 1
PEAK = 1024  # of the likeliest tokens, which are looked at first
COLDEST = 1e-5  # below, the likeliest token is certain, and what a score is divided by must not vanish in float32

Settings = tuple[float, float, float, float, float]  # temperature, top_k, top_p, min_p, and a random number in [0, 1)
Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # kernels.draw: logits, settings [n, 5] → ids, maxima


@dataclass(frozen=True, slots=True)
class Draw:
    """What sampling needs to know of one row: its settings, seed, prompt and the tokens it has emitted."""

    sampling: Sampling
    seed: int
    tokens: Sequence[int]  # prompt and generated
    prompt: int  # how many of them are the prompt
    mask: Tensor | None = None  # [words] int32, a bit for each token that may come; None: all may

    def settings(self, ahead: int = 0) -> Settings:
        """What the token is drawn by that comes next, or `ahead` tokens after it."""
        s = self.sampling
        if s.temperature <= 0:
            return 0.0, 0.0, 1.0, 0.0, 0.0
        u = uniform(self.seed, len(self.tokens) - self.prompt + ahead)
        return max(s.temperature, COLDEST), s.top_k, s.top_p, s.min_p, u


@dataclass(frozen=True, slots=True)
class Chosen:
    """The token of one row. `ok` is False where the logits hold no finite maximum, or where there was a `failure`."""

    id: int
    ok: bool
    logprob: float | None = None
    top: Top = ()
    failure: Exception | None = None


def choose(logits: Tensor, draws: Sequence[Draw], kernel: Kernel | None = None) -> list[Chosen]:
    """logits [rows, vocab] → one token a row."""
    raw = logits.float()
    logits = _masked(_penalised(_biased(raw, draws), draws), draws)
    best, ids = logits.max(-1)
    ok = torch.isfinite(best).tolist()
    warm = [i for i, d in enumerate(draws) if d.sampling.temperature > 0 and ok[i]]
    if warm:
        ids[warm] = _sampled(logits[warm], [draws[i] for i in warm], kernel)
    chosen = ids.tolist()
    reports = _logprobs(raw, draws, chosen)
    return [Chosen(chosen[i], ok[i], *reports.get(i, (None, ()))) for i in range(len(draws))]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from (seed, index): SplitMix64's output function on a counter (Steele et al., OOPSLA 2014)."""
    z = _mix((seed & _MASK) ^ 0x9E3779B97F4A7C15)
    return (_mix(z + (index + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def rate(logits: Tensor, ids: Sequence[int], count: int) -> list[tuple[float, Top]]:
    """logits [n, vocab], the n tokens that came → each one's logprob, and the `count` likeliest in its place."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None]) - total
    values, best = logits.topk(min(count, logits.shape[1]))
    pairs = zip(best.tolist(), (values - total).tolist(), strict=True)
    tops: list[Top] = [tuple(zip(*pair, strict=True)) for pair in pairs]
    return list(zip(own.squeeze(1).tolist(), tops, strict=True))


def _biased(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """All rows' biases in one addition."""
    entries = [(i, *entry) for i, d in enumerate(draws) for entry in d.sampling.logit_bias]
    if not entries:
        return logits
    rows, ids, values = (torch.tensor(column, device=logits.device) for column in zip(*entries, strict=True))
    return logits.index_put((rows, ids), values.to(logits.dtype), accumulate=True)


def _masked(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Minus infinity where a row's constraint does not allow a token; all rows' bits are spread at once."""
    masks = [(i, d.mask) for i, d in enumerate(draws) if d.mask is not None]
    if not masks:
        return logits
    words = torch.stack([mask for _, mask in masks]).to(logits.device)
    bits = words[:, :, None] >> torch.arange(32, device=logits.device, dtype=torch.int32) & 1
    rows = torch.tensor([i for i, _ in masks], device=logits.device)
    refused = bits.flatten(1)[:, : logits.shape[1]] == 0
    return logits.index_copy(0, rows, logits[rows].masked_fill(refused, -torch.inf))


def _penalised(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    rows = [i for i, d in enumerate(draws) if _has_penalty(d.sampling)]
    if not rows:
        return logits
    logits = logits.clone()
    for i in rows:
        _penalise(logits[i], draws[i])
    return logits


def _has_penalty(s: Sampling) -> bool:
    return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


def _penalise(row: Tensor, draw: Draw) -> None:
    """In place. Repetition counts the prompt too (transformers); presence and frequency what was emitted (OpenAI)."""
    s = draw.sampling
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(draw.tokens)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * s.repetition_penalty, scores / s.repetition_penalty)
    emitted = draw.tokens[draw.prompt :]
    if emitted and (s.presence_penalty or s.frequency_penalty):
        ids, counts = torch.unique(torch.tensor(emitted, device=row.device), return_counts=True)
        row[ids] -= s.presence_penalty + s.frequency_penalty * counts


def _sampled(logits: Tensor, draws: Sequence[Draw], kernel: Kernel | None) -> Tensor:
    """logits [n, vocab] → ids [n].

    Without a kernel among the PEAK likeliest tokens, where that is sure to find it; rows that are left sort them all.
    """
    settings = torch.tensor([d.settings() for d in draws], dtype=torch.float64, device=logits.device)
    if kernel is not None:
        return kernel(logits, settings)[0]
    vocab, peak = logits.shape[1], max(PEAK, *(d.sampling.top_k for d in draws))
    if vocab <= peak:
        return inverse(logits, settings, vocab)[0]
    ids, sure = inverse(logits, settings, peak)
    if left := [i for i, found in enumerate(sure.tolist()) if not found]:
        ids[left] = inverse(logits[left], settings[left], vocab)[0]
    return ids


def inverse(logits: Tensor, settings: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """logits [n, vocab], settings [n, 5] → (ids [n], whether each is sure [n]), by the inverse of the filtered
    distribution, most likely first, and of equal logits the lower id.

    Among the `depth` likeliest tokens: where one is not sure, what lies beyond them may bear on it. Which of equal
    logits are among them is left open, unless all are.
    """
    temperature, top_k, top_p, min_p, u = settings.to(logits.dtype)[:, :, None].unbind(1)
    everything = depth == logits.shape[1]
    best, ids = logits.sort(dim=-1, descending=True, stable=True) if everything else logits.topk(depth)
    scores = (best / temperature).masked_fill(
        (torch.arange(depth, device=best.device) >= top_k) & (top_k > 0), -torch.inf
    )
    whole = torch.where(
        top_k > 0, scores.logsumexp(-1, keepdim=True), (logits / temperature).logsumexp(-1, keepdim=True)
    )
    p = (scores - whole).exp()
    cut = p.cumsum(-1) - p >= top_p.clamp(min=1e-9)
    low = p < p[:, :1] * min_p
    kept = p.masked_fill(cut | low, 0).cumsum(-1)
    closed = (top_k > 0) | cut[:, -1:] | low[:, -1:]  # nothing beyond is kept
    most = kept[:, -1:]
    u = u * torch.where(closed, most, 1.0)
    below = torch.nextafter(most, torch.zeros_like(most))  # u may round to 1: the last token has a chance of 0
    u = torch.where(closed | everything, torch.minimum(u, below), u)
    at = torch.searchsorted(kept, u, right=True)
    sure = closed | ((top_p >= 1) & (min_p <= 0) & (at < depth))
    return ids.gather(1, at.clamp(max=depth - 1)).squeeze(1), sure[:, 0]


def _logprobs(raw: Tensor, draws: Sequence[Draw], chosen: Sequence[int]) -> dict[int, tuple[float, Top]]:
    """Of the raw logits, before any penalty, for the rows that ask."""
    rows = [i for i, d in enumerate(draws) if d.sampling.logprobs]
    if not rows:
        return {}
    logprobs = raw[rows].log_softmax(-1)
    out = {}
    for row, i in zip(logprobs, rows, strict=True):
        values, ids = row.topk(min(draws[i].sampling.logprobs, row.shape[0]))
        out[i] = (row[chosen[i]].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
    return out
