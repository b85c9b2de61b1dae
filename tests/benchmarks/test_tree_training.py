"""The workloads behind the training benchmark: counts against numbers worked out by hand, equal
loss of both sides, and a memory count that sees what lives at the same time."""

from __future__ import annotations

import pytest
import torch
import tree_training
from shapes import qwen3_of_width
from training_trees import Workload, workloads
from tree_training import PeakMemory

from trainers import attention
from trainers.attention.nodes import make_plan
from trainers.model import PolicyModel
from trainers.packing import pack_row

SMALL = Workload(num_trees=2, levels=((1, 4), (2, 3), (4, 2)))


def test_counts_are_those_worked_out_by_hand():
    assert SMALL.path_length == 9 and SMALL.num_leaves == 8
    assert SMALL.tree_tokens == 2 * (4 + 6 + 8) and SMALL.flat_tokens == 8 * 9
    # root 1+2+3+4, two nodes of 5+6+7, four of 8+9
    assert SMALL.tree_pairs == 2 * (10 + 2 * 18 + 4 * 17)
    assert SMALL.flat_pairs == 8 * 45


@pytest.mark.parametrize("quick", [True, False])
def test_workloads_have_the_token_ratios_of_their_names(quick):
    for name, work in workloads(quick).items():
        assert work.token_ratio == pytest.approx(float(name), rel=0.02)
        assert quick or abs(work.tree_tokens - 4096) <= 16


@pytest.mark.parametrize("name", ["1", "1.5", "2", "4", "8"])
def test_a_row_s_tensors_and_its_calls_have_the_counted_tokens_and_pairs(name):
    work = workloads(True)[name]
    trees = work.trees()
    assert sum(tree.num_tokens for tree in trees) == work.tree_tokens
    paths = work.paths()
    assert sum(path.num_tokens for path in paths) == work.flat_tokens
    assert {path.num_tokens for path in paths} == {work.path_length}
    plan = make_plan(torch.cat([pack_row([tree]).visible_until for tree in trees[:1]]).numpy())
    padding = plan.num_tokens - trees[0].num_tokens
    assert plan.num_pairs == work.tree_pairs // work.num_trees + padding
    # weights and advantages are the sums over the paths
    for field in ("weight", "advantage_pos", "advantage_neg"):
        ours = sum(getattr(tree, field).double().sum() for tree in trees)
        theirs = sum(getattr(path, field).double().sum() for path in paths)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_both_sides_leave_the_same_gradients():
    attention.register()
    model = qwen3_of_width(128, num_layers=1, vocab=tree_training.VOCABULARY).train()
    policy = PolicyModel(model)
    rows = SMALL.flat_rows()
    assert len(rows) == 2  # four paths of nine tokens to a row of 36
    tree_training.tree_step(policy, SMALL.row())
    ours = tree_training.gradients(model)
    tree_training.flat_step(policy, rows, SMALL.path_length)
    theirs = tree_training.gradients(model)
    assert max(gradient.abs().max() for gradient in theirs) > 1e-3
    assert tree_training.gradient_error(ours, theirs) < 1e-4
    spoilt = [gradient.clone() for gradient in ours]
    spoilt[3] *= 1.01
    assert tree_training.gradient_error(spoilt, theirs) > 5e-3
    spoilt[5][0] = float("nan")
    with pytest.raises(AssertionError, match="not finite"):
        tree_training.gradient_error(spoilt, theirs)


def test_peak_memory_is_what_lives_at_the_same_time():
    base = torch.zeros(1000)
    with PeakMemory() as memory:
        first = base + 1
        view = first[:10]
        del first
        second = view + 1  # 10 numbers beside the 1000 that the view keeps
        del view, second
        third = base + 2
        third.add_(1)
    assert memory.peak == 4 * 1010 and memory.live == 4 * 1000
