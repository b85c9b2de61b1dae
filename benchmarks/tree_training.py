"""Training on packed trees against training on their leaves' paths as sequences: step time, memory.

A step is forward and backward of the clipped loss. The tree side runs the packed row through
``PolicyModel``. The flat side has each leaf's whole path as a sequence of its own, in batches of as
many tokens as the row has (so both may use the same memory), through the same model with
transformers' ``sdpa`` attention, which is causal and has no mask; head, loss and denominator are
the same. Both give the same gradient, which is compared.

A workload is ``(number of nodes, tokens each)`` by level; all leaves' paths are equally long. With
``n_k`` nodes of ``s_k`` tokens at level k and w leaves, a tree has ``sum n_k s_k`` tokens and its
paths ``w sum s_k``: their quotient is the token ratio.
"""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import (
    Gate,
    Options,
    Report,
    Spread,
    device_in_words,
    finish,
    parse_args,
    print_table,
    run_paired,
    speedup,
)
from shapes import qwen3_of_width
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from trainers import attention
from trainers.attention.nodes import make_plan
from trainers.batch import PackedBatch, TokenTree
from trainers.losses import POLICY_LOSSES, TrainedTokens
from trainers.model import PolicyModel
from trainers.packing import pack_row, total_weight
from trainers.settings import PolicyLossSettings

