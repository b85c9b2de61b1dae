"""The tree kernels and their plan against the dense mask, through Triton's interpreter on a CPU and
natively on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_trees import TreeMaker, laid_out, last_token, random_tensors

from rollout.attention.base import Block, LayerVariant
from rollout.attention.reference import ReferencePlan
from rollout.attention.tree_plan import Capacity, DeviceWork, TreePlan
from rollout.attention.work_list import SpanTable, work_list

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# The interpreter turns one-element arrays into integers, which numpy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
PLAIN = LayerVariant(scaling=0.25)


def assert_like_the_dense_mask(
    blocks, seed, variant=PLAIN, dtype=torch.float32, tolerance=None, **shape
):
    """A plan over ``blocks`` gives what the dense mask gives."""
    ordered, spans, positions = laid_out(blocks)
    query, keys, values = random_tensors(seed, len(positions), dtype=dtype, device=DEVICE, **shape)
    found = TreePlan(spans, positions, device=DEVICE).attend(query, keys, values, variant)
    assert_close(found, ordered, query, keys, values, variant, tolerance)


def assert_close(found, ordered, query, keys, values, variant=PLAIN, tolerance=None):
    expected = ReferencePlan(ordered, DEVICE).attend(query, keys, values, variant)
    assert found.dtype == query.dtype and found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() < (tolerance or TOLERANCE[query.dtype])


@pytest.fixture
def short_items(monkeypatch):
    """Items so short that small trees have many."""
    monkeypatch.setattr("rollout.attention.work_list.KEYS", 8)
    monkeypatch.setattr("rollout.attention.work_list.MANY_ROWS_KEYS", 32)
    monkeypatch.setattr("rollout.attention.work_list.MANY_ROWS", 12)
    monkeypatch.setattr("rollout.attention.work_list.MANY_CAUSAL_ROWS", 6)


@pytest.mark.parametrize("seed", range(6))
def test_any_ragged_tree_gives_what_the_dense_mask_gives(seed, short_items):
    blocks = TreeMaker(seed).random(10, 20)
    assert_like_the_dense_mask(blocks, seed)


@pytest.mark.parametrize("seed", range(3))
def test_trees_of_one_token_nodes_give_what_the_dense_mask_gives(seed):
    blocks = TreeMaker(seed).random(12, 1)
    assert_like_the_dense_mask(blocks, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_all_head_sizes_and_types_give_what_the_dense_mask_gives(head_dim, dtype):
    blocks = TreeMaker(head_dim).random(5, 12)
    shape = dict(head_dim=head_dim, heads=2, kv_heads=1)
    assert_like_the_dense_mask(blocks, 0, LayerVariant(scaling=head_dim**-0.5), dtype, **shape)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (7, 1), (6, 2), (40, 1), (28, 4)])
def test_all_group_sizes_give_what_the_dense_mask_gives(heads, kv_heads):
    blocks = TreeMaker(heads).random(6, 8)
    assert_like_the_dense_mask(blocks, heads, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 16), (16, 40), (192, 128)])
def test_values_narrower_or_wider_than_keys_give_what_the_dense_mask_gives(head_dim, value_dim):
    blocks = TreeMaker(0).random(6, 8)
    shape = dict(head_dim=head_dim, value_dim=value_dim, heads=2, kv_heads=2)
    assert_like_the_dense_mask(blocks, 0, LayerVariant(scaling=head_dim**-0.5), **shape)


@pytest.mark.parametrize("window", [1, 3, 7, 20, 1000])
def test_any_window_gives_what_the_dense_mask_gives(window, short_items):
    for seed in range(2):
        blocks = TreeMaker(seed).random(8, 24)
        assert_like_the_dense_mask(blocks, seed, LayerVariant(scaling=0.25, window=window))


@pytest.mark.parametrize(
    "variant",
    [
        LayerVariant(scaling=0.5, softcap=1.5),
        LayerVariant(scaling=0.5, softcap=50.0),
        LayerVariant(scaling=0.5, sinks=torch.tensor([2.0, -1.0, 0.0, 5.0], device=DEVICE)),
        LayerVariant(
            scaling=0.5, sinks=torch.ones(4, device=DEVICE).bfloat16(), softcap=1.0, window=4
        ),
    ],
)
def test_soft_caps_and_sinks_give_what_the_dense_mask_gives(variant, short_items):
    for seed in range(2):
        blocks = TreeMaker(seed).random(8, 12)
        # a soft cap's tanh comes out of a difference: its error grows with the cap
        tolerance = 4e-6 * max(1.0, variant.softcap or 0.0)
        assert_like_the_dense_mask(blocks, seed, variant, tolerance=tolerance)


VARIANTS = {
    "window": dict(window=5),
    "softcap": dict(softcap=5.0),
    "sinks": dict(sinks=torch.tensor([2.0, -1.0, 0.0, 5.0], device=DEVICE)),
    "all": dict(window=3, softcap=2.0, sinks=torch.ones(4, device=DEVICE)),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_variants_in_all_types_on_trees_with_empty_nodes_give_what_the_dense_mask_gives(
    variant, dtype, short_items
):
    maker = TreeMaker(len(variant))
    blocks = maker.random(9, 9, empty=0.35)
    assert any(not len(node.slots) for node in above(blocks)), "no empty node"
    added = LayerVariant(scaling=0.3, **VARIANTS[variant])
    # see below for soft caps; in 16 bits the result's own rounding is larger
    widened = max(1.0, added.softcap or 0.0) if dtype == torch.float32 else 1.0
    assert_like_the_dense_mask(blocks, 3, added, dtype, TOLERANCE[dtype] * widened)


def above(blocks):
    """All nodes on the blocks' paths but the root."""
    found = set()
    for block in blocks:
        node = block.node
        while node.parent is not None:
            found.add(node)
            node = node.parent
    return found


