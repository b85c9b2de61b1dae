"""The per-node back end against the dense one, over random trees, and the merge against plain
softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.attention import cpu
from rollout.attention.base import Block, LayerVariant
from rollout.attention.cpu import NodePlan
from rollout.attention.merge import MergeTable, merge_partials
from rollout.attention.reference import ReferencePlan
from rollout.attention.spans import lay_out
from rollout.kv_pool import KVPool
from rollout.radix_tree import RadixTree

NUM_SLOTS = 700


def random_tree(rng, *, num_nodes=12, max_tokens=9, scattered=False):
    """A random tree with slots, and blocks on some of its nodes that cover what is not computed."""
    pool = KVPool(NUM_SLOTS, device=torch.device("cpu"), dtype=torch.float64)
    tree = RadixTree(pool)
    holes = []
    nodes = [tree.root(0)]
    for _ in range(num_nodes):
        parent = nodes[rng.integers(len(nodes))]
        count = int(rng.integers(1, max_tokens + 1))
        node = tree.insert_private(parent, rng.integers(0, 50, count))
        if scattered:
            slots = np.concatenate(
                [
                    pool.allocate(1)
                    for _ in range(count)
                    if holes.append(pool.allocate(int(rng.integers(1, 3)))) is None
                ]
            )
            rng.shuffle(slots)
        else:
            slots = pool.allocate(count)
        tree.set_slots(node, slots)
        nodes.append(node)
    blocks = []
    for node in nodes[1:]:
        if rng.random() < 0.6:
            stop = len(node.token_ids)
            start = int(rng.integers(0, stop))
            blocks.append(Block(node, start, stop, node.token_ids[start:]))
    last = nodes[-1]
    if last not in [block.node for block in blocks]:
        stop = len(last.token_ids)
        blocks.append(Block(last, stop - 1, stop, last.token_ids[-1:]))
    rng.shuffle(blocks)
    return blocks


def by_head(tensor):
    """The same [slots, H, D] with a head's rows side by side in memory, as pools on a CPU have."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def tensors(rng, num_rows, *, heads=4, kv_heads=2, dk=8, dv=8, dtype=torch.float64, layout=None):
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    keys, values = draw(NUM_SLOTS + 1, kv_heads, dk), draw(NUM_SLOTS + 1, kv_heads, dv)
    if layout is not None:
        keys, values = layout(keys), layout(values)
    return draw(num_rows, heads, dk) * 2, keys, values


def both(blocks, rng, variant=None, **shape):
    """(per node, dense) for the same blocks."""
    ordered, spans = lay_out(blocks)
    positions = np.concatenate(
        [np.arange(b.node.start + b.start, b.node.start + b.stop) for b in ordered]
    )
    device = torch.device("cpu")
    plan = NodePlan(spans, positions, num_slots=NUM_SLOTS, slot_bytes=0, device=device)
    reference = ReferencePlan(ordered, device)
    query, keys, values = tensors(rng, len(positions), **shape)
    variant = variant or LayerVariant(scaling=0.3)
    return (
        plan.attend(query, keys, values, variant),
        reference.attend(query, keys, values, variant),
    )


@pytest.mark.parametrize("layout", [None, by_head])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_any_tree_gives_what_the_dense_mask_gives(seed, scattered, layout):
    rng = np.random.default_rng(seed)
    found, expected = both(random_tree(rng, scattered=scattered), rng, layout=layout)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("window", [1, 3, 7, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_any_window_gives_what_the_dense_mask_gives(seed, window):
    rng = np.random.default_rng(seed)
    blocks = random_tree(rng, num_nodes=20)
    found, expected = both(blocks, rng, LayerVariant(scaling=0.3, window=window))
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        (LayerVariant(scaling=0.5, softcap=1.5), {}),
        (LayerVariant(scaling=0.5, sinks=torch.tensor([2.0, -1.0, 0.0, 5.0])), {}),
        (LayerVariant(scaling=0.5, sinks=torch.ones(4), softcap=1.0, window=4), {}),
        (LayerVariant(scaling=0.5), {"dv": 5}),
        (LayerVariant(scaling=0.5), {"heads": 6, "kv_heads": 6, "dk": 5, "dv": 5}),
        (LayerVariant(scaling=0.5), {"heads": 8, "kv_heads": 1}),
    ],
)
def test_soft_caps_sinks_and_odd_heads_give_what_the_dense_mask_gives(variant, shape):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        found, expected = both(random_tree(rng), rng, variant, **shape)
        assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_lower_precision_differs_by_rounding_alone(dtype, tolerance):
    rng = np.random.default_rng(0)
    found, expected = both(random_tree(rng), rng, dtype=dtype)
    assert found.dtype == dtype
    assert (found.float() - expected.float()).abs().max() < tolerance