VOCABULARY = 4096
IDS = 512  # that occur, so that rows fit every model
TREE, FLAT, AGAIN = "tree", "flat", "flat again"
AIM = 0.8  # of the token ratio, from width 512 on
MOST_NOISE = 0.02  # that the gate on time without sharing allows for
SETTINGS = PolicyLossSettings()


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """``num_trees`` trees in a row; ``levels``: (nodes of a tree, tokens of each)."""

    levels: tuple[tuple[int, int], ...]
    num_trees: int

    @property
    def path_length(self) -> int:
        return sum(tokens for _, tokens in self.levels)

    @property
    def num_leaves(self) -> int:
        return self.num_trees * self.levels[-1][0]

    @property
    def tree_tokens(self) -> int:
        return self.num_trees * sum(count * tokens for count, tokens in self.levels)

    @property
    def flat_tokens(self) -> int:
        return self.num_leaves * self.path_length

    @property
    def token_ratio(self) -> float:
        return self.flat_tokens / self.tree_tokens

    @property
    def tree_pairs(self) -> int:
        """Visible query-key pairs of a layer: a token at depth d sees d."""
        pairs = depth = 0
        for count, tokens in self.levels:
            pairs += count * (tokens * depth + tokens * (tokens + 1) // 2)
            depth += tokens
        return self.num_trees * pairs

    @property
    def flat_pairs(self) -> int:
        return self.num_leaves * self.path_length * (self.path_length + 1) // 2

    def tree(self, seed: int) -> TokenTree:
        """One tree with random tokens and advantages; all tokens but the first are trained."""
        return _Grower(self.levels, torch.Generator().manual_seed(seed)).tree()

    def trees(self) -> list[TokenTree]:
        return [self.tree(seed) for seed in range(self.num_trees)]


class _Grower:
    """Builds a tree's tensors in depth-first order."""

    def __init__(self, levels: Sequence[tuple[int, int]], generator: torch.Generator) -> None:
        self.levels = levels
        self.generator = generator
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.until: list[int] = []
        self.leaf_token: list[int] = []

    def tree(self) -> TokenTree:
        for _ in range(self.levels[0][0]):
            self._grow(0, -1, 0)
        count, num_leaves = len(self.parent), len(self.leaf_token)
        leaf_advantage = torch.randn(num_leaves, generator=self.generator)
        pos, neg, weight = torch.zeros(count), torch.zeros(count), torch.zeros(count)
        for token, advantage in zip(self.leaf_token, leaf_advantage, strict=True):
            while token >= 0:
                pos[token] += advantage.clamp(min=0)
                neg[token] += advantage.clamp(max=0)
                weight[token] += 1
                token = self.parent[token]
        for values in (pos, neg, weight):
            values[0] = 0  # nothing predicts it
        zeros = torch.zeros(count)
        length = self.depth[self.leaf_token[0]]
        return TokenTree(
            token_ids=torch.randint(IDS, (count,), generator=self.generator),
            position_ids=torch.tensor(self.depth),
            visible_until=torch.tensor(self.until),
            predictor=torch.tensor(self.parent),
            advantage_pos=pos,
            advantage_neg=neg,
            weight=weight,
            behaviour_logprobs=zeros,
            sampling_logprobs=zeros,
            temperature=torch.ones(count),
            policy_version=torch.zeros(count, dtype=torch.int64),
            leaf_token=torch.tensor(self.leaf_token),
            leaf_advantage=leaf_advantage,
            leaf_weight=torch.ones(num_leaves),
            leaf_num_tokens=torch.full((num_leaves,), length),
            leaf_reward=(leaf_advantage > 0).float(),
        )

    def _grow(self, level: int, parent: int, depth: int) -> None:
        first = len(self.parent)
        tokens = self.levels[level][1]
        for _ in range(tokens):
            self.parent.append(parent)
            self.depth.append(depth)
            self.until.append(-1)
            parent, depth = len(self.parent) - 1, depth + 1
        if level + 1 == len(self.levels):
            self.leaf_token.append(parent)
        else:
            for _ in range(self.levels[level + 1][0] // self.levels[level][0]):
                self._grow(level + 1, parent, depth)
        self.until[first : first + tokens] = [len(self.parent)] * tokens


def paths_of(tree: TokenTree) -> list[TokenTree]:
    """Each leaf's path as a tree with one leaf."""
    paths = []
    for number, leaf in enumerate(tree.leaf_token.tolist()):
        index = [leaf]
        while (above := int(tree.predictor[index[-1]])) >= 0:
            index.append(above)
        at = torch.tensor(index[::-1])
        count, advantage = len(at), tree.leaf_advantage[number]
        weight = torch.ones(count)
        weight[0] = 0
        paths.append(
            TokenTree(
                token_ids=tree.token_ids[at],
                position_ids=tree.position_ids[at],
                visible_until=torch.full((count,), count),
                predictor=torch.arange(count) - 1,
                advantage_pos=weight * advantage.clamp(min=0),
                advantage_neg=weight * advantage.clamp(max=0),
                weight=weight,
                behaviour_logprobs=tree.behaviour_logprobs[at],
                sampling_logprobs=tree.sampling_logprobs[at],
                temperature=tree.temperature[at],
                policy_version=tree.policy_version[at],
                leaf_token=torch.tensor([count - 1]),
                leaf_advantage=advantage[None],
                leaf_weight=torch.ones(1),
                leaf_num_tokens=torch.tensor([count - 1]),
                leaf_reward=tree.leaf_reward[number][None],
            )
        )
    return paths


def loss_of(row: PackedBatch, logprobs: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The clipped loss of the row's trained tokens ``index``, as the learner computes it for
    tokens that these weights sampled.
    """
    tokens = TrainedTokens(
        logprobs=logprobs,
        entropy=torch.zeros_like(logprobs),
        old_logprobs=logprobs.detach(),
        advantage_pos=row.advantage_pos[index],
        advantage_neg=row.advantage_neg[index],
        weight=row.weight[index],
        index=index,
        batch=row,
    )
    return POLICY_LOSSES.get(SETTINGS.name)(tokens, SETTINGS).loss.sum() / row.denominator


def tree_step(policy: PolicyModel, row: PackedBatch) -> None:
    """Forward and backward of a packed row; gradients are left in the parameters."""
    policy.zero_grad()
    policy.model.set_attn_implementation(attention.NAME)
    index = torch.nonzero(row.weight > 0).squeeze(1)
    logprobs, _ = policy(row, index)
    loss_of(row, logprobs, index).backward()


def flat_step(policy: PolicyModel, rows: Sequence[PackedBatch], length: int) -> None:
    """The same of rows of sequences of ``length`` tokens, each row as a batch of transformers."""
    policy.zero_grad()
    policy.model.set_attn_implementation("sdpa")
    for row in rows:
        index = torch.nonzero(row.weight > 0).squeeze(1)
        num_sequences = row.leaf_token.shape[0]
        token_ids = row.token_ids[: num_sequences * length]  # less the row's padding
        output = policy.model.base_model(
            input_ids=token_ids.view(num_sequences, length), use_cache=False
        ).last_hidden_state.flatten(0, 1)
        hidden = output[row.predictor[index]]
        logprobs, _ = policy.head(hidden, row.token_ids[index], row.temperature[index])
        loss_of(row, logprobs, index).backward()


def flat_rows(work: Workload, trees: Sequence[TokenTree]) -> list[PackedBatch]:
    """All paths, as many to a row as the trees' row has tokens; the trees' denominator."""
    paths = [path for tree in trees for path in paths_of(tree)]
    each = max(1, work.tree_tokens // work.path_length)
    denominator = total_weight(trees)
    return [pack_row(paths[at : at + each], denominator) for at in range(0, len(paths), each)]


def gradient_error(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Largest difference over the largest entry, of the worst parameter; finite."""
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    # max() and comparisons would let NaN through.
    assert all(map(math.isfinite, errors)), f"gradients that are not finite: {errors}"
    return max(errors)


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live; ``peak``: the most at a
    time. What was there before isn't counted, nor what a kernel takes and gives back inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known_before = {
            tensor.untyped_storage()._cdata
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), known_before)
        return result

    def _note(self, storage: torch.UntypedStorage, known_before: set[int]) -> None:
        at = storage._cdata
        if at in self._known or at in known_before:
            return
        size = storage.nbytes()
        self._known.add(at)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, at, size)

    def _forget(self, at: int, size: int) -> None:
        self._known.discard(at)
        self.live -= size


