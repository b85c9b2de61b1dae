"""Transformers' ways to sample n responses to prompts, set up as the benchmarks use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """``n`` responses of exactly ``new_tokens`` tokens to each prompt, at temperature 1."""

    n: int
    new_tokens: int

    def config(self) -> GenerationConfig:
        """For a model without an end of sequence."""
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.new_tokens,
            num_return_sequences=self.n,
            pad_token_id=0,
        )


def generate_batch_run(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    page_size: int,
    pool_tokens: int | None = None,
) -> Callable[[], None]:
    """A run of ``model.generate_batch`` with a manager that lives on between calls.

    Args:
        prompts: of equal length.
        pool_tokens: new tokens a response that the pool has room for; None: those it draws.
    """
    length, total = len(prompts[0]), len(prompts) * sampling.n
    pages = -(-(length + (pool_tokens or sampling.new_tokens)) // page_size) + 1
    settings = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=pages * (total + len(prompts)),
        max_batch_tokens=max(256, len(prompts) * length, total),
    )
    config = sampling.config()

    def run() -> None:
        found = model.generate_batch(
            list(prompts),
            generation_config=config,
            continuous_batching_config=settings,
            persistent_manager=True,
        )
        assert len(found) == total
        assert all(len(one.generated_tokens) == sampling.new_tokens for one in found.values())

    return run