def test_long_spans_read_in_place_and_cut_blocks_change_nothing(monkeypatch):
    monkeypatch.setattr("rollout.attention.spans.MAX_CAUSAL_ROWS", 7)
    monkeypatch.setattr(cpu, "_MAX_MASK", 64)
    rng = np.random.default_rng(3)
    blocks = random_tree(rng, num_nodes=8, max_tokens=40)
    ordered, spans = lay_out(blocks)
    assert max(span.num_rows for span in spans if span.causal) <= 7
    positions = np.concatenate(
        [np.arange(b.node.start + b.start, b.node.start + b.stop) for b in ordered]
    )
    device = torch.device("cpu")
    query, keys, values = tensors(rng, len(positions))
    variant = LayerVariant(scaling=0.3)
    expected = ReferencePlan(ordered, device).attend(query, keys, values, variant)
    plan = NodePlan(spans, positions, num_slots=NUM_SLOTS, slot_bytes=1 << 20, device=device)
    assert (plan.attend(query, keys, values, variant) - expected).abs().max() < 1e-12


def test_a_deep_chain_has_no_more_spans_than_blocks():
    rng = np.random.default_rng(0)
    pool = KVPool(NUM_SLOTS, device=torch.device("cpu"), dtype=torch.float32)
    tree = RadixTree(pool)
    node = tree.root(0)
    for _ in range(40):
        node = tree.insert_private(node, rng.integers(0, 9, 3))
        tree.set_slots(node, pool.allocate(3))
    _, spans = lay_out([Block(node, 2, 3, node.token_ids[2:])])
    assert [(span.length, span.start) for span in spans] == [(120, 0)]


def chain(pool, tree, lengths, gap=0):
    """Nodes below each other with ``gap`` slots between them."""
    nodes = [tree.root(0)]
    for length in lengths:
        node = tree.insert_private(nodes[-1], np.zeros(length))
        tree.set_slots(node, pool.allocate(length))
        pool.allocate(gap)
        nodes.append(node)
    return nodes[1:]


@pytest.mark.parametrize(
    ("lengths", "gap", "expected"),
    [
        ((300, 5), 3, [(300, 0), (5, 300)]),  # far from what follows: each is read in place
        ((300, 5), 0, [(305, 0)]),  # one run
        ((200, 5), 3, [(205, 0)]),  # too short to be worth a span
        ((100, 200, 5), 3, [(305, 0)]),  # no run: it is gathered either way
    ],
)
def test_a_long_prompt_is_cut_off_where_that_lets_it_be_read_in_place(lengths, gap, expected):
    rng = np.random.default_rng(0)
    pool = KVPool(NUM_SLOTS, device=torch.device("cpu"), dtype=torch.float64)
    last = chain(pool, RadixTree(pool), lengths, gap)[-1]
    block = Block(last, 3, 5, last.token_ids[3:])
    _, spans = lay_out([block])
    assert [(span.length, span.start) for span in spans] == expected
    found, dense = both([block], rng)
    assert (found - dense).abs().max() < 1e-12


