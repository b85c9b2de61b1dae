"""What an update's loss is divided by."""

import numpy as np
import pytest
from scored_trees import flat, irregular
from training_runs import SMALL

from treepo.advantages import estimate
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.samples import token_trees
from treepo.step import mini_batches


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        # trained tokens of the irregular tree, once a leaf: 3, 8, 5, 5, none, 3; the flat one's
        ("token_mean", [24.0, 10.0]),
        ("sequence_mean", [5.0, 3.0]),
        ("fixed_length", [5 * 64.0, 3 * 64.0]),
    ],
)
def test_each_weighting_divides_an_update_by_what_it_says(weighting, expected):
    config = compose("train", TrainConfig, [*SMALL, f"algorithm.loss_weighting={weighting}"])
    groups = [irregular(), flat([1, 0, 0], [1, 2, 7])]
    trees = token_trees(groups, estimate(groups, config.algorithm), drop_untrained=True)
    (updates,) = mini_batches(trees, config, 64, key=0)  # two updates of one tree each
    found = sorted((rows[0].denominator for rows in updates), reverse=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_under_a_fixed_length_tokens_weigh_the_same_in_responses_of_any_length():
    config = compose("train", TrainConfig, [*SMALL, "algorithm=dr_grpo"])
    groups = [flat([1, 0, 0], [1, 2, 7])]
    (a,) = estimate(groups, config.algorithm)
    assert a.leaf_weight.tolist() == [1, 1, 1]
    np.testing.assert_allclose(a.leaf_advantage, [2 / 3, -1 / 3, -1 / 3])