@pytest.mark.parametrize("seed", range(4))
def test_blocks_without_rows_and_nodes_without_tokens_change_nothing(seed, short_items):
    blocks = TreeMaker(seed).random(12, 10, share=0.7, empty=0.4)
    assert any(not block.num_rows for block in blocks)
    assert_like_the_dense_mask(blocks, seed)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 33, 64])
def test_any_number_of_rows_below_a_node_gives_what_the_dense_mask_gives(num_rows):
    maker = TreeMaker(num_rows)
    prompt = maker.node(maker.root, 70)
    blocks = [last_token(maker.open_node(prompt, 2), 1) for _ in range(num_rows)]
    assert_like_the_dense_mask(blocks, 0)


@pytest.mark.parametrize("start", [0, 33])
def test_a_long_prompt_computed_in_one_forward_gives_what_the_dense_mask_gives(start, short_items):
    maker = TreeMaker(0)
    node = maker.node(maker.node(maker.root, 75), 90)
    assert_like_the_dense_mask([Block(node, start, 90, node.token_ids[start:])], 0)


def growing_tree(maker, num_rows, reserved):
    """Open nodes at several depths, some below shared nodes, with how many tokens each has."""
    prompt = maker.node(maker.root, 21)
    branch = maker.node(prompt, 5)
    parents = [prompt, branch, maker.node(branch, 1), maker.node(maker.root, 30)]
    nodes = [maker.open_node(parents[i % 4], reserved) for i in range(num_rows)]
    return {
        node: int(count)
        for node, count in zip(nodes, maker.rng.integers(1, 4, num_rows), strict=True)
    }


@pytest.mark.parametrize("window", [None, 10])
def test_a_plan_that_advances_and_drops_rows_gives_what_the_dense_mask_gives(window, short_items):
    variant = LayerVariant(scaling=0.25, window=window)
    maker = TreeMaker(5)
    counts = growing_tree(maker, 5, 20)
    ordered, spans, positions = laid_out([last_token(n, c) for n, c in counts.items()])
    nodes = [block.node for block in ordered]
    plan = TreePlan(spans, positions, device=DEVICE)
    for step in range(14):
        if step % 4 in (0, 1):
            query, keys, values = random_tensors(step, len(nodes), device=DEVICE)
            found = plan.attend(query, keys, values, variant)
            expected = [last_token(node, counts[node]) for node in nodes]
            assert_close(found, expected, query, keys, values, variant)
        if step in (3, 8):
            goes_on = maker.rng.random(len(nodes)) < 0.7
            goes_on[0] = True
            plan.keep(goes_on)
            nodes = [node for node, goes in zip(nodes, goes_on, strict=True) if goes]
        plan.advance()
        counts = {node: count + 1 for node, count in counts.items()}