def peak_bytes(step: Callable[[], object], policy: PolicyModel) -> int:
    """Of a step, gradients included."""
    policy.zero_grad()
    gc.collect()
    with PeakMemory() as memory:
        step()
    return memory.peak


def workloads(quick: bool) -> dict[str, Workload]:
    """By token ratio; paths of 512 tokens and about 4,096 tokens a row, an eighth if ``quick``."""
    full = {
        "1": Workload(num_trees=8, levels=((1, 512),)),
        "1.5": Workload(num_trees=6, levels=((1, 344), (2, 168))),
        "2": Workload(num_trees=4, levels=((1, 256), (2, 128), (4, 128))),
        "4": Workload(num_trees=2, levels=((1, 192), (2, 96), (4, 128), (8, 48), (16, 48))),
        "8": Workload(num_trees=4, levels=((1, 384), (2, 64), (4, 32), (8, 16), (16, 16))),
    }
    if not quick:
        return full
    return {
        name: Workload(
            num_trees=max(1, work.num_trees // 2),
            levels=tuple((count, tokens // 8) for count, tokens in work.levels),
        )
        for name, work in full.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one workload on one model took."""

    seconds: dict[str, list[float]]
    gradient_error: float
    peak_bytes: dict[str, int]
    pairs: dict[str, int]


def measure(policy: PolicyModel, work: Workload, rounds: int) -> Found:
    """Tree and flat in turns; without sharing flat a second time, which shows the noise."""
    trees = work.trees()
    row, rows = pack_row(trees), flat_rows(work, trees)
    found: dict[str, list[torch.Tensor]] = {}

    def tree() -> None:
        tree_step(policy, row)
        found[TREE] = gradients(policy.model)

    def flat() -> None:
        flat_step(policy, rows, work.path_length)
        found[FLAT] = gradients(policy.model)

    # These steps warm up, too. From the second row on flat needs what it needs for every row.
    peaks = {
        TREE: peak_bytes(lambda: tree_step(policy, row), policy),
        FLAT: peak_bytes(lambda: flat_step(policy, rows[:2], work.path_length), policy),
    }
    runs = {TREE: tree, FLAT: flat}
    if work.flat_tokens == work.tree_tokens:
        runs[AGAIN] = flat
        rounds = 3 * rounds
    seconds = run_paired(runs, rounds=rounds, warmup=0, clock=time.process_time)
    plan = make_plan(row.visible_until.numpy())
    return Found(
        seconds=seconds,
        gradient_error=gradient_error(found[TREE], found[FLAT]),
        peak_bytes=peaks,
        pairs={TREE: plan.num_pairs, FLAT: work.flat_pairs, "visible": work.tree_pairs},
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    torch.set_num_threads(1)
    attention.register()
    models = {128: 1} if options.quick else {256: 2, 512: 2, 1024: 1}  # width -> layers
    rounds = 2
    works = workloads(options.quick)
    found: dict[int, dict[str, Found]] = {}
    parameters: dict[int, int] = {}
    for width, num_layers in models.items():
        model = qwen3_of_width(width, num_layers=num_layers, vocab=VOCABULARY).train()
        parameters[width] = sum(p.numel() for p in model.parameters())
        policy = PolicyModel(model)
        found[width] = {}
        for name, work in works.items():
            found[width][name] = measure(policy, work, rounds)
            _show(width, work, found[width][name])
    finish(_report(found, works, models, parameters, rounds, options), options)


def _show(width: int, work: Workload, found: Found) -> None:
    faster = speedup(found.seconds, TREE, FLAT)
    print_table(
        f"width {width}, token ratio {work.token_ratio:.2f}",
        ("run", "CPU seconds", "peak MB", "pairs"),
        [
            (name, Spread.of(found.seconds[name]).median, peak / 1e6, found.pairs[name])
            for name, peak in found.peak_bytes.items()
        ],
    )
    print(
        f"  speedup {faster.median:.2f} ({faster.min:.2f} to {faster.max:.2f}), "
        f"{faster.median / work.token_ratio:.2f} of the token ratio; "
        f"gradients differ by {found.gradient_error:.1e}"
    )


def _report(
    found: dict[int, dict[str, Found]],
    works: dict[str, Workload],
    models: dict[int, int],
    parameters: dict[int, int],
    rounds: int,
    options: Options,
) -> Report:
    speedups = {
        f"width {width}": {name: speedup(one.seconds, TREE, FLAT) for name, one in by_work.items()}
        for width, by_work in found.items()
    }
    overhead = {
        width: speedup(by_name["1"].seconds, FLAT, TREE).median for width, by_name in found.items()
    }
    # Two runs of the same differ by this much; the gate on time without sharing leaves it room, up
    # to MOST_NOISE: a noisy machine is no excuse for being slower.
    noise = {
        width: abs(speedup(by_name["1"].seconds, AGAIN, FLAT).median - 1)
        for width, by_name in found.items()
    }
    error = max(one.gradient_error for by_work in found.values() for one in by_work.values())
    some = next(iter(found.values()))
    gates = [
        Gate(
            name=f"speedup over the token ratio, width {width}, ratio {name}",
            value=speedups[f"width {width}"][name].median / work.token_ratio,
            at_least=AIM,
        )
        for width in models
        if width >= 512
        for name, work in works.items()
    ]
    gates += [
        Gate(
            name=f"time over flat without sharing, width {width}",
            value=value,
            at_most=1 + min(noise[width], MOST_NOISE),
        )
        for width, value in overhead.items()
    ]
    gates += [
        Gate(
            name="pairs computed over those visible, most",
            value=max(one.pairs[TREE] / one.pairs["visible"] for one in some.values()),
            at_most=1.001,  # padding tokens see themselves
        ),
        Gate(name="gradient error", value=error, at_most=1e-4),
    ]
    return Report(
        name="tree_training",
        device=device_in_words(),
        settings={
            "quick": options.quick,
            "models": {
                f"width {width}": {
                    "family": "Qwen3, random weights, float32",
                    "num_layers": num_layers,
                    "num_parameters": parameters[width],
                }
                for width, num_layers in models.items()
            },
            "workloads": {
                name: {"num_trees": work.num_trees, "levels": work.levels}
                for name, work in works.items()
            },
            "loss": SETTINGS.name,
            "flat": "all paths as sequences, batches of as many tokens as the row, sdpa",
            "clock": "CPU time of the process",
            "rounds": rounds,
        },
        ratios={
            "speedup": {
                width: {name: one.median for name, one in by_name.items()}
                for width, by_name in speedups.items()
            },
            "token_ratio": {name: work.token_ratio for name, work in works.items()},
            "pair_ratio": {name: work.flat_pairs / work.tree_pairs for name, work in works.items()},
            "flat_overhead": {f"width {width}": value for width, value in overhead.items()},
            "flat_overhead_noise": {f"width {width}": value for width, value in noise.items()},
            "gradient_error": error,
            "peak_memory": {
                f"width {width}": {
                    name: one.peak_bytes[FLAT] / one.peak_bytes[TREE]
                    for name, one in by_work.items()
                }
                for width, by_work in found.items()
            },
        },
        counts={
            name: {
                "tree_tokens": work.tree_tokens,
                "flat_tokens": work.flat_tokens,
                "pairs": some[name].pairs,
                "peak_bytes": {
                    f"width {width}": by_work[name].peak_bytes for width, by_work in found.items()
                },
            }
            for name, work in works.items()
        },
        timings={
            f"width {width}": {
                name: {"cpu_seconds": one.seconds, "speedup": speedups[f"width {width}"][name]}
                for name, one in by_work.items()
            }
            for width, by_work in found.items()
        },
        gates=gates,
    )


if __name__ == "__main__":
    main()
