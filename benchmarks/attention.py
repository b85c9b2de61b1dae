"""One attention layer of a decode step: per tree node against gathering each path for SDPA.

Both read the same keys. Per node, the queries that share a run of keys are one product over it, and
partial results merge by log-sum-exp. The other way copies the whole path of every query out of the
pool by slot numbers and calls torch's scaled_dot_product_attention, as engines with a paged cache
do on a CPU; paths have equal lengths here, so that it needs no padding. Indices are prepared
beforehand for both, and each has keys in the layout that suits it: ours as the pool keeps them, the
other token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from harness import (
    Gate,
    Options,
    Report,
    device_in_words,
    finish,
    parse_args,
    print_table,
    run_paired,
    speedup,
)

from rollout.attention.base import Block, LayerVariant
from rollout.attention.cpu import NodePlan
from rollout.attention.spans import lay_out
from rollout.kv_pool import KVPool
from rollout.radix_tree import RadixTree, TreeNode

HEADS, KV_HEADS, WIDTH = 14, 2, 64  # of Qwen2.5-0.5B
CPU = torch.device("cpu")
PER_NODE, GATHERED = "per_node", "gathered"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A tree that forks ``fork`` ways at the prompt and at each of ``depth - 1`` further levels.

    Attributes:
        prompt, segment: tokens of the prompt and of each segment below it.
    """

    dtype: str
    prompt: int
    segment: int
    fork: int
    depth: int = 1

    @property
    def num_paths(self) -> int:
        return self.fork**self.depth

    @property
    def name(self) -> str:
        shape = f"{self.fork}" + (f"^{self.depth}" if self.depth > 1 else "")
        return f"{self.dtype}, prompt {self.prompt}, {shape} paths, segments of {self.segment}"


def build(case: Case) -> tuple[KVPool, list[Block]]:
    """The tree in a pool of random keys and values, and the last token of every path as a row."""
    nodes = sum(case.fork**level for level in range(1, case.depth + 1))
    pool = KVPool(case.prompt + nodes * case.segment, device=CPU, dtype=torch.float32)
    tree = RadixTree(pool)

    def grow(parent: TreeNode, count: int) -> TreeNode:
        node = tree.insert_private(parent, np.zeros(count, np.int32))
        slots = pool.allocate(count)
        assert slots is not None
        tree.set_slots(node, slots)
        return node

    level = [grow(tree.root(0), case.prompt)]
    for _ in range(case.depth):
        level = [grow(node, case.segment) for node in level for _ in range(case.fork)]
    last = case.segment - 1
    return pool, [Block(node, last, last + 1, node.token_ids[last:]) for node in level]


def layer(case: Case) -> dict[str, Callable[[], torch.Tensor]]:
    """The two ways to compute the layer, each giving [N, H, D]."""
    pool, blocks = build(case)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(getattr(torch, case.dtype))

    query = draw(len(blocks), HEADS, WIDTH)
    keys = draw(pool.num_slots + 1, KV_HEADS, WIDTH)
    values = draw(pool.num_slots + 1, KV_HEADS, WIDTH)
    ours = pool.write(0, torch.arange(len(keys)), keys, values)
    ordered, spans = lay_out(blocks)
    positions = np.array([block.node.start + block.start for block in ordered])
    plan = NodePlan(
        spans,
        positions,
        num_slots=pool.num_slots,
        slot_bytes=2 * KV_HEADS * WIDTH * keys.element_size(),
        device=CPU,
    )
    variant = LayerVariant(scaling=WIDTH**-0.5)
    paths = torch.from_numpy(
        np.stack([np.concatenate([n.slots for n in b.node.path()]) for b in ordered])
    )

    def gathered() -> torch.Tensor:
        key, value = keys[paths].transpose(1, 2), values[paths].transpose(1, 2)  # [N, Hkv, L, D]
        found = torch.nn.functional.scaled_dot_product_attention(
            query.unsqueeze(2), key, value, scale=variant.scaling, enable_gqa=True
        )
        return found.squeeze(2)

    return {PER_NODE: lambda: plan.attend(query, *ours, variant), GATHERED: gathered}


def keys_read(case: Case) -> dict[str, int]:
    """Keys that each way reads: the tree's once, or every path's."""
    nodes = sum(case.fork**level for level in range(1, case.depth + 1))
    path = case.prompt + case.depth * case.segment
    return {PER_NODE: case.prompt + nodes * case.segment, GATHERED: case.num_paths * path}


def cases(quick: bool) -> list[Case]:
    dtypes = ("float32", "bfloat16")
    if quick:
        return [Case(dtype=dtype, prompt=512, segment=32, fork=16) for dtype in dtypes]
    shapes = [
        dict(prompt=512, segment=64, fork=16),
        dict(prompt=2048, segment=64, fork=16),
        dict(prompt=2048, segment=64, fork=64),
        dict(prompt=512, segment=128, fork=2, depth=4),
        dict(prompt=2048, segment=128, fork=4, depth=3),
    ]
    return [Case(dtype=dtype, **shape) for dtype in dtypes for shape in shapes]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    torch.set_num_threads(1)
    rounds = 5 if options.quick else 20
    ratios, timings, counts, rows = {}, {}, {}, []
    for case in cases(options.quick):
        runs = layer(case)
        error = float((runs[PER_NODE]().float() - runs[GATHERED]().float()).abs().max())
        assert error < (1e-5 if case.dtype == "float32" else 3e-2), f"results differ by {error}"
        with torch.inference_mode():
            seconds = run_paired(runs, rounds=rounds, warmup=2)
        faster = speedup(seconds, PER_NODE, GATHERED)
        ratios[case.name] = faster.median
        medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
        timings[case.name] = {"seconds": medians, "speedup": faster}
        counts[case.name] = keys_read(case)
        read = keys_read(case)
        rows.append(
            (
                case.name,
                *(1e6 * s for s in medians.values()),
                faster.median,
                read[GATHERED] / read[PER_NODE],
            )
        )
    header = ("one layer", "per node, us", "gathered, us", "speedup", "keys read, quotient")
    print_table("attention of a decode step", header, rows)
    _report(options, rounds, ratios, counts, timings)


def _report(options: Options, rounds: int, ratios, counts, timings) -> None:
    typical = float(np.median(list(ratios.values())))
    report = Report(
        name="attention",
        device=device_in_words(),
        settings={
            "quick": options.quick,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_size": WIDTH,
            "rounds": rounds,
        },
        ratios={"per_node_vs_gathered": ratios, "median": typical},
        counts={"keys_read": counts},
        timings=timings,
        gates=[Gate(name="per node against gathered, median case", value=typical, at_least=10.0)],
    )
    finish(report, options)


if __name__ == "__main__":
    main()
