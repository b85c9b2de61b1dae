"""Soak the rollout engine: random strategies with random cancels, evictions, drafts, weight loads
and sleeps, for as long as you like.

    python scripts/soak.py [--minutes 20] [--seed 0] [--model FOLDER] [--device cpu]

After every act the tree's integrity is checked; a sample of what was drawn is compared with a copy
of the model that has the same weights and plain attention, no engine, pool or packed layers, and
with the engine's own fresh forwards; at the end memory must be where it was after the first fifth,
and must not have risen over the second half. Without --model a tiny random model is used.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rollout.drafts import DraftTree
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.model_runner import load_model
from rollout.probe import plain_logprobs
from rollout.scheduler import generate
from rollout.settings import EngineSettings
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import Tree
from rollout.weights import stored_state
from treepo.base.digest import manifest_of
from treepo.base.keys import root_key

SLOTS = 600
LONGEST = 180  # tokens of a path
MEMORY_MARGIN = 24 << 20  # bytes that resident memory may vary by
RISE_MARGIN = 8 << 20  # bytes that it may rise over the second half, by a straight line
SHORTEST_FOR_RISE = 60.0  # seconds; a shorter soak is still warming up in its second half


@dataclass(kw_only=True, eq=False)
class Soak:
    """One soak: an engine, a plain copy of its model, two weight sets that take turns, and what has
    been done so far.
    """

    engine: Engine
    plain: PreTrainedModel
    weights: list[dict[str, torch.Tensor]]
    rng: np.random.Generator
    tolerance: float
    acts: Counter[str] = field(default_factory=Counter)
    max_error: float = 0.0
    version: int = 0

    def episode(self) -> None:
        """One strategy over a few prompts, or a handful of direct requests."""
        act = self.trees if self.rng.random() < 0.7 else self.requests
        act()
        assert self.engine.is_idle and self.engine.tree.num_protected == 0
        if self.rng.random() < 0.1:
            self.engine.sleep()
            self.engine.wake()
            self.acts["sleep"] += 1
        self.check()

    def trees(self) -> None:
        name, settings = self.strategy()
        prompts = [self.prompt() for _ in range(int(self.rng.integers(1, 6)))]
        order = int(self.rng.integers(1 << 30)) if self.rng.random() < 0.7 else None
        stream = generate(self.engine, STRATEGIES.get(name)(settings), prompts, order_seed=order)
        self.acts[name] += 1
        for tree in stream:
            self.check_tree(tree)
            self.meddle()
            if self.rng.random() < 0.1:
                self.acts["cancel all"] += 1
                stream.close()

    def requests(self) -> None:
        """Segments, forks, cuts and drafts through the engine's own verbs."""
        node = self.engine.prefill(self.prompt().token_ids)
        nodes = [node]
        for _ in range(int(self.rng.integers(1, 5))):
            items = [
                (nodes[self.rng.integers(len(nodes))], self.spec(), int(self.rng.integers(1 << 40)))
                for _ in range(int(self.rng.integers(1, 6)))
            ]
            items = [item for item in items if len(item[0].path_token_ids()) < LONGEST - 40]
            stream = self.engine.extend(items)
            for completion in stream:
                self.engine.soften(completion.node)
                nodes.append(completion.node)
                self.meddle()
                if self.rng.random() < 0.2:
                    self.engine.cancel(completion.request_id + 1)
                    self.acts["cancel"] += 1
                if self.rng.random() < 0.1:
                    stream.close()
            self.draft(nodes)
        for each in self.rng.permutation(len(nodes)):
            self.engine.free(nodes[each], drop=bool(self.rng.integers(2)))

    def draft(self, nodes: list) -> None:
        node = nodes[self.rng.integers(len(nodes))]
        if len(node.path_token_ids()) > LONGEST - 40:
            return
        size = int(self.rng.integers(0, 12))
        parents = np.array([self.rng.integers(-1, i) if i else -1 for i in range(size)], np.int64)
        draft = self.engine.forward(node, DraftTree(parents=parents, token_ids=self.tokens(size)))
        path: list[int] = []
        walk = int(self.rng.integers(-1, size)) if size else -1
        while walk >= 0:
            path.insert(0, walk)
            walk = int(parents[walk])
        nodes.append(self.engine.commit(draft, path))
        self.engine.soften(nodes[-1])
        self.acts["draft"] += 1

    def meddle(self) -> None:
        """Something that happens while requests are unfinished."""
        draw = self.rng.random()
        if draw < 0.15:
            self.engine.tree.evict(int(self.rng.integers(1, SLOTS)))
            self.acts["evict"] += 1
        elif draw < 0.25:
            how = "recompute" if self.rng.random() < 0.5 else "keep"
            self.version += 1
            state = self.weights[self.version % len(self.weights)]
            self.engine.load_weights(self.version, manifest_of(state), state, in_flight=how)
            self.acts[f"load {how}"] += 1
        self.check()

    def check(self) -> None:
        self.engine.check_integrity()
        gauges = self.engine.gauges()
        assert gauges.slots_free + gauges.slots_live + gauges.slots_cached == SLOTS

    def check_tree(self, tree: Tree) -> None:
        """A leaf that was drawn under the weights in force has the log-probs of a fresh forward."""
        leaf = tree.leaves[self.rng.integers(tree.num_leaves)]
        path = tree.path(leaf)
        if any((tree.segments[i].policy_versions != self.version).any() for i in path[1:]):
            return
        ids, start = tree.path_token_ids(leaf), tree.segments[0].num_tokens
        if len(ids) == start:
            return
        recorded = np.concatenate([tree.segments[i].logprobs for i in path])[start:]
        plain = self.plain_logprobs(ids, tree.temperature)[start:]
        self.compare(recorded, plain, "plain attention")
        self.acts["compared"] += 1
        gauges = self.engine.gauges()
        if len(ids) <= gauges.slots_free + gauges.slots_cached:  # else other trees hold the pool
            fresh = self.engine.score_path(ids, tree.temperature)[start:]
            self.compare(recorded, fresh, "the engine's fresh forward")
            self.acts["scored"] += 1

    def compare(self, recorded: np.ndarray, expected: np.ndarray, whose: str) -> None:
        self.max_error = max(self.max_error, float(np.abs(recorded - expected).max()))
        assert self.max_error < self.tolerance, (
            f"log-probs differ by {self.max_error:.2g} from those of {whose}"
        )

    @torch.inference_mode()
    def plain_logprobs(self, token_ids: np.ndarray, temperature: float) -> np.ndarray:
        """float64 [n]: log-prob of each token under the weights in force, 0 for the first."""
        weights = self.weights[self.version % len(self.weights)]
        for name, value in stored_state(self.plain).items():
            value.copy_(weights[name])
        scaled = torch.from_numpy(plain_logprobs(self.plain, token_ids) / temperature)
        table = torch.log_softmax(scaled, dim=-1).numpy()
        return np.append(0.0, table[np.arange(len(token_ids) - 1), token_ids[1:]])

    def strategy(self) -> tuple[str, FlatSettings | TreePOSettings]:
        stops = [1] if self.rng.random() < 0.7 else []
        length = int(self.rng.integers(1, 120))
        n = int(self.rng.integers(1, 8))
        if self.rng.random() < 0.4:
            return "flat", FlatSettings(n=n, max_response_length=length, stop_token_ids=stops)
        segment = int(self.rng.integers(1, length + 1))
        return "treepo", TreePOSettings(
            n=n,
            segment_length=segment,
            max_depth=-(-length // segment),
            max_response_length=length,
            initial_divergence_min=1,
            initial_divergence_max=min(n, 3),
            stop_token_ids=stops,
            top_p=float(self.rng.choice([1.0, 0.9])),
        )

    def spec(self) -> ExtendSpec:
        return ExtendSpec(
            max_tokens=int(self.rng.integers(0, 30)),
            temperature=float(self.rng.choice([0.0, 1.0])),
            stop_token_ids=(1,),
        )

    def prompt(self) -> Prompt:
        number = int(self.rng.integers(40))  # prompts come back, so the cache is hit
        ids = np.random.default_rng(number).integers(0, self.vocabulary, 1 + number)
        key = root_key("soak", int(self.rng.integers(1 << 40)))
        return Prompt(problem_id=str(number), token_ids=ids.astype(np.int32), root_key=key)

    def tokens(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.vocabulary, count).astype(np.int32)

    @property
    def vocabulary(self) -> int:
        return self.engine.model.config.get_text_config().vocab_size


def tiny_model(seed: int) -> PreTrainedModel:
    """A random GPT-2 in float64 whose context matters."""
    config = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.25)
    return model.double().eval()


