"""The exact quantile over ranks, against numpy's of all values together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainers import quantile
from trainers.quantile import global_quantile


def of_numpy(values, q):
    return float(np.quantile(np.asarray(values, np.float32), q, method="inverted_cdf"))


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 10_000])
@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_it_is_the_order_statistic_that_numpy_gives(count, q):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator).mul(3).exp()  # over many magnitudes
    assert global_quantile(values, q) == of_numpy(values, q)


def test_ties_zeros_and_neighbouring_floats_are_told_apart():
    one = np.float32(1)
    values = [0.0] * 50 + [1.0] * 49 + [float(np.nextafter(one, np.float32(2)))]
    for q in (0.5, 0.501, 0.99, 0.995):
        assert global_quantile(torch.tensor(values), q) == of_numpy(values, q)


def test_without_values_it_is_0_and_nan_is_the_largest():
    assert global_quantile(torch.zeros(0), 0.99) == 0.0
    assert global_quantile(torch.tensor([1.0, 2.0, float("nan")]), 0.6) == 2.0
    assert np.isnan(global_quantile(torch.tensor([1.0, float("nan")]), 0.99))


def test_counts_are_added_up_over_ranks(monkeypatch):
    """Two ranks, the second simulated by adding its counts: real ones are in test_ranks.py."""
    generator = torch.Generator().manual_seed(1)
    own, other = torch.rand(70, generator=generator), torch.rand(40, generator=generator) * 2
    both = torch.cat([own, other])
    counted = []

    def add_other_rank(counts):
        bits = other.view(torch.int32).long()
        if counted:  # the second count: lower halves within the bin that the first one found
            wanted = torch.tensor(of_numpy(both, 0.99)).view(torch.int32).long() >> 16
            bits = bits[bits >> 16 == wanted] & 0xFFFF
        else:
            bits = bits >> 16
        counted.append(True)
        return counts + torch.bincount(bits, minlength=len(counts))

    monkeypatch.setattr(quantile, "_summed", add_other_rank)
    assert global_quantile(own, 0.99) == of_numpy(both, 0.99)
