"""Estimators of the KL divergence, against the divergence itself over a small vocabulary."""

from __future__ import annotations

import pytest
import torch

from trainers.kl import kl_terms


def distributions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), torch.log_softmax(logits[1], -1)


def expectation(logits, reference, kind):
    """The estimator's mean over the policy's own samples, whose draw has no gradient."""
    logprobs = torch.log_softmax(logits, -1)
    return (logprobs.detach().exp() * kl_terms(logprobs, reference, kind)).sum()


def divergence(one, other):
    return (one.exp() * (one - other)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_have_the_divergence_as_their_mean(kind):
    logits, reference = distributions()
    exact = divergence(torch.log_softmax(logits, -1), reference)
    assert expectation(logits, reference, kind).item() == pytest.approx(exact.item(), rel=1e-12)


def test_gradients_on_average_are_those_that_the_file_says():
    logits, reference = distributions()
    logprobs = torch.log_softmax(logits, -1)
    exact = {
        "k1": torch.zeros_like(logits),
        "k2": torch.autograd.grad(divergence(logprobs, reference), logits, retain_graph=True)[0],
        "k3": torch.autograd.grad(divergence(reference, logprobs), logits)[0],
    }
    for kind, gradient in exact.items():
        (own,) = torch.autograd.grad(expectation(logits, reference, kind), logits)
        torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-12, msg=kind)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_and_0_where_the_two_agree(kind):
    apart = torch.arange(-50, 51) / 10
    terms = kl_terms(apart, torch.zeros(101), kind)
    assert (terms >= 0).all() and terms[50] == 0 and (terms[[0, 100]] > 1).all()
