"""Choosing tokens: biases, penalties, the tokens that a constraint allows, temperature, top-k, top-p, min-p, and a
random stream of a row's own.

Order and meaning of the filters are transformers' (`generation/logits_process.py`). A row's random numbers come from
(seed, index of the token) alone, so what else is in the batch never changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_server.core import Sampling, Top

_MASK = (1 << 64) - 1
PEAK = 1024  # of the likeliest tokens, which are looked at first
COLDEST = 1e-5  # below, the likeliest token is certain, and what a score is divided by must not vanish in float32


@dataclass(frozen=True, slots=True)
class Draw:
    """What sampling needs to know of one row: its settings, seed, prompt and the tokens it has emitted."""

    sampling: Sampling
    seed: int
    tokens: Sequence[int]  # prompt and generated
    prompt: int  # how many of them are the prompt
    mask: Tensor | None = None  # [words] int32, a bit for each token that may come; None: all may


@dataclass(frozen=True, slots=True)
class Chosen:
    """The token of one row. `ok` is False where the logits hold no finite maximum, or where there was a `failure`."""

    id: int
    ok: bool
    logprob: float | None = None
    top: Top = ()
    failure: Exception | None = None


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[Chosen]:
    """logits [rows, vocab] → one token a row."""
    raw = logits.float()
    logits = _masked(_penalised(_biased(raw, draws), draws), draws)
    best, ids = logits.max(-1)
    ok = torch.isfinite(best).tolist()
    warm = [i for i, d in enumerate(draws) if d.sampling.temperature > 0 and ok[i]]
    if warm:
        ids[warm] = _sampled(logits[warm], [draws[i] for i in warm])
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


def _sampled(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """logits [n, vocab] → ids [n], by the inverse of the filtered distribution, most likely first.

    Among the PEAK likeliest tokens, where that is sure to find it; the rows that are left sort the whole vocabulary.
    """
    peak = max(PEAK, *(d.sampling.top_k for d in draws))
    if logits.shape[1] <= peak:
        return _inverse(logits, draws, logits.shape[1])[0]
    ids, sure = _inverse(logits, draws, peak)
    if left := [i for i, found in enumerate(sure.tolist()) if not found]:
        ids[left] = _inverse(logits[left], [draws[i] for i in left], logits.shape[1])[0]
    return ids


def _inverse(logits: Tensor, draws: Sequence[Draw], depth: int) -> tuple[Tensor, Tensor]:
    """(ids [n], whether each is sure [n]): on the others what lies beyond the `depth` likeliest tokens may bear."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=torch.float32)[:, None]

    settings = [d.sampling for d in draws]
    top_k, top_p, min_p = (column([getattr(s, name) for s in settings]) for name in ("top_k", "top_p", "min_p"))
    scaled = logits / column([s.temperature for s in settings]).clamp(min=COLDEST)
    scores, ids = scaled.topk(depth)
    scores = scores.masked_fill((torch.arange(depth, device=logits.device) >= top_k) & (top_k > 0), -torch.inf)
    whole = torch.where(top_k > 0, scores.logsumexp(-1, keepdim=True), scaled.logsumexp(-1, keepdim=True))
    p = (scores - whole).exp()
    cut = p.cumsum(-1) - p >= top_p.clamp(min=1e-9)
    low = p < p[:, :1] * min_p
    kept = p.masked_fill(cut | low, 0).cumsum(-1)
    closed = (top_k > 0) | cut[:, -1:] | low[:, -1:]  # nothing beyond is kept
    most = kept[:, -1:]
    u = column([uniform(d.seed, len(d.tokens) - d.prompt) for d in draws]) * torch.where(closed, most, 1.0)
    below = torch.nextafter(most, torch.zeros_like(most))  # u may round to 1: the last token has a chance of 0
    u = torch.where(closed | (depth == logits.shape[1]), torch.minimum(u, below), u)
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
