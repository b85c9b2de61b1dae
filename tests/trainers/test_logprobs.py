"""Log-probabilities and entropies in chunks, against a softmax over all logits at once."""

from __future__ import annotations

import pytest
import torch

from trainers.logprobs import token_logprobs

NUM_TOKENS, HIDDEN, VOCABULARY = 23, 6, 11


def inputs():
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    return (
        torch.randn(NUM_TOKENS, HIDDEN, **draw).requires_grad_(),
        torch.randn(VOCABULARY, HIDDEN, **draw).requires_grad_(),
        torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator),
        torch.rand(NUM_TOKENS, **draw) + 0.5,
        torch.randn(2, NUM_TOKENS, **draw),  # of a loss of both results
    )


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 22, 23, 100])
def test_chunks_change_neither_values_nor_gradients(chunk_size, entropy_grad):
    hidden, weight, token_ids, temperature, upstream = inputs()
    found = token_logprobs(
        lambda h: h @ weight.T, hidden, token_ids, temperature, chunk_size, entropy_grad
    )
    (torch.stack(found) * upstream).sum().backward()

    whole_hidden, whole_weight, *_ = inputs()
    table = torch.log_softmax(whole_hidden @ whole_weight.T / temperature[:, None], -1)
    expected = table[torch.arange(NUM_TOKENS), token_ids], -(table.exp() * table).sum(-1)
    loss = torch.stack([expected[0], expected[1] if entropy_grad else expected[1].detach()])
    (loss * upstream).sum().backward()
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, whole_hidden.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, whole_weight.grad, rtol=1e-12, atol=1e-12)


def test_chunks_bound_how_many_logits_are_alive():
    hidden, weight, token_ids, temperature, _ = inputs()
    largest = []

    def logits(rows):
        largest.append(len(rows))
        return rows @ weight.T

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        token_logprobs(logits, hidden, token_ids, temperature, 5)
    assert max(largest) == 5 and max(kept) < NUM_TOKENS * VOCABULARY


def test_a_temperature_of_0_counts_as_1():
    hidden, weight, token_ids, temperature, _ = inputs()
    cold = token_logprobs(lambda h: h @ weight.T, hidden, token_ids, temperature * 0, 100)
    plain = token_logprobs(lambda h: h @ weight.T, hidden, token_ids, temperature * 0 + 1, 100)
    assert torch.equal(cold[0], plain[0]) and torch.equal(cold[1], plain[1])
