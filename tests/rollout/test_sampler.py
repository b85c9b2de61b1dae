"""Draws against brute force in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.sampler import SamplingParams, inverse_cdf, log_probabilities, sample
from treepo.base.keys import Purpose, to_signed, uniform


def settings(n, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    def column(value, dtype):
        return torch.as_tensor(np.broadcast_to(value, n).copy(), dtype=dtype)

    return SamplingParams(
        temperature=column(temperature, torch.float64),
        top_p=column(top_p, torch.float64),
        top_k=column(top_k, torch.int64),
        min_p=column(min_p, torch.float64),
        truncates=bool(
            np.any(np.asarray(top_p) < 1) or np.any(top_k) or np.any(np.asarray(min_p) > 0)
        ),
    )


def brute_force(logits, u, temperature, top_p, top_k, min_p):
    """(token, log-prob, log-prob after truncation) of one draw, token by token."""
    x = [float(v) for v in logits]
    if temperature == 0:
        token = x.index(max(x))
        z = np.log(sum(np.exp(v - max(x)) for v in x)) + max(x)
        return token, x[token] - z, 0.0
    x = [v / temperature for v in x]
    peak = max(x)
    weights = [np.exp(v - peak) for v in x]
    ranked = sorted(range(len(x)), key=lambda i: (-weights[i], i))
    kept = ranked[: top_k or len(x)]
    mass, total, nucleus = 0.0, sum(weights[i] for i in kept), []
    for i in kept:
        if top_p < 1 and mass >= top_p * total:
            break
        nucleus.append(i)
        mass += weights[i]
    nucleus = [i for i in nucleus if weights[i] >= min_p * weights[ranked[0]]]
    total, running, token = sum(weights[i] for i in sorted(nucleus)), 0.0, -1
    for i in sorted(nucleus):
        running += weights[i]
        token = i
        if running > u * total:
            break
    all_total = sum(weights)
    return token, np.log(weights[token] / all_total), np.log(weights[token] / total)


@pytest.mark.parametrize("seed", range(6))
def test_every_draw_equals_the_brute_force_inverse_cdf(seed):
    rng = np.random.default_rng(seed)
    n, vocabulary = 64, 19
    logits = rng.normal(0, 2, (n, vocabulary)).round(1)  # rounded: ties occur
    temperature = rng.choice([0.0, 0.7, 1.0, 1.3], n)
    top_p = rng.choice([1.0, 0.9, 0.5, 0.05], n)
    top_k = rng.choice([0, 1, 3, 100], n)
    min_p = rng.choice([0.0, 0.1, 0.6], n)
    keys = rng.integers(0, 1 << 63, n, dtype=np.uint64) * 2 + 1
    positions = rng.integers(0, 5000, n)
    draws = sample(
        torch.from_numpy(logits).float(),
        settings(n, temperature, top_p, top_k, min_p),
        torch.tensor([to_signed(int(k)) for k in keys]),
        torch.from_numpy(positions),
    )
    exact = torch.from_numpy(logits).float().double().numpy()
    for i in range(n):
        u = uniform(int(keys[i]), int(positions[i]), Purpose.TOKEN)
        token, logprob, behaviour = brute_force(
            exact[i], u, temperature[i], top_p[i], top_k[i], min_p[i]
        )
        assert int(draws.token_ids[i]) == token
        assert abs(float(draws.logprobs[i]) - logprob) < 1e-6
        assert abs(float(draws.sampling_logprobs[i]) - behaviour) < 1e-6


def test_frequencies_follow_the_distribution():
    n, logits = 40_000, torch.tensor([0.0, 1.0, -1.0, 0.5])
    draws = sample(
        logits.expand(n, 4), settings(n, 0.8), torch.arange(n) * 7919, torch.full((n,), 3)
    )
    expected = torch.softmax(logits.double() / 0.8, 0) * n
    observed = torch.bincount(draws.token_ids, minlength=4)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 0.999 quantile with 3 degrees of freedom


def test_greedy_takes_the_lowest_of_tied_tokens():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    draws = sample(logits, settings(2, 0.0), torch.tensor([1, 2]), torch.tensor([0, 0]))
    assert draws.token_ids.tolist() == [1, 0]
    assert draws.sampling_logprobs.tolist() == [0.0, 0.0]
    assert abs(float(draws.logprobs[1]) - np.log(0.25)) < 1e-6


def test_top_k_keeps_the_lower_ids_of_a_tie():
    logits = torch.zeros(200, 5)
    draws = sample(logits, settings(200, top_k=2), torch.arange(200), torch.zeros(200).long())
    assert set(draws.token_ids.tolist()) == {0, 1}


def test_a_nucleus_smaller_than_the_likeliest_token_is_greedy():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    draws = sample(logits, settings(50, top_p=1e-9), torch.arange(50), torch.zeros(50).long())
    assert torch.equal(draws.token_ids, logits.argmax(1))
    assert draws.sampling_logprobs.abs().max() == 0


def test_a_draw_does_not_depend_on_its_company():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 57, generator=generator)
    params, keys, positions = settings(33, 0.9, 0.95), torch.arange(33), torch.arange(33)
    together = sample(logits, params, keys, positions)
    for i in range(33):
        alone = sample(
            logits[i : i + 1], settings(1, 0.9, 0.95), keys[i : i + 1], positions[i : i + 1]
        )
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]


def test_the_inverse_cdf_never_draws_a_token_of_no_weight():
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).expand(5, 5)
    edges = torch.tensor([2.0**-53, 0.5 - 2.0**-53, 0.5, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert inverse_cdf(weights, edges).tolist() == [1, 1, 3, 3, 3]


def test_banned_tokens_are_never_drawn_and_broken_logits_are_an_error():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(20, 3)
    draws = sample(logits, settings(20), torch.arange(20), torch.zeros(20).long())
    assert set(draws.token_ids.tolist()) == {1}
    broken = torch.tensor([[0.0, float("nan"), 1.0]])
    with pytest.raises(ValueError, match="not finite"):
        sample(broken, settings(1), torch.tensor([1]), torch.tensor([0]))


def test_scored_log_probabilities_equal_the_sampled_ones():
    logits = torch.randn(16, 11, generator=torch.Generator().manual_seed(1))
    draws = sample(logits, settings(16, 0.85, 0.9), torch.arange(16), torch.arange(16))
    again = log_probabilities(logits, draws.token_ids, 0.85)
    assert (draws.logprobs - again).abs().max() < 1e-6