def test_rows_of_siblings_are_in_the_order_of_their_slots():
    pool = KVPool(NUM_SLOTS, device=torch.device("cpu"), dtype=torch.float64)
    tree = RadixTree(pool)
    (prompt,) = chain(pool, tree, [4])
    leaves = []
    for _ in range(5):  # growing segments take their slots from the end of the pool
        leaf = tree.insert_private(prompt, np.zeros(6))
        tree.set_slots(leaf, pool.allocate(6, at_end=True))
        leaves.append(leaf)
    ordered, _ = lay_out([Block(leaf, 5, 6, leaf.token_ids[5:]) for leaf in leaves])
    assert [block.node for block in ordered] == leaves[::-1]


def softmax_by_pieces(borders, *, num_rows=4, keys=9):
    """(attention over all keys [N, H, D], its partial results between ``borders``)."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(num_rows, 2, keys, generator=generator, dtype=torch.float64) * 4
    values = torch.randn(keys, 2, 5, generator=generator, dtype=torch.float64)

    def attention(part):
        weights = torch.softmax(scores[..., part], -1)
        return torch.einsum("nhk,khd->nhd", weights, values[part])

    parts = [slice(lo, hi) for lo, hi in zip(borders[:-1], borders[1:], strict=True)]
    lses = [torch.logsumexp(scores[..., part], -1) for part in parts]
    return attention(slice(0, keys)), [attention(part) for part in parts], lses


def test_two_partials_of_each_row_merge_to_one_softmax():
    whole, outputs, lses = softmax_by_pieces([0, 4, 9])
    table = MergeTable(np.tile(np.arange(4), 2), 4, torch.device("cpu"))
    assert (merge_partials(outputs, lses, table) - whole).abs().max() < 1e-14
    # the same partials in one piece, in another order
    order = [3, 1, 0, 2]
    table = MergeTable(np.array([0, 1, 2, 3, *order]), 4, torch.device("cpu"))
    outputs = [torch.cat([outputs[0], outputs[1][order]])]
    lses = [torch.cat([lses[0], lses[1][order]])]
    assert (merge_partials(outputs, lses, table) - whole).abs().max() < 1e-14


def test_a_row_with_one_partial_of_two_keeps_it_and_a_blind_one_takes_no_weight():
    whole, outputs, lses = softmax_by_pieces([0, 4, 9])
    rows = np.array([0, 1, 2, 3, -1, 1, 2, 3])  # row 0 has no second partial
    blind = lses[1].clone()
    blind[1] = float("-inf")  # row 1's second partial saw no key
    table = MergeTable(rows, 4, torch.device("cpu"))
    merged = merge_partials(outputs, [lses[0], blind], table)
    assert torch.equal(merged[:2], outputs[0][:2])
    assert (merged[2:] - whole[2:]).abs().max() < 1e-14


def test_merged_partials_equal_one_softmax_over_all_keys():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2, 10, generator=generator, dtype=torch.float64) * 4  # [N, H, keys]
    values = torch.randn(10, 2, 5, generator=generator, dtype=torch.float64)
    expected = torch.einsum("nhk,khd->nhd", torch.softmax(scores, -1), values)
    outputs, lses = [], []
    for part in (slice(0, 3), slice(3, 4), slice(4, 10)):
        outputs.append(
            torch.einsum("nhk,khd->nhd", torch.softmax(scores[..., part], -1), values[part])
        )
        lses.append(torch.logsumexp(scores[..., part], -1))
    # the second piece is computed for rows 2, 0 and some padding, and unseen by row 1
    scores_without = torch.cat([scores[1:2, :, :3], scores[1:2, :, 4:]], -1)
    expected[1] = torch.einsum(
        "nhk,khd->nhd",
        torch.softmax(scores_without, -1),
        torch.cat([values[:3], values[4:]]),
    )[0]
    order = [2, 0, 0]
    outputs[1], lses[1] = outputs[1][order], lses[1][order]
    rows = np.array([0, 1, 2, 2, 0, -1, 0, 1, 2])
    table = MergeTable(rows, 3, torch.device("cpu"))
    assert (merge_partials(outputs, lses, table) - expected).abs().max() < 1e-14
