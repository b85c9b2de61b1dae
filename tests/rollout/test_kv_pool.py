"""The slot allocator and the radix tree against what they must never do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.kv_pool import KVPool
from rollout.radix_tree import RadixTree


def make_pool(slots=50):
    return KVPool(slots, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("seed", range(5))
def test_random_allocations_never_overlap_and_free_space_joins_again(seed):
    rng, pool, held = np.random.default_rng(seed), make_pool(), []
    for _ in range(300):
        if rng.random() < 0.55:
            count = int(rng.integers(1, 12))
            slots = pool.allocate(count, at_end=bool(rng.integers(2)))
            assert (slots is None) == (count > 50 - sum(map(len, held)))
            if slots is not None:
                held.append(slots)
        elif held:
            slots = held.pop(int(rng.integers(len(held))))
            cut = int(rng.integers(len(slots) + 1))
            pool.free(rng.permutation(slots[cut:]))
            if cut:
                held.append(slots[:cut])
        every = np.concatenate([*held, *(np.arange(s, s + n) for s, n in pool.free_runs())])
        assert np.array_equal(np.sort(every), np.arange(50))
        assert pool.num_held == sum(map(len, held))
    for slots in held:
        pool.free(slots)
    assert pool.free_runs() == [(0, 50)]


def test_a_run_is_contiguous_where_one_is_free_and_goes_on_where_it_ended():
    pool = make_pool()
    first = pool.allocate(10)
    assert first.tolist() == list(range(10))
    assert pool.allocate_after(9, 5).tolist() == [10, 11, 12, 13, 14]
    assert pool.allocate(5, at_end=True).tolist() == [45, 46, 47, 48, 49]
    assert pool.allocate_after(9, 2).tolist() == [15, 16]  # taken: the next best


def test_freeing_a_free_slot_is_caught():
    pool = make_pool()
    slots = pool.allocate(4)
    pool.free(slots[1:3])
    with pytest.raises(AssertionError, match="already free"):
        pool.free(slots[2:])


def test_the_pool_takes_keys_and_values_of_different_width():
    pool = make_pool()
    slots = torch.tensor([3, 50])
    keys, values = pool.write(0, slots, torch.ones(2, 4, 6), torch.ones(2, 4, 5))
    assert keys.shape == (51, 4, 6) and values.shape == (51, 4, 5)
    assert keys[3].eq(1).all() and keys[4].eq(0).all()
    assert pool.bytes_per_slot == (4 * 6 + 4 * 5) * 4


def make_tree(slots=50):
    tree = RadixTree(make_pool(slots))
    return tree, tree.root(0)


def give_slots(tree, node):
    for n in node.path():
        missing = len(n.token_ids) - len(n.slots)
        if missing:
            tree.set_slots(n, np.concatenate([n.slots, tree.pool.allocate(missing)]))
            n.num_computed = len(n.slots)


def test_prompts_share_what_they_share():
    tree, root = make_tree()
    a = tree.insert(root, np.array([1, 2, 3, 4]))
    give_slots(tree, a)
    b = tree.insert(root, np.array([1, 2, 9]))
    assert a.parent is b.parent and a.parent.token_ids.tolist() == [1, 2]
    assert a.path_token_ids().tolist() == [1, 2, 3, 4]
    assert a.parent.num_computed == 2 and a.num_computed == 2
    assert tree.insert(root, np.array([1, 2])) is a.parent
    assert tree.match(root, np.array([1, 2, 3, 4, 5]))[1] == 4
    tree.check_integrity()


def test_a_lookup_follows_the_longest_of_equal_beginnings():
    tree, root = make_tree()
    open_nodes = [tree.open_child(root) for _ in range(2)]
    assert tree.match(root, np.array([7, 8]))[1] == 0  # growing nodes are not found
    tree.close(open_nodes[0], np.array([7, 8]), 0, 0)
    tree.close(open_nodes[1], np.array([7, 8, 9]), 0, 0)
    assert tree.match(root, np.array([7, 8, 9]))[0] is open_nodes[1]
    tree.check_integrity()


def test_locks_keep_whole_paths_and_eviction_takes_the_oldest_first():
    tree, root = make_tree()
    paths = [tree.insert(root, np.array([i, 5, 6])) for i in range(4)]
    below = tree.insert(paths[1], np.array([8, 8]))
    for node in [*paths, below]:
        give_slots(tree, node)
    tree.lock(below)
    assert tree.num_protected == 5
    paths[0].priority = 1
    assert tree.evict(1) == 3 and not paths[2].is_alive  # not the locked or the prior one
    assert tree.evict(100) == 6
    assert paths[1].is_alive and below.is_alive and not paths[0].is_alive
    tree.check_integrity()
    tree.unlock(below)
    assert tree.evict(100) == 5 and tree.pool.num_held == 0
    tree.check_integrity()


def test_roots_of_different_versions_share_nothing():
    tree, root = make_tree()
    give_slots(tree, tree.insert(root, np.array([1, 2, 3])))
    assert tree.match(tree.root(1), np.array([1, 2, 3]))[1] == 0


def test_closing_a_node_gives_back_what_it_did_not_use():
    tree, root = make_tree()
    node = tree.open_child(root)
    tree.set_slots(node, tree.pool.allocate(20))
    tree.lock(node)
    assert tree.num_protected == 20
    tree.close(node, np.array([4, 5, 6]), 2, 3)
    assert tree.num_protected == 3 and tree.pool.num_held == 3
    tree.check_integrity()
    with pytest.raises(AssertionError):
        tree.pool.free(node.slots)
        tree.check_integrity()


def test_dropping_a_path_stops_at_what_others_need():
    tree, root = make_tree()
    prompt = tree.insert(root, np.array([1, 2, 3]))
    a = tree.insert(prompt, np.array([4, 5]))
    tree.insert(prompt, np.array([6]))
    give_slots(tree, a)
    upper = tree.split(a, 1)
    tree.remove_upwards(a, 3)
    assert not a.is_alive and not upper.is_alive and prompt.is_alive
    assert tree.pool.num_held == 3
    tree.check_integrity()


def test_what_is_written_is_read_back_and_a_head_s_rows_lie_side_by_side_on_a_cpu():
    pool = KVPool(10, device=torch.device("cpu"), dtype=torch.float32)
    key, value = torch.randn(3, 2, 4), torch.randn(3, 2, 5)
    slots = torch.tensor([7, 2, pool.trash_slot])
    keys, values = pool.write(0, slots, key, value)
    assert keys.shape == (11, 2, 4) and values.shape == (11, 2, 5)
    assert torch.equal(keys[slots], key) and torch.equal(values[slots], value)
    assert keys.stride() == (4, 44, 1) and values.stride() == (5, 55, 1)
    assert pool.bytes_per_slot == 4 * (2 * 4 + 2 * 5)
    assert not keys[[0, 1, 3, 4, 5, 6, 8, 9]].any()
