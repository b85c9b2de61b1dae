"""The rollout engine as a worker: the class that becomes a Ray actor, a thin shell around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rollout.engine import Engine
from rollout.growth import Growth, GrowthLimits
from rollout.metrics import CostLedger, EngineGauges
from rollout.scheduler import grow_all
from rollout.settings import EngineSettings
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.tree import Tree
from rollout.weight_receiver import receive_weights
from treepo.base.digest import WeightManifest
from treepo.base.weight_group import SENDER, WeightGroup, reach_store


class RolloutWorker:
    """One engine that samples trees and receives weights.

    It samples from proved weights alone: those of its model folder (version 0) at first, later a
    set that was loaded and then confirmed by whoever compared its digests. Between the two it
    refuses work, as after a load that failed.

    Args:
        rank: number among the rollout workers; only names it in errors.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._is_proved = False

    def setup(
        self, model_path: str, engine_settings: EngineSettings, tokenizer: str | None = None
    ) -> None:
        """Load and probe a model; a call of its own, so that its errors reach the caller as they
        are.

        Args:
            tokenizer: folder or Hub name, for stop strings; the model's own by default.

        Raises:
            ValueError: no such model, or one that the load probe refuses.
        """
        torch.set_num_threads(engine_settings.num_threads)
        self._engine = Engine(model_path, engine_settings, tokenizer=tokenizer)
        self._is_proved = True

    def sample(
        self,
        prompts: Sequence[Prompt],
        strategy_name: str,
        strategy_settings: Any,
        policy_version: int,
    ) -> tuple[list[Tree], CostLedger]:
        """One tree a prompt, in the order of ``prompts``, and what they cost; see ``grow``."""
        limits = GrowthLimits()
        grown, costs = self.grow(prompts, strategy_name, strategy_settings, policy_version, limits)
        return [tree for tree in grown if isinstance(tree, Tree)], costs

    def grow(
        self,
        work: Sequence[Prompt | Growth],
        strategy_name: str,
        strategy_settings: Any,
        policy_version: int,
        limits: GrowthLimits,
        expected_tokens: Sequence[float] | None = None,
    ) -> tuple[list[Tree | Growth], CostLedger]:
        """New and unfinished trees, grown until they are finished or the limits are reached, in the
        order of ``work``, and what it cost.

        Args:
            strategy_name: in ``STRATEGIES``, or user code.
            strategy_settings: that strategy's settings dataclass.
            policy_version: of the weights the caller expects to sample from.
            expected_tokens: see ``rollout.scheduler.grow``.

        Raises:
            ValueError: the engine holds other weights, a path does not fit, or an unfinished tree
                is another strategy's.
        """
        self._check_version(policy_version)
        if not self._is_proved:
            raise ValueError(
                f"rollout worker {self.rank} refuses work: its weights of version "
                f"{policy_version} are not confirmed, or loading newer ones failed"
            )
        strategy = STRATEGIES.get(strategy_name)(strategy_settings)
        self._engine.reset_metrics()
        grown = grow_all(self._engine, strategy, work, limits, expected_tokens)
        return grown, self._engine.metrics()

    def load_weights(
        self,
        version: int,
        manifest: WeightManifest,
        tensors: Mapping[str, torch.Tensor | np.ndarray],
    ) -> dict[str, int]:
        """See ``Engine.load_weights``; returns the digests of what is now stored, to be compared.
        Until ``confirm`` the worker refuses to sample.
        """
        self._is_proved = False
        return self._engine.load_weights(version, manifest, tensors)

    def join_weight_group(
        self, address: tuple[str, int], members: Sequence[str], timeout_seconds: float
    ) -> None:
        """Meet the sender of weights at ``address``; waits for the other members.

        Args:
            members: names of all, the sender first, then the rollout workers by rank.

        Raises:
            WeightGroupError: someone did not come.
        """
        self._weight_group = WeightGroup(
            reach_store(*address, timeout_seconds),
            SENDER + 1 + self.rank,
            members,
            device=torch.device(self._engine.settings.device),
            timeout_seconds=timeout_seconds,
        )

    def receive_weights(self, version: int) -> dict[str, int]:
        """``load_weights`` with what the weight group's sender offers next; returns the digests of
        what is now stored. Until ``confirm`` the worker refuses to sample.

        Raises:
            ValueError: the set does not fit this engine; nothing was sent.
            WeightGroupError, TornWeights: the transfer failed.
        """
        self._is_proved = False
        return receive_weights(
            self._weight_group,
            version,
            lambda manifest, parts: self._engine.load_weights(version, manifest, parts),
        )

    def sleep(self, weights: str) -> int:
        """See ``Engine.sleep``; returns the bytes that were copied."""
        return self._engine.sleep(weights)

    def wake(self) -> int:
        """See ``Engine.wake``; returns the bytes that were copied."""
        return self._engine.wake()

    def confirm(self, version: int) -> None:
        """Put the weights loaded as ``version`` in force: their digests were compared.

        Raises:
            ValueError: the engine holds another version.
        """
        self._check_version(version)
        self._is_proved = True

    def score_paths(
        self, paths: Sequence[Sequence[int] | np.ndarray], temperature: float = 1.0
    ) -> list[np.ndarray]:
        """float32 [n] for each path of n tokens; see ``Engine.score_path``."""
        return [self._engine.score_path(path, temperature) for path in paths]

    def drop_cache(self) -> None:
        """See ``Engine.drop_cache``."""
        self._engine.drop_cache()

    def policy_version(self) -> int:
        """Version of the weights the engine holds."""
        return self._engine.policy_version

    def gauges(self) -> EngineGauges:
        """Requests and slots that the engine holds now; what a call of ``sample`` cost comes with
        its trees.
        """
        return self._engine.gauges()

    def digests(self) -> dict[str, int]:
        """Digest of each stored tensor by name."""
        return self._engine.digests()

    def ping(self) -> int:
        """The worker's rank: it is alive."""
        return self.rank

    def _check_version(self, policy_version: int) -> None:
        if policy_version != self._engine.policy_version:
            raise ValueError(
                f"rollout worker {self.rank} holds weights of version "
                f"{self._engine.policy_version}, not {policy_version}: it refuses work until they "
                "are sent"
            )
