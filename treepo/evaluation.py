"""Evaluation: sample responses to held-out problems, judge them, estimate scores.

Every split of problems is sampled in one or more passes (greedy; at a temperature). A pass gives
each problem ``num_samples`` responses, one row each, and the scores

* ``val-core/{split}/greedy`` of a greedy pass with one sample: share of correct answers;
* ``val-core/{split}/mean@k``, ``pass@k``, ``maj@k`` of a sampled pass, k = ``num_samples``; the
  smaller powers of two as ``val-aux/{split}/pass@k`` and ``maj@k``;
* ``val-aux/{split}/{pass}/...``: counts of responses without a readable answer, cut at the length
  limit, and without a verdict, and the mean length.

Responses without a verdict (the verifier timed out or failed) are neither right nor wrong: they
stay out of every estimate and are counted. A problem with fewer than k judged responses enters with
as many as it has, one without any is left out. Majority votes need verifiers that name answers;
where none of a split's responses has one there is no ``maj@k``.

The core is pure: it is handed the sampler and the verifier, and training's own evaluations, before
and after, use it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rewards.records import UNPARSABLE, RewardItem, RewardResult
from rollout.tree import DEPTH, TRUNCATED, Tree
from treepo.atomic import write_json, write_json_lines
from treepo.base.errors import RunFailed
from treepo.evaluation_metrics import confidence_interval, maj_at_k, mean_at_k, pass_at_k

if TYPE_CHECKING:
    from treepo.data import Problem

CONFIDENCE = 0.95
# Names the draws of evaluations, the same in training and in the evaluate command, so that a model
# gives the same responses in both.
EVALUATION_SEED = 1_000_003
GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPass:
    """How responses are drawn; stands beside every score.

    Attributes:
        name: ``GREEDY``, ``SAMPLED`` or a name of one's own; passes of one evaluation differ in it.
        num_samples: responses a problem.
        temperature: 0 is greedy.
        top_p: nucleus; 1 keeps all tokens.
        top_k: 0 keeps all tokens.
        min_p: 0 keeps all tokens.
        max_response_length: in tokens.
        seed: names the draws, with the problem's id.
    """

    name: str
    num_samples: int
    temperature: float
    max_response_length: int
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}: at least 1 response a problem")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"num_samples={self.num_samples} at temperature 0: all of them would be the same; "
                "set num_samples=1 or a temperature above 0"
            )


def greedy_and_sampled(
    *, num_samples: int, temperature: float, max_response_length: int, seed: int, top_p: float = 1.0
) -> tuple[SamplingPass, SamplingPass]:
    """The two usual passes: one greedy response, and ``num_samples`` at ``temperature``."""
    return (
        SamplingPass(
            name=GREEDY,
            num_samples=1,
            temperature=0.0,
            max_response_length=max_response_length,
            seed=seed,
        ),
        SamplingPass(
            name=SAMPLED,
            num_samples=num_samples,
            temperature=temperature,
            top_p=top_p,
            max_response_length=max_response_length,
            seed=seed,
        ),
    )


class Sampler(Protocol):
    """Grows one tree a problem, in the problems' order, each with ``settings.num_samples``
    leaves.
    """

    def __call__(self, problems: Sequence[Problem], settings: SamplingPass) -> Sequence[Tree]: ...


Scorer = Callable[[Sequence[RewardItem]], Sequence[RewardResult]]


class ResponseDecoder(Protocol):
    """Gives the text of a trajectory's response, without prompt and special tokens."""

    def response_text(self, tree: Tree, leaf: int) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One response and what became of it: a row of ``samples.jsonl``.

    Attributes:
        index: of the response among its problem's.
        token_ids: of the response, with its end-of-sequence token if it has one.
        text: of the response, without special tokens.
        answer: canonical, as the verifier read it; None if it found none.
        correct: the verdict; None if there is none (see ``outcome``).
        score: the reward; None if there is no verdict.
    """

    split: str
    sampling_pass: str
    problem_id: str
    data_source: str
    index: int
    prompt: str
    ground_truth: Any
    text: str
    answer: str | None
    correct: bool | None
    score: float | None
    parts: dict[str, float]
    outcome: str
    detail: str
    finish_reason: str
    num_tokens: int
    policy_version: int
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A score with its confidence interval over problems.

    Attributes:
        low: end of the interval at the level ``CONFIDENCE``.
        high: its other end.
        num_problems: that it is the mean over.
    """

    value: float
    low: float
    high: float
    num_problems: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result.

    Attributes:
        passes: the sampling settings, by pass name.
        samples: every response, by split, pass, problem and index.
        estimates: score by metric name.
        counts: number by metric name.
    """

    passes: dict[str, SamplingPass]
    samples: list[Sample]
    estimates: dict[str, Estimate]
    counts: dict[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers, flat, for ``metrics.jsonl``."""
        return {name: estimate.value for name, estimate in self.estimates.items()} | self.counts

    @property
    def scores(self) -> dict[str, float]:
        """The main score of each split and pass, under short names: ``"<split> <pass>"``."""
        short = {}
        for name, value in self.metrics.items():
            head, _, rest = name.partition("/")
            split, _, metric = rest.rpartition("/")
            if head == "val-core" and (metric == GREEDY or metric.startswith("mean@")):
                short[f"{split} {GREEDY if metric == GREEDY else SAMPLED}"] = value
        return short

    def write(self, folder: Path, **about: Any) -> None:
        """Write ``samples.jsonl`` (a row a response) and ``evaluation.json`` (scores beside the
        sampling settings).

        Args:
            about: further facts for ``evaluation.json``, e.g. the checkpoint.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_json_lines(folder / "samples.jsonl", [asdict(sample) for sample in self.samples])
        write_json(
            folder / "evaluation.json",
            {
                **about,
                "confidence": CONFIDENCE,
                "sampling": {name: asdict(settings) for name, settings in self.passes.items()},
                "scores": {name: asdict(estimate) for name, estimate in self.estimates.items()},
                "counts": self.counts,
            },
        )


def evaluate(
    splits: Mapping[str, Sequence[Problem]],
    passes: Sequence[SamplingPass],
    *,
    sample: Sampler,
    score: Scorer,
    decoder: ResponseDecoder,
) -> Evaluation:
    """Run every pass over every split.

    Args:
        splits: problems by the split's name, which stands in the metric names.
        score: gives verdicts in the order of the items.

    Raises:
        ValueError: no problems, or two passes of one name.
    """
    names = [settings.name for settings in passes]
    if len(set(names)) < len(names):
        raise ValueError(f"evaluation passes {', '.join(names)}: each needs a name of its own")
    samples: list[Sample] = []
    estimates: dict[str, Estimate] = {}
    counts: dict[str, float] = {}
    for split, problems in splits.items():
        if not problems:
            raise ValueError(f"evaluation split {split!r} has no problems")
        for settings in passes:
            trees = sample(problems, settings)
            rows = judge(split, settings, problems, trees, score, decoder)
            samples += rows
            estimates |= estimate_scores(split, settings, rows)
            counts |= count_failures(split, settings, rows)
    require_a_verdict([(row.correct is not None, row.detail) for row in samples])
    return Evaluation(
        passes=dict(zip(names, passes, strict=True)),
        samples=samples,
        estimates=estimates,
        counts=counts,
    )


def require_a_verdict(verdicts: Sequence[tuple[bool, str]]) -> None:
    """Stop where every single verdict failed: then the verifier is broken, not the responses.

    Args:
        verdicts: for each response whether there is one, and what went wrong.

    Raises:
        RunFailed: with what went wrong first.
    """
    if verdicts and not any(there_is for there_is, _ in verdicts):
        raise RunFailed(
            f"none of {len(verdicts)} responses got a verdict; the verifier fails: {verdicts[0][1]}"
        )


def judge(
    split: str,
    settings: SamplingPass,
    problems: Sequence[Problem],
    trees: Sequence[Tree],
    score: Scorer,
    decoder: ResponseDecoder,
) -> list[Sample]:
    """Verdicts on all leaves, in one call of ``score``; rows by problem, then by leaf."""
    pairs = []
    for problem, tree in zip(problems, trees, strict=True):
        assert tree.problem_id == problem.id, f"tree of {tree.problem_id} for {problem.id}"
        assert tree.num_leaves == settings.num_samples, (
            f"problem {problem.id}: {tree.num_leaves} responses instead of {settings.num_samples}"
        )
        pairs += [(problem, tree, leaf) for leaf in tree.leaves]
    items = [_item(problem, tree, leaf, decoder) for problem, tree, leaf in pairs]
    results = score(items)
    return [
        _sample(split, settings, problem, tree, leaf, number % settings.num_samples, item, result)
        for number, ((problem, tree, leaf), item, result) in enumerate(
            zip(pairs, items, results, strict=True)
        )
    ]


def _item(problem: Problem, tree: Tree, leaf: int, decoder: ResponseDecoder) -> RewardItem:
    return RewardItem(
        data_source=problem.data_source,
        prompt=problem.prompt_text,
        solution_str=decoder.response_text(tree, leaf),
        ground_truth=problem.ground_truth,
        extra_info=problem.extra_info,
        num_tokens=len(tree.path_token_ids(leaf, with_prompt=False)),
        finish_reason=tree.segments[leaf].finish_reason,
    )


def _sample(
    split: str,
    settings: SamplingPass,
    problem: Problem,
    tree: Tree,
    leaf: int,
    index: int,
    item: RewardItem,
    result: RewardResult,
) -> Sample:
    return Sample(
        split=split,
        sampling_pass=settings.name,
        problem_id=problem.id,
        data_source=problem.data_source,
        index=index,
        prompt=item.prompt,
        ground_truth=problem.ground_truth,
        text=item.solution_str,
        answer=result.answer,
        correct=result.correct if result.has_verdict else None,
        score=result.score if result.has_verdict else None,
        parts=dict(result.parts),
        outcome=result.outcome,
        detail=result.detail,
        finish_reason=item.finish_reason,
        num_tokens=item.num_tokens,
        policy_version=int(tree.segments[leaf].policy_versions.max(initial=0)),
        token_ids=tree.path_token_ids(leaf, with_prompt=False).tolist(),
    )


def estimate_scores(
    split: str, settings: SamplingPass, samples: Sequence[Sample]
) -> dict[str, Estimate]:
    """Scores of one pass over one split, by metric name."""
    groups = _judged_by_problem(samples)
    if not groups:
        return {}  # the counts tell why
    verdicts = [[bool(row.correct) for row in group] for group in groups]
    answers = [[row.answer for row in group] for group in groups]
    if settings.name == GREEDY:
        return {f"val-core/{split}/{GREEDY}": _estimate(map(mean_at_k, verdicts))}
    most = settings.num_samples
    where = f"{split}" if settings.name == SAMPLED else f"{split}/{settings.name}"
    votes = any(answer is not None for group in answers for answer in group)
    found = {f"val-core/{where}/mean@{most}": _estimate(map(mean_at_k, verdicts))}
    for k in [*_powers_of_two_below(most), most] if most > 1 else []:
        family = "val-core" if k == most else "val-aux"
        found[f"{family}/{where}/pass@{k}"] = _estimate(
            pass_at_k(group, min(k, len(group))) for group in verdicts
        )
        if votes:
            found[f"{family}/{where}/maj@{k}"] = _estimate(
                maj_at_k(named, group, min(k, len(group)), seed=settings.seed)
                for named, group in zip(answers, verdicts, strict=True)
            )
    return found


def count_failures(
    split: str, settings: SamplingPass, samples: Sequence[Sample]
) -> dict[str, float]:
    """What stands beside the scores of one pass over one split, by metric name."""
    where = f"val-aux/{split}/{settings.name}"
    lengths = [row.num_tokens for row in samples]
    return {
        f"{where}/num_samples": float(len(samples)),
        f"{where}/num_without_answer": float(sum(r.outcome == UNPARSABLE for r in samples)),
        f"{where}/num_truncated": float(
            sum(r.finish_reason in (TRUNCATED, DEPTH) for r in samples)
        ),
        f"{where}/num_without_verdict": float(sum(r.correct is None for r in samples)),
        f"{where}/response_length/mean": sum(lengths) / len(lengths),
    }


def _judged_by_problem(samples: Iterable[Sample]) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for row in samples:
        if row.correct is not None:
            groups.setdefault(row.problem_id, []).append(row)
    return list(groups.values())


def _powers_of_two_below(number: int) -> list[int]:
    return [2**e for e in range(1, number.bit_length()) if 2**e < number]


def _estimate(values: Iterable[float]) -> Estimate:
    listed = [float(value) for value in values]
    low, high = confidence_interval(listed, CONFIDENCE)
    return Estimate(value=sum(listed) / len(listed), low=low, high=high, num_problems=len(listed))
