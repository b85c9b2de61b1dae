"""The counts behind the benchmark of rollout in segments: iterations and rows carry no noise."""

from __future__ import annotations

import numpy as np
import pytest
from segment_rollout import Runner, Variant, Workload, variants

from treepo.base.keys import child_key

WORK = Workload(prompts_per_step=2, steps_per_epoch=3, epochs=2, n=4, mean_length=6, cap=24)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(WORK, WORK.slots)


def prescribed() -> np.ndarray:
    """[steps, responses a step], what the formula gives for each response."""
    lengths = [
        [WORK.length(p.problem_id, child_key(p.root_key, i)) for i in range(WORK.n)]
        for p in WORK.prompts()
    ]
    return np.array(lengths).reshape(-1, WORK.slots)


def test_whole_responses_take_as_many_iterations_as_the_longest_of_each_step(runner):
    served = runner.run(Variant(num_segments=1), WORK.prompts())
    lengths = prescribed()
    assert served.num_steps == len(lengths) == 6
    assert served.costs.sequential_steps == lengths.max(1).sum()
    assert served.trained_tokens == served.costs.generated_tokens == lengths.sum()
    # Every prompt once, and every drawn token but the last of each response.
    rows = 12 * WORK.prompt_length + lengths.sum() - lengths.size
    assert served.costs.query_tokens == rows
    assert served.cost(3.0, 8) == served.costs.sequential_steps + 3 * rows / 8


def test_segments_decode_the_same_responses_in_fewer_iterations_and_more_rows(runner):
    whole = runner.run(Variant(num_segments=1), WORK.prompts())
    cut = runner.run(Variant(num_segments=4), WORK.prompts())
    kept = runner.run(Variant(num_segments=4, keeps_kv=True), WORK.prompts())
    assert cut.lengths == kept.lengths == whole.lengths
    assert cut.costs.sequential_steps < whole.costs.sequential_steps
    assert cut.costs.query_tokens > whole.costs.query_tokens
    assert kept.costs.query_tokens < cut.costs.query_tokens
    assert whole.num_steps <= cut.num_steps <= whole.num_steps + 3


def test_lengths_are_lognormal_and_of_the_prompt_as_much_as_of_the_response():
    work = Workload(
        prompts_per_step=1, steps_per_epoch=1, epochs=1, n=1, mean_length=1000, cap=10**9
    )
    logs = np.log([[work.length(str(p), 1000 * p + r) for r in range(40)] for p in range(400)])
    assert np.exp(logs).mean() == pytest.approx(1000, rel=0.1)
    assert logs.mean(1).std() == pytest.approx(0.7, rel=0.1)
    assert (logs - logs.mean(1, keepdims=True)).std() == pytest.approx(0.7, rel=0.1)


def test_every_variant_has_a_name_of_its_own_and_a_run_to_compare_it_with():
    names = [variant.name for variant in variants(quick=False)]
    assert len(set(names)) == len(names)
    assert {variant.base for variant in variants(quick=False)} <= set(names)
