"""Draws against brute force in decimal arithmetic, long doubles and transformers."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from rollout.penalties import NO_TOKEN, Repetition
from rollout.sampler import (
    Group,
    SamplingParams,
    SamplingPlan,
    Workspace,
    log_probabilities,
    sample,
    sample_at,
    sample_plan,
)
from rollout.truncation import Truncation
from treepo.base.keys import Purpose, to_signed, uniform


def column(value, n, dtype=torch.float64):
    return torch.as_tensor(np.broadcast_to(value, n).copy(), dtype=dtype)


def truncation(n, top_p=1.0, top_k=0, min_p=0.0):
    return Truncation(
        top_p=column(top_p, n),
        top_k=column(top_k, n, torch.int64),
        min_p=column(min_p, n),
        max_top_k=int(np.max(top_k)),
    )


def settings(n, temperature=1.0, **truncated):
    return SamplingParams(
        temperature=column(temperature, n),
        truncation=truncation(n, **truncated) if truncated else None,
    )


def brute_force(logits, u, temperature, top_p=1.0, top_k=0, min_p=0.0):
    """(token, log-prob, log-prob after truncation) of one draw, token by token, in 50 digits."""
    with localcontext() as context:
        context.prec = 50
        x = [Decimal(float(v)) for v in logits]
        if temperature == 0:
            token = x.index(max(x))
            return token, float(x[token] - sum(v.exp() for v in x).ln()), 0.0
        weights = [(v / Decimal(temperature)).exp() for v in x]
        ranked = sorted(range(len(x)), key=lambda i: (-weights[i], i))
        kept = ranked[: top_k or len(x)]
        mass, total, nucleus = Decimal(0), sum(weights[i] for i in kept), []
        for i in kept:
            if top_p < 1 and mass >= Decimal(top_p) * total:
                break
            nucleus.append(i)
            mass += weights[i]
        nucleus = [i for i in nucleus if weights[i] >= Decimal(min_p) * weights[ranked[0]]]
        total, running, token = sum(weights[i] for i in nucleus), Decimal(0), -1
        for i in sorted(nucleus):
            running += weights[i]
            assert abs(running - Decimal(u) * total) > Decimal("1e-12") * total, "a near tie"
            if running > Decimal(u) * total:
                token = i
                break
        logprob = (weights[token] / sum(weights)).ln()
        return token, float(logprob), float((weights[token] / total).ln())


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
        settings(n, temperature, top_p=top_p, top_k=top_k, min_p=min_p),
        torch.tensor([to_signed(int(k)) for k in keys]),
        torch.from_numpy(positions),
    )
    exact = torch.from_numpy(logits).float().double().numpy()
    for i in range(n):
        u = uniform(int(keys[i]), int(positions[i]), Purpose.TOKEN)
        token, logprob, behaviour = brute_force(
            exact[i], u, temperature[i], top_p[i], int(top_k[i]), min_p[i]
        )
        assert int(draws.token_ids[i]) == token
        assert abs(float(draws.logprobs[i]) - logprob) < 1e-6
        assert abs(float(draws.sampling_logprobs[i]) - behaviour) < 1e-6


@pytest.mark.parametrize("spread", [0.01, 3.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_over_a_large_vocabulary_equal_those_in_long_doubles(spread, dtype):
    rng = np.random.default_rng(5)
    n, vocabulary = 6, 50_257
    logits = torch.from_numpy(rng.normal(0, spread, (n, vocabulary))).to(dtype)
    u = torch.from_numpy(rng.random(n))
    draws = sample_at(logits, settings(n, 0.8), u)
    for i in range(n):
        x = logits[i].double().numpy().astype(np.longdouble) / np.longdouble(0.8)
        weights = np.exp(x - x.max())
        cumulative = np.cumsum(weights)
        token = int(np.searchsorted(cumulative, u[i].item() * cumulative[-1], side="right"))
        assert int(draws.token_ids[i]) == token
        logprob = np.log(weights[token] / cumulative[-1])
        assert abs(float(draws.logprobs[i]) - float(logprob)) <= 1e-7 * max(1, -float(logprob))


def test_truncation_over_a_large_vocabulary_equals_full_sorting():
    # 40 thousand tokens of which many are equally likely, so that ties stand at every border
    rng = np.random.default_rng(6)
    vocabulary = 40_000
    cases = [(0.9, 0, 0.0), (1.0, 700, 0.0), (0.5, 50, 0.0), (1.0, 0, 0.3), (0.999, 0, 1e-6)]
    logits = torch.from_numpy(rng.normal(0, 2.5, (len(cases), vocabulary)).round(1))
    u = torch.from_numpy(rng.random(len(cases)))
    top_p, top_k, min_p = map(np.array, zip(*cases, strict=True))
    draws = sample_at(logits, settings(len(cases), top_p=top_p, top_k=top_k, min_p=min_p), u)
    for i, (p, k, least) in enumerate(cases):
        weights = np.exp(logits[i].numpy() - logits[i].max().item())
        order = np.argsort(-weights, kind="stable")[: k or vocabulary]
        before = np.cumsum(weights[order]) - weights[order]
        keep = order[(before < p * weights[order].sum()) & (weights[order] >= least)]
        kept = np.sort(keep)
        cumulative = np.cumsum(weights[kept])
        token = kept[np.searchsorted(cumulative, u[i].item() * cumulative[-1], side="right")]
        assert int(draws.token_ids[i]) == token
        behaviour = np.log(weights[token] / cumulative[-1])
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
    for kind in ("some", "all"):
        params = replace(settings(2, 0.0), greedy=kind, is_scaled=kind == "some")
        draws = sample(logits, params, torch.tensor([1, 2]), torch.tensor([0, 0]))
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
    logits = torch.randn(600, 1999, generator=generator)  # more than one piece of work
    params, keys, positions = settings(600, 0.9, top_p=0.95), torch.arange(600), torch.arange(600)
    together = sample(logits, params, keys, positions)
    for i in (0, 1, 261, 262, 263, 599):
        alone = sample(
            logits[i : i + 1], settings(1, 0.9, top_p=0.95), keys[i : i + 1], positions[i : i + 1]
        )
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]
        assert alone.sampling_logprobs[0] == together.sampling_logprobs[i]


def test_banned_tokens_are_never_drawn_and_their_ban_is_the_behaviour_policys_alone():
    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(2))
    banned = torch.tensor([[2, 5], [0, NO_TOKEN], [NO_TOKEN, NO_TOKEN]]).repeat(100, 1)
    params = replace(settings(300), banned=banned)
    draws = sample(logits, params, torch.arange(300), torch.arange(300))
    assert draws.is_finite.all()
    for i, (token, row) in enumerate(zip(draws.token_ids.tolist(), banned.tolist(), strict=True)):
        assert token not in row
        allowed = [t for t in range(7) if t not in row]
        plain = torch.log_softmax(logits[i].double(), 0)[token]
        behaviour = logits[i, token].double() - torch.logsumexp(logits[i, allowed].double(), 0)
        assert abs(float(draws.logprobs[i] - plain)) < 1e-6
        assert abs(float(draws.sampling_logprobs[i] - behaviour)) < 1e-6


def test_rows_of_broken_logits_or_with_every_token_banned_are_marked():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 1.0], [0.0, 1.0, inf], [-inf] * 3, [-inf, 0.0, -inf]])
    draws = sample(logits, settings(4), torch.arange(4), torch.zeros(4).long())
    assert draws.is_finite.tolist() == [False, False, False, True]
    assert draws.token_ids[3] == 1
    banned = torch.tensor([[0, 1, 2], [0, 1, NO_TOKEN]])
    params = replace(settings(2), banned=banned)
    draws = sample(torch.zeros(2, 3), params, torch.arange(2), torch.zeros(2).long())
    assert draws.is_finite.tolist() == [False, True]
    assert draws.token_ids[1] == 2


def test_the_repetition_penalty_is_that_of_transformers_and_grows_with_the_path():
    rng = np.random.default_rng(3)
    n, vocabulary, steps = 12, 23, 8
    penalty = rng.choice([1.3, 0.8, 1.0], n)
    paths = [rng.integers(0, vocabulary, rng.integers(1, 9)).tolist() for _ in range(n)]
    seen = torch.zeros(n + 5, vocabulary, dtype=torch.bool)
    rows = torch.from_numpy(rng.permutation(n + 5)[:n])
    for row, path in zip(rows, paths, strict=True):
        seen[row, path] = True
    repetition = Repetition(penalty=column(penalty, n), seen=seen, paths=rows)
    params = replace(settings(n, 0.9), repetition=repetition)
    keys = torch.arange(n)
    for step in range(steps):
        logits = torch.from_numpy(rng.normal(0, 3, (n, vocabulary)))
        positions = torch.full((n,), step)
        draws = sample(logits, params, keys, positions)
        for i, path in enumerate(paths):
            processor = RepetitionPenaltyLogitsProcessor(float(penalty[i]))
            scores = processor(torch.tensor([path]), logits[i : i + 1].clone())[0]
            u = uniform(i, step, Purpose.TOKEN)
            token, _, behaviour = brute_force(scores.numpy(), u, 0.9)
            assert int(draws.token_ids[i]) == token
            assert abs(float(draws.sampling_logprobs[i]) - behaviour) < 1e-6
            plain = torch.log_softmax(logits[i] / 0.9, 0)[token]
            assert abs(float(draws.logprobs[i] - plain)) < 1e-6
            path.append(token)


def test_entropy_and_top_logprobs_are_of_the_distribution_at_the_temperature_alone():
    logits = torch.randn(9, 33, generator=torch.Generator().manual_seed(4))
    params = replace(
        settings(9, 0.7, top_k=2),
        banned=torch.zeros(9, 1, dtype=torch.int64),
        num_top_logprobs=4,
        wants_entropy=True,
    )
    draws = sample(logits, params, torch.arange(9), torch.arange(9))
    expected = torch.log_softmax(logits.double() / 0.7, 1)
    entropy = -(expected.exp() * expected).sum(1)
    assert (draws.entropy - entropy).abs().max() < 1e-6
    values, tokens = expected.topk(4, dim=1)
    assert torch.equal(draws.top_token_ids, tokens)
    assert (draws.top_logprobs - values).abs().max() < 1e-6


def test_groups_of_a_plan_draw_as_they_do_alone():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(7))
    u = torch.from_numpy(np.random.default_rng(8).random(7))
    first, second, third = [5, 0], [1, 2, 6], [3, 4]
    groups = [
        (first, settings(2, 0.5)),
        (second, replace(settings(3, top_k=3), num_top_logprobs=2)),
        (third, replace(settings(2), wants_entropy=True, num_top_logprobs=5)),
    ]
    plan = SamplingPlan(
        groups=tuple(Group(rows=torch.tensor(rows), params=p) for rows, p in groups),
        order=torch.tensor(np.argsort(first + second + third)),
    )
    together = sample_plan(logits, plan, u, Workspace())
    for rows, params in groups:
        alone = sample_at(logits[rows], params, u[rows])
        assert torch.equal(together.token_ids[rows], alone.token_ids)
        assert torch.equal(together.sampling_logprobs[rows], alone.sampling_logprobs)
        n = params.num_top_logprobs
        if n:
            assert torch.equal(together.top_token_ids[rows, :n], alone.top_token_ids)
            assert torch.equal(together.top_logprobs[rows, :n], alone.top_logprobs)
        if params.wants_entropy:
            assert torch.equal(together.entropy[rows], alone.entropy)


def everything(n, vocabulary, device="cpu"):
    """Parameters with every part in use."""
    return SamplingParams(
        temperature=torch.arange(n, dtype=torch.float64, device=device) % 3 * 0.5,
        truncation=Truncation(
            top_p=torch.full((n,), 0.9, dtype=torch.float64, device=device),
            top_k=torch.full((n,), 7, device=device),
            min_p=torch.full((n,), 0.01, dtype=torch.float64, device=device),
            max_top_k=7,
        ),
        banned=torch.full((n, 2), 3, device=device),
        repetition=Repetition(
            penalty=torch.full((n,), 1.2, dtype=torch.float64, device=device),
            seen=torch.zeros(n, vocabulary, dtype=torch.bool, device=device),
            paths=torch.arange(n, device=device),
        ),
        num_top_logprobs=3,
        wants_entropy=True,
    )


def test_one_transfer_carries_all_of_the_draws():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(9))
    draws = sample(logits, everything(5, 30), torch.arange(5), torch.arange(5))
    host, unpacked = draws.to_host(), draws.unpack(draws.pack().numpy())
    for name in draws.__slots__:
        ours, theirs = getattr(host, name), getattr(unpacked, name)
        assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype, name
    plain = sample(logits, settings(5), torch.arange(5), torch.arange(5))
    unpacked = plain.unpack(plain.pack().numpy())
    assert unpacked.entropy is None and unpacked.top_token_ids is None
    assert np.array_equal(unpacked.logprobs, plain.logprobs.numpy())


def test_sampling_never_waits_for_a_gpu():
    # Meta tensors have no values: whatever the host would read of them raises an error.
    logits = torch.zeros(6, 40, dtype=torch.bfloat16, device="meta")
    keys = torch.arange(6, device="meta")
    ones = torch.ones(6, dtype=torch.float64, device="meta")
    for params in (
        everything(6, 40, "meta"),
        SamplingParams(temperature=ones, is_scaled=False, greedy="none"),
        SamplingParams(temperature=ones, is_scaled=False, greedy="all"),
    ):
        draws = sample(logits, params, keys, keys)
        assert draws.pack().shape[0] == 6
        for read in (lambda d: bool(d.is_finite.all()), lambda d: d.is_finite.nonzero()):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read(draws)


def test_scored_log_probabilities_equal_the_sampled_ones():
    logits = torch.randn(16, 11, generator=torch.Generator().manual_seed(1))
    draws = sample(logits, settings(16, 0.85, top_p=0.9), torch.arange(16), torch.arange(16))
    again = log_probabilities(logits, draws.token_ids, 0.85)
    assert (draws.logprobs - again).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.01, 3.0, 12.0])
def test_a_gpu_draws_what_a_cpu_draws(spread):
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(64, 151_936, generator=generator) * spread
    keys = torch.arange(64)
    for top_p in (1.0, 0.95):
        ours, theirs = [
            sample(
                logits.to(device),
                SamplingParams(
                    temperature=torch.full((64,), 0.9, dtype=torch.float64, device=device),
                    truncation=Truncation(
                        top_p=torch.full((64,), top_p, dtype=torch.float64, device=device),
                        top_k=torch.zeros(64, dtype=torch.int64, device=device),
                        min_p=torch.zeros(64, dtype=torch.float64, device=device),
                        max_top_k=0,
                    )
                    if top_p < 1
                    else None,
                ),
                keys.to(device),
                keys.to(device),
            ).to_host()
            for device in ("cpu", "cuda")
        ]
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert np.abs(ours.sampling_logprobs - theirs.sampling_logprobs).max() < 1e-6


@pytest.mark.gpu
def test_a_cuda_graph_of_the_sampler_draws_as_it_does_without():
    logits = torch.randn(6, 40, device="cuda")
    keys = positions = torch.arange(6, device="cuda")
    params = everything(6, 40, "cuda")
    expected = [sample(logits, params, keys, positions + step).pack() for step in range(3)]
    params.repetition.seen.zero_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample(logits, params, keys, positions)
    torch.cuda.synchronize()
    params.repetition.seen.zero_()
    graph, place = torch.cuda.CUDAGraph(), positions.clone()
    with torch.cuda.graph(graph):
        packed = sample(logits, params, keys, place).pack()
        place += 1
    for want in expected:
        graph.replay()
        assert torch.equal(packed, want)