def start(model: str | None, device: str, seed: int) -> Soak:
    """A soak that can begin."""
    rng = np.random.default_rng(seed)
    loaded = tiny_model(0) if model is None else load_model(model, dtype="float32", device=device)
    dtype = str(loaded.dtype).removeprefix("torch.")
    settings = EngineSettings(
        num_kv_slots=SLOTS,
        max_running_requests=12,
        max_tokens_per_step=64,
        device=device,
        dtype=dtype,
    )
    plain = copy.deepcopy(loaded).to(device)
    engine = Engine(loaded.to(device), settings)
    first = {name: value.clone() for name, value in stored_state(engine.model).items()}
    second = {name: value.clone() for name, value in first.items()}
    for name in [n for n, v in second.items() if v.dim() > 1]:
        second[name] = second[name] * 1.01
    weights = [_tied(first, engine), _tied(second, engine)]
    tolerance = 1e-5 if dtype == "float64" else 1e-3
    return Soak(engine=engine, plain=plain, weights=weights, rng=rng, tolerance=tolerance)


def _tied(state: dict[str, torch.Tensor], engine: Engine) -> dict[str, torch.Tensor]:
    """Let tied names share one tensor again, as in the model."""
    for group in manifest_of(stored_state(engine.model)).tied:
        for name in group[1:]:
            state[name] = state[group[0]]
    return state


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def rise(times: Sequence[float], sizes: Sequence[int]) -> float:
    """Bytes by which a straight line through memory's sizes rises over the second half of the
    times.
    """
    half = times[0] + (times[-1] - times[0]) / 2
    late = [(at, size) for at, size in zip(times, sizes, strict=True) if at >= half]
    if len(late) < 3:
        return 0.0
    at, size = np.array(late, np.float64).T
    return float(np.polyfit(at - at[0], size, 1)[0] * (at[-1] - at[0]))


