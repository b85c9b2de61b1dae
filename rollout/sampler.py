"""Logits to tokens by the inverse of the cumulative distribution, in float64.

One uniform a draw, named by (path key, position, purpose), walks the cumulative probabilities in
order of token id. Nothing else enters, so a draw does not depend on the company it is made in.

Truncation keeps a set of tokens: first the ``top_k`` likeliest, then of these the smallest set of
likeliest whose renormalised probability reaches ``top_p``, then those at least ``min_p`` times as
likely as the likeliest. Ties go to the lower token id, so the set is unique.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from treepo.base.keys import Purpose, uniforms


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplingParams:
    """One row's settings a row, all [N]; see ``rollout.extend.ExtendSpec``.

    Attributes:
        temperature: float64, 0 is greedy.
        top_p, min_p: float64.
        top_k: int64, 0 keeps all.
        truncates: whether any row has top_p, top_k or min_p set.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    truncates: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draws:
    """``token_ids`` int64 [N]; ``logprobs`` and ``sampling_logprobs`` float32 [N] as in
    ``rollout.extend.ExtendResult``.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    sampling_logprobs: torch.Tensor


def sample(
    logits: torch.Tensor, params: SamplingParams, keys: torch.Tensor, positions: torch.Tensor
) -> Draws:
    """Draw one token a row.

    Args:
        logits: [N, V], any float dtype.
        keys, positions: int64 [N], see ``treepo.base.keys.uniforms``.

    Raises:
        ValueError: a row of logits is not finite at its peak.
    """
    greedy = params.temperature == 0
    scaled = logits.to(torch.float64)
    scaled = scaled / torch.where(greedy, 1.0, params.temperature).unsqueeze(1)
    peak = scaled.amax(dim=1, keepdim=True)
    if not bool(torch.isfinite(peak).all()):
        raise ValueError("the model gave logits that are not finite: its weights are broken")
    scaled = scaled - peak
    weights = torch.exp(scaled)
    total = weights.sum(dim=1)
    kept = _truncate(weights, params) if params.truncates else weights
    token_ids = inverse_cdf(kept, uniforms(keys, positions, Purpose.TOKEN))
    if bool(greedy.any()):
        token_ids = torch.where(greedy, _first_peak(scaled), token_ids)
    chosen = scaled.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    logprobs = chosen - torch.log(total)
    behaviour = chosen - torch.log(kept.sum(dim=1)) if params.truncates else logprobs
    behaviour = torch.where(greedy, 0.0, behaviour)
    return Draws(
        token_ids=token_ids,
        logprobs=logprobs.to(torch.float32),
        sampling_logprobs=behaviour.to(torch.float32),
    )


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative weight exceeds ``uniform`` of the total.

    Args:
        weights: float64 [N, V], >= 0, not all 0 in a row.
        uniform: float64 [N] in (0, 1).

    Returns:
        int64 [N]; never a token of weight 0.
    """
    cumulative = torch.cumsum(weights, dim=1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # Rounding can put the target on the total itself; then the last token of the support is meant.
    columns = torch.arange(weights.shape[1], device=weights.device)
    last = (
        torch.where(weights > 0, columns, -1).amax(dim=1)
        if bool((found >= weights.shape[1]).any())
        else found
    )
    return torch.minimum(found, last)


def log_probabilities(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """float32 [N]: log-probs of ``token_ids`` under softmax(logits / temperature) (softmax(logits)
    at 0), computed in float64 as the sampler does.
    """
    scaled = logits.to(torch.float64) / (temperature or 1.0)
    chosen = scaled.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return (chosen - torch.logsumexp(scaled, dim=1)).to(torch.float32)


def _first_peak(scaled: torch.Tensor) -> torch.Tensor:
    """The lowest token id among the likeliest; ``scaled`` has its peaks at 0."""
    columns = torch.arange(scaled.shape[1], device=scaled.device)
    return torch.where(scaled == 0, columns, scaled.shape[1]).amin(dim=1)


def _truncate(weights: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """``weights`` with the tokens outside the kept set at 0."""
    vocabulary = weights.shape[1]
    ranked, order = torch.sort(weights, dim=1, descending=True, stable=True)
    top_k = torch.where(params.top_k == 0, vocabulary, params.top_k).unsqueeze(1)
    ranked = torch.where(torch.arange(vocabulary, device=weights.device) < top_k, ranked, 0.0)
    before = torch.cumsum(ranked, dim=1) - ranked
    top_p = params.top_p.unsqueeze(1)
    whole = ranked.sum(dim=1, keepdim=True)
    # A token stays while the ones before it do not reach top_p; top_p = 1 drops nothing, whatever
    # the cumulative sums round to.
    keep = (top_p >= 1) | (before < top_p * whole)
    keep &= ranked >= params.min_p.unsqueeze(1) * ranked[:, :1]
    return torch.zeros_like(weights).scatter(1, order, torch.where(keep, ranked, 0.0))
