"""Supervised training on demonstrations, with the trainers room's learner.

A demonstration is a token tree with one leaf and weight 1 on its response, so packing, denominator
and update are those of reinforcement learning; only the loss is another (``nll``).
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rewards.reasoning_gym import make_dataset
from trainers.batch import TokenTree
from trainers.learner import Learner
from trainers.packing import pack, path_tree
from trainers.settings import LearnerSettings
from treepo.base.keys import root_key
from treepo.config import resolve_model_path
from treepo.demonstrations import demonstrate, number_terms
from treepo.hub import local_model
from treepo.progress import clock_time
from treepo.sft_settings import DemonstrationSettings, SFTSettings
from treepo.tiny_model import PHRASES, build_model, build_tokenizer, numbered_phrases

RECENT = 20  # steps that the shown loss is the mean of
Report = Callable[[int, float], None]  # called with the step and the recent loss


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTResult:
    """What a supervised run ends with."""

    output: Path
    loss: float  # nats a response token, mean of the last steps
    digest: str  # of the weights: equal for equal seed and settings on one machine
    seconds: float


def train_sft(settings: SFTSettings, report: Report) -> SFTResult:
    """Train a model on demonstrations and write it, with its tokenizer, to ``settings.output``. The
    learner's process group stays open: DeepSpeed can't be set up twice with different ones in a
    process.

    Raises:
        ValueError: ``settings.output`` already holds something, or settings of the data that its
            generator refuses.
    """
    output = Path(settings.output).expanduser()
    if output.exists() and any(output.iterdir()):
        raise ValueError(
            f"output={settings.output!r}: the folder is not empty; name another, or remove it"
        )
    began = time.monotonic()
    pairs = demonstrations(settings.data, settings.seed, settings.steps * settings.batch_size)
    with tempfile.TemporaryDirectory(prefix="treepo-sft-") as initial:
        folder = _initial_model(settings, initial)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        learner = Learner(folder, _with_total_steps(settings.learner, settings.steps))
        losses: deque[float] = deque(maxlen=RECENT)
        for step in range(1, settings.steps + 1):
            batch = [
                to_sequence(tokenizer, question, answer)
                for question, answer in itertools.islice(pairs, settings.batch_size)
            ]
            losses.append(update(learner, batch)["actor/pg_loss"])
            report(step, sum(losses) / len(losses))
        partial = output.with_name(f".{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        learner.export_hf(partial)
        digest = learner.digest()
    if output.exists():
        output.rmdir()  # empty, as checked above
    partial.rename(output)
    return SFTResult(
        output=output,
        loss=sum(losses) / len(losses),
        digest=digest,
        seconds=time.monotonic() - began,
    )


def demonstrations(
    settings: DemonstrationSettings, seed: int, count: int
) -> Iterator[tuple[str, str]]:
    """``count`` pairs of a question and its worked answer, the same for the same seed."""
    names = ("min_terms", "max_terms", "min_value", "max_value", "median_terms", "log_sd")
    generator = make_dataset(
        "chain_sum",
        {
            **{name: getattr(settings, name) for name in names},
            # The library adds a row's index to the seed: far apart, so that no two seeds share rows
            "seed": root_key(seed, "questions") % 2**48,
            "size": count,
        },
    )
    slips = random.Random(root_key(seed, "slips"))
    for index in range(count):
        question = generator[index]["question"]
        answer = demonstrate(
            question,
            error_prob=settings.error_prob,
            rng=slips,
            error_terms=settings.error_terms,
            numbered=settings.numbered,
        )
        yield number_terms(question) if settings.numbered else question, answer


def _initial_model(settings: SFTSettings, scratch: str) -> str:
    """Folder of the model to train; a fresh one is written to ``scratch``."""
    if settings.start_from:
        return local_model(resolve_model_path(settings.start_from))
    tokenizer = build_tokenizer(phrases(settings.data))
    model = build_model(tokenizer, seed=root_key(settings.seed, "weights"), **vars(settings.model))
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    return scratch


def phrases(settings: DemonstrationSettings) -> Sequence[str]:
    """The texts that are one token each for a model taught by these demonstrations."""
    if not settings.numbered:
        return PHRASES
    return numbered_phrases(settings.max_terms, range(settings.min_value, settings.max_value + 1))


def to_sequence(tokenizer: Any, question: str, answer: str) -> TokenTree:
    """A chat of one question and its answer as a tree with one leaf, trained on the answer and the
    end-of-sequence token.
    """
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    prompt_ids, response_ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)
    )
    response_ids = [*response_ids, tokenizer.eos_token_id]
    trained = torch.tensor([0.0] * len(prompt_ids) + [1.0] * len(response_ids))
    return replace(
        path_tree(torch.tensor(prompt_ids + response_ids)),
        weight=trained,
        leaf_weight=torch.ones(1),
        leaf_num_tokens=torch.tensor([len(response_ids)]),
    )


def update(learner: Learner, batch: Sequence[TokenTree]) -> dict[str, float]:
    """One optimiser step on a batch of sequences; the learner is the only rank."""
    (rows,) = pack(batch, learner.settings.max_tokens_per_micro_batch, num_ranks=1)
    return learner.update([rows])


def summary(result: SFTResult) -> str:
    """The end of a run, for people."""
    return "\n".join(
        (
            f"Model   {result.output}  (loads with transformers' from_pretrained)",
            f"Loss    {result.loss:.4f} nats a token",
            f"Digest  {result.digest}",
            f"Time    {clock_time(result.seconds)}",
        )
    )


def _with_total_steps(learner: LearnerSettings, steps: int) -> LearnerSettings:
    """The learner's settings with the schedule's end filled in."""
    if learner.optimizer.total_training_steps:
        return learner
    return replace(learner, optimizer=replace(learner.optimizer, total_training_steps=steps))