def run(soak: Soak, seconds: float) -> Iterator[str]:
    """Episodes, at least one, until the time is up; yields a line of news about each minute.

    Raises:
        AssertionError: something did not hold.
    """
    began = time.monotonic()
    news = began + 60
    times: list[float] = []
    sizes: list[int] = []
    while (elapsed := time.monotonic() - began) < seconds or not times:
        soak.episode()
        times.append(time.monotonic() - began)
        sizes.append(resident_bytes())
        if time.monotonic() > news:
            news += 60
            yield f"{elapsed:6.0f} s  {len(times)} episodes, {sizes[-1] >> 20} MiB"
    settled = sizes[next(i for i, at in enumerate(times) if at >= times[-1] / 5)]
    grown, rising = sizes[-1] - settled, rise(times, sizes)
    costs = soak.engine.metrics()
    yield f"acts: {dict(sorted(soak.acts.items()))}"
    yield (
        f"{costs.segments} segments, {costs.generated_tokens} tokens, {costs.preempted} put back, "
        f"hit rate {costs.hit_rate:.2f}; largest error of a log-prob {soak.max_error:.1e}"
    )
    mib = 1 << 20
    yield (
        f"memory: {settled >> 20} MiB after a fifth of the time, {grown / mib:+.1f} MiB since; "
        f"rises by {rising / mib:+.1f} MiB over the second half"
    )
    assert grown < MEMORY_MARGIN, f"memory grew by {grown} bytes"
    assert seconds < SHORTEST_FOR_RISE or rising < RISE_MARGIN, (
        f"memory rises by {rising:.0f} bytes over the second half"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="model folder; default: a tiny random one")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    soak = start(arguments.model, arguments.device, arguments.seed)
    for line in run(soak, arguments.minutes * 60):
        print(line, flush=True)


if __name__ == "__main__":
    main()