def test_a_plan_whose_rows_got_more_slots_gives_what_the_dense_mask_gives(short_items):
    maker = TreeMaker(12)
    counts = growing_tree(maker, 6, 4)
    ordered, spans, positions = laid_out([last_token(n, c) for n, c in counts.items()])
    nodes = [block.node for block in ordered]
    plan = TreePlan(spans, positions, device=DEVICE)
    for step in range(6):
        more = {}
        for row, node in enumerate(nodes):
            if counts[node] >= len(node.slots) - step % 2:  # some before they need them
                more[row] = maker.slots(int(maker.rng.integers(2, 5)))
                maker.tree.set_slots(node, np.concatenate([node.slots, more[row]]))
        if more:
            plan.extend(dict(reversed(more.items())))
        if step == 2:
            plan.keep(np.array([True, True, False, True, False, True]))
            nodes = [node for i, node in enumerate(nodes) if i not in (2, 4)]
        plan.advance()
        counts = {node: count + 1 for node, count in counts.items()}
        if step in (0, 3, 5):
            query, keys, values = random_tensors(step, len(nodes), device=DEVICE)
            expected = [last_token(node, counts[node]) for node in nodes]
            assert_close(plan.attend(query, keys, values, PLAIN), expected, query, keys, values)
    made = SpanTable.of(laid_out([last_token(n, counts[n]) for n in nodes])[1])
    table = plan.table
    for i, j in zip(table.own_spans(4), made.own_spans(4), strict=True):
        mine = table.slots[table.offset[i] : table.offset[i] + table.capacity[i]]
        theirs = made.slots[made.offset[j] : made.offset[j] + made.capacity[j]]
        # a new layout may join what two rows that ended shared with what is theirs alone
        assert mine.tolist() == theirs[-len(mine) :].tolist()


def test_an_advance_changes_the_buffer_as_a_new_plan_would_fill_it():
    maker = TreeMaker(6)
    counts = growing_tree(maker, 6, 16)
    blocks = [last_token(n, c) for n, c in counts.items()]
    _, spans, positions = laid_out(blocks)
    table = SpanTable.of(spans)
    work = work_list(table, positions, 2)
    made = DeviceWork(Capacity.of(table, work), DEVICE)
    made.load(table, work, positions)
    before = made.buffer.data_ptr()
    for _ in range(3):
        made.advance()
    ordered, spans, positions = laid_out([last_token(n, c + 3) for n, c in counts.items()])
    table = SpanTable.of(spans)
    other = DeviceWork(Capacity.of(table, work), DEVICE)
    other.load(table, work_list(table, positions, 2), positions)
    assert torch.equal(made.buffer, other.buffer) and made.buffer.data_ptr() == before
    expected = [int(b.node.slots[b.stop - 1]) for b in ordered]
    assert made.last_slots(999).tolist() == expected


def test_padding_rows_and_rows_beyond_what_is_reserved_write_to_the_trash_slot():
    maker = TreeMaker(7)
    node = maker.open_node(maker.node(maker.root, 9), 3)
    _, spans, positions = laid_out([last_token(node, 2)])
    table = SpanTable.of(spans)
    work = work_list(table, positions, 1)
    made = DeviceWork(Capacity.of(table, work).rounded(4, 1, 100), DEVICE)
    made.load(table, work, positions)
    seen = []
    for _ in range(3):
        seen.append(made.last_slots(999).tolist())
        made.advance()
    rest = [999] * 3
    assert seen == [[int(node.slots[1]), *rest], [int(node.slots[2]), *rest], [999, *rest]]


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_a_rounded_buffer_gives_the_same_results_and_nothing_for_padding_rows(groups, short_items):
    from rollout.attention.triton_tree import attend

    maker = TreeMaker(8)
    counts = growing_tree(maker, 11, 16)
    _, spans, positions = laid_out([last_token(n, c) for n, c in counts.items()])
    table = SpanTable.of(spans)
    work = work_list(table, positions, groups)
    shape = dict(heads=groups, kv_heads=1, device=DEVICE)
    query, keys, values = random_tensors(0, 16, **shape)
    capacity = Capacity.of(table, work)
    rounded = capacity.rounded(16, groups, len(table.slots) + 50)
    assert rounded.holds(capacity) and not capacity.holds(rounded)
    made = DeviceWork(rounded, DEVICE)
    made.load(table, work, positions)
    found = attend(query, keys, values, made.work, PLAIN)
    expected = TreePlan(spans, positions, device=DEVICE).attend(query[:11], keys, values, PLAIN)
    assert torch.equal(found[:11], expected) and not found[11:].any()


