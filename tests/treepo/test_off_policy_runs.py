"""Runs in segments with corrections and masks: which tokens are old is what their trees say."""

from __future__ import annotations

import pytest
from test_segment_runs import FLAT, settings
from training_runs import finish, step_trees

from treepo.tracking import read_rows

pytestmark = pytest.mark.long

OFF = "trainer.learner.off_policy"
OLDEST = 1
MASKS = [
    "algorithm.filter_groups=false",
    "trainer.learner.old_logprobs=recomputed",
    "trainer.learner.optimizer.lr=1e-3",
    f"{OFF}.correction=tis",
    f"{OFF}.mask_older_than={OLDEST}",
    f"{OFF}.masked_in_denominator=false",
    "trainer.learner.mpt.gate=batch",
    "trainer.learner.mpt.max_entropy=1.0",
    "trainer.learner.mpt.min_reward=0.5",
    "trainer.total_steps=8",
]


def ages_by_leaf(trees: list[dict], version: int) -> list[int]:
    """Of every response's sampled tokens: how many versions old each is."""
    ages = []
    for tree in trees:
        for leaf in tree["leaves"]:
            node = leaf["node"]
            while node > 0:
                here = tree["nodes"][node]
                for drawn_by, count in here["version_runs"]:
                    ages += [version - drawn_by] * count
                node = here["parent"]
    return ages


@pytest.mark.parametrize("choices", [FLAT, []], ids=["flat", "treepo"])
def test_old_tokens_of_segmented_runs_are_masked_by_their_own_versions(tmp_path, choices):
    folder = finish(tmp_path, settings(tmp_path, *choices, *MASKS))
    rows = [
        row for row in read_rows(folder / "metrics.jsonl")[1:] if not row["training/skipped_steps"]
    ]
    for row in rows:
        ages = ages_by_leaf(
            step_trees(folder, row["step"]), int(row["training/policy_version"]) - 1
        )
        assert min(ages) >= 0
        masked = sum(age > OLDEST for age in ages) / len(ages)
        # of the step's updates the mean, by weight: with one weight a token that of all its tokens
        assert row["actor/old_masked_frac"] == pytest.approx(masked, abs=1e-6)
        assert row["actor/masked_frac"] >= row["actor/old_masked_frac"] - 1e-9
        assert row["training/staleness/max"] == max(ages)
    assert max(row["actor/old_masked_frac"] for row in rows) > 0.2
    assert max(row["actor/mpt_masked_frac"] for row in rows) > 0.02
    assert any(row["training/rollout_is_eff_sample_size"] < 0.9999 for row in rows)
