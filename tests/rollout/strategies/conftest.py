"""A scripted engine that drives the strategies without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rollout.extend import LENGTH, STOP, ExtendRequest, ExtendResult
from rollout.strategies.base import Prompt
from rollout.tree import Segment
from treepo.base.keys import Purpose, uniform

EOS_ID = 1

# (context token ids, request) -> tokens to draw; a stop token in them ends the segment
Script = Callable[[np.ndarray, ExtendRequest], Sequence[int]]


def random_script(eos_rate: float, vocabulary: int = 50) -> Script:
    """Tokens that depend on the whole context and on the path key, as a model's do."""

    def script(context: np.ndarray, request: ExtendRequest) -> list[int]:
        digest = int.from_bytes(
            hashlib.blake2b(context.tobytes(), digest_size=4).digest(), "little"
        )
        tokens = []
        for position in range(request.spec.max_tokens):
            draw = uniform(request.path_key ^ digest, position, Purpose.TOKEN)
            tokens.append(EOS_ID if draw < eos_rate else 2 + int(draw * 1e6) % (vocabulary - 2))
        return tokens

    return script


def early_ends(eos_rate: float) -> Script:
    """As ``random_script``, but no response ends before its sixth token, and most do soon after:
    all paths are over long before the width is reached.
    """
    without, with_eos = random_script(0.0), random_script(eos_rate)

    def script(context: np.ndarray, request: ExtendRequest) -> list[int]:
        young = max(0, 5 - request.spec.num_response_tokens)
        return [*without(context, request)[:young], *with_eos(context, request)[young:]]

    return script


class ScriptedEngine:
    """Answers requests; keeps what each request's prompt was. The k-th token of a segment has the
    log-prob -k, or with ``by_token`` one that depends on the token and differs from most others'.
    """

    def __init__(self, script: Script, by_token: bool = False) -> None:
        self.script = script
        self.by_token = by_token
        self.prompts: dict[int, np.ndarray] = {}  # path key -> tokens the segment was drawn after

    def extend(self, segments: Sequence[Segment], request: ExtendRequest) -> ExtendResult:
        context = path_tokens(segments, request.parent)
        assert request.path_key not in self.prompts, "a path key is used twice"
        self.prompts[request.path_key] = context
        spec = request.spec
        above = context[segments[0].num_tokens :].tolist()
        assert spec.num_response_tokens == len(above), "the response above is of another length"
        tokens: list[int] = []
        stopped = False
        for token in list(self.script(context, request))[: spec.max_tokens]:
            tokens.append(token)
            response = above + tokens
            stopped = token in spec.stop_token_ids or any(
                tuple(response[-len(s) :]) == s for s in spec.stop_token_sequences
            )
            if stopped:
                break
        logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        if self.by_token:
            logprobs = -((np.array(tokens) * 37 % 101) / 20).astype(np.float32)
        return ExtendResult(
            request=request,
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=logprobs,
            sampling_logprobs=logprobs / 2,
            finish_reason=STOP if stopped else LENGTH,
            policy_versions=np.full(len(tokens), 3, np.int32),
            entropy=-logprobs / 4 if spec.wants_entropy else None,
        )


def path_tokens(segments: Sequence[Segment], index: int) -> np.ndarray:
    """Written apart from the product's own path functions, to check them."""
    tokens: list[int] = []
    while index >= 0:
        tokens = [*segments[index].token_ids.tolist(), *tokens]
        index = segments[index].parent
    return np.array(tokens, dtype=np.int32)


def prompt(key: int = 7, token_ids: Sequence[int] = (40, 41, 42)) -> Prompt:
    return Prompt(problem_id=f"p{key}", token_ids=np.array(token_ids, np.int32), root_key=key)


def grow(strategy, start: Prompt, engine: ScriptedEngine):
    """Run to the end, everything in order."""
    state, requests = strategy.start(start)
    while requests:
        results = [engine.extend(state.segments, request) for request in requests]
        state, requests = strategy.advance(state, results)
    return strategy.tree(state)


def grow_in_disorder(strategy, start: Prompt, engine: ScriptedEngine, rng, between=None):
    """Run to the end, results in random groups and order; ``between`` may replace the state."""
    state, waiting = strategy.start(start)
    while waiting:
        rng.shuffle(waiting)
        some = rng.integers(0, len(waiting) + 1)
        results = [engine.extend(state.segments, request) for request in waiting[:some]]
        assert strategy.tree(state) is None
        state, requests = strategy.advance(state, results)
        waiting = [*waiting[some:], *requests]
        if between is not None:
            state = between(state)
        assert {r.request_id for r in state.outstanding} == {r.request_id for r in waiting}
    return strategy.tree(state)


class Drive:
    """The above as one fixture, since test folders are not packages."""

    EOS_ID = EOS_ID
    ScriptedEngine = ScriptedEngine
    random_script = staticmethod(random_script)
    early_ends = staticmethod(early_ends)
    path_tokens = staticmethod(path_tokens)
    prompt = staticmethod(prompt)
    grow = staticmethod(grow)
    grow_in_disorder = staticmethod(grow_in_disorder)


@pytest.fixture(scope="session")
def drive() -> type[Drive]:
    return Drive


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A tokenizer that splits \\boxed{4} into single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", *sorted(set("\\boxed{}0123456789 ="))]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("letters")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return str(folder), {c: i for i, c in enumerate(characters)}