def test_a_path_is_cut_at_the_same_depths_whoever_forks_off_it(monkeypatch):
    monkeypatch.setattr("rollout.attention.work_list.KEYS", 10)
    maker = TreeMaker(9)
    prompt = maker.node(maker.root, 33)
    leaf = maker.node(prompt, 18)
    block = Block(leaf, 17, 18, leaf.token_ids[17:])
    other = maker.node(prompt, 4)

    def borders(blocks):
        ordered, spans, positions = laid_out(blocks)
        work = work_list(SpanTable.of(spans), positions, 1)
        row = next(i for i, b in enumerate(ordered) if b is block)
        assert all(b.num_rows == 1 for b in ordered)
        mine = work.order[work.row_start[row] : work.row_start[row + 1]]
        runs = {
            int(base) + r: (int(start + low), int(start + high))
            for _, low, high, _, base, _, start, _, num_rows in work.small
            for r in range(num_rows)
        }
        return [runs[partial] for partial in mine.tolist()]

    alone = borders([block])
    assert alone == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50), (50, 51)]
    forked = borders([block, Block(other, 3, 4, other.token_ids[3:])])
    assert forked == [*alone[:3], (30, 33), (33, 40), *alone[4:]]


def test_a_result_does_not_depend_on_the_company_it_is_computed_in(short_items):
    maker = TreeMaker(10)
    prompt = maker.node(maker.root, 40)
    nodes = [maker.open_node(prompt, 4) for _ in range(4)]
    query, keys, values = random_tensors(0, 4, device=DEVICE)

    def answers(chosen):
        ordered, spans, positions = laid_out([last_token(nodes[i], 2) for i in chosen])
        rows = torch.tensor([nodes.index(block.node) for block in ordered])
        plan = TreePlan(spans, positions, device=DEVICE)
        found = plan.attend(query[rows], keys, values, PLAIN)
        return dict(zip(rows.tolist(), found, strict=True))

    all_four, two = answers([0, 1, 2, 3]), answers([3, 1])
    assert torch.equal(all_four[1], two[1]) and torch.equal(all_four[3], two[3])


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rollout.attention import triton_tree as tt

def compiled(kernel, types, constants, target, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or "stride" in n]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)

ints = dict.fromkeys(["items", "slots", "lengths", "positions", "row_start", "order"], "*i32")
for target, kind, size, head_dim, value_dim, tile, variant in [
    (80, "fp16", 2, 96, 96, 64, False), (90, "bf16", 2, 128, 128, 64, True),
    (90, "bf16", 2, 128, 128, 16, False), (90, "bf16", 2, 256, 256, 64, False),
]:
    block_n, block_k, block_v, stages = tt.block_sizes(head_dim, value_dim, size)
    floats = {"query": "*" + kind, "keys": "*" + kind, "values": "*" + kind, "outputs": "*fp32",
              "lses": "*fp32", "scaling": "fp32", "softcap": "fp32"}
    constants = dict(HEAD_DIM=head_dim, VALUE_DIM=value_dim, GROUPS=7, COLUMNS=9,
                     HAS_SOFTCAP=variant, HAS_WINDOW=variant, WIDEN=False, BLOCK_M=tile,
                     BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_V=block_v)
    made = compiled(tt._attend_items, ints | floats, constants, target,
                    num_warps=4, num_stages=stages)
    assert made.metadata.shared <= 99 * 1024, (head_dim, tile, made.metadata.shared)
    assert "mma" in made.asm["ptx"]  # tensor cores
    assert stages == 1 or "cp.async" in made.asm["ptx"]  # keys loaded ahead
floats = {"outputs": "*fp32", "lses": "*fp32", "result": "*bf16", "sinks": "*bf16"}
compiled(tt._merge_rows, ints | floats, dict(VALUE_DIM=128, HAS_SINKS=True, BLOCK_P=16,
         BLOCK_V=128), 90, num_warps=2)
print("compiled")
"""


def test_the_kernels_compile_for_gpus_onto_tensor_cores_and_into_little_shared_memory(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]
