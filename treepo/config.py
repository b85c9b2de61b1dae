"""What a training run can be told: plain dataclasses, checked when they are built. No torch in
here.

Each room brings its own settings; this file adds what only the roof knows. What spans rooms is
checked in ``treepo/config_checks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rewards.settings import RewardSettings
from rollout.sampling_settings import COOLEST
from rollout.settings import EngineSettings
from trainers.settings import LearnerSettings
from treepo import config_checks as checks
from treepo.algorithm_settings import AdvantageSettings
from treepo.checks_of_settings import require
from treepo.cli import settings_from
from treepo.data_settings import DataSettings
from treepo.pipelines import check_pipeline
from treepo.segment_settings import SegmentSettings
from treepo.tracking_settings import TrackingSettings

ASSET_PREFIX = "asset:"
WEIGHT_TRANSPORTS = ("object_store", "group")


@dataclass
class ModelConfig:
    """The policy to start from."""

    path: str = "asset:tiny_chain_sum"  # folder, Hub name, or asset:NAME (shipped with the package)
    tokenizer: str | None = None  # folder or Hub name; default: the model's own
    trust_remote_code: bool = False


@dataclass
class TrainerConfig:
    """Batch sizes, how long, how often."""

    total_steps: int = 100  # rollout-and-update rounds
    train_batch_size: int = 24  # prompts a step; each grows one tree of rollout.n leaves
    ppo_mini_batch_size: int = 24  # prompts an optimiser update; divides train_batch_size
    ppo_epochs: int = 1  # passes over a step's trees
    save_freq: int = 20  # steps between checkpoints; 0: only at the end
    test_freq: int = 0  # steps between evaluations; 0: only before and after
    val_before_train: bool = True
    keep_checkpoints: int = 2  # newest ones kept
    save_trees_freq: int = 1  # steps between writing sampled trees to the run's folder; 0: never
    shuffle_rewards: bool = (
        False  # control experiment: permute the batch's rewards among its leaves
    )
    # sync: sample, learn, publish in turn | one_step: sample the next batch while learning from
    # this one | async: all at once; needs the segments' settings of trainer=async. The last two
    # need cluster.colocate=false and a correction for tokens of older weights (trainer=one_step)
    pipeline: str = "sync"
    segments: SegmentSettings = field(default_factory=SegmentSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)

    def __post_init__(self) -> None:
        for name in ("total_steps", "train_batch_size", "ppo_mini_batch_size", "ppo_epochs"):
            require(f"trainer.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("save_freq", "test_freq", "save_trees_freq"):
            require(f"trainer.{name}", getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require(
            "trainer.keep_checkpoints", self.keep_checkpoints, self.keep_checkpoints >= 1, ">= 1"
        )
        if self.train_batch_size % self.ppo_mini_batch_size:
            raise ValueError(
                f"trainer.ppo_mini_batch_size={self.ppo_mini_batch_size} does not divide "
                f"trainer.train_batch_size={self.train_batch_size}; nearest that do: "
                + " or ".join(
                    map(str, _nearest_divisors(self.train_batch_size, self.ppo_mini_batch_size))
                )
            )


@dataclass
class EvaluationConfig:
    """Held-out problems, scored before and after training (and every trainer.test_freq steps)."""

    splits: dict[str, DataSettings] = field(default_factory=dict)  # name -> problems
    num_samples: int = 4  # responses a problem at `temperature`; the greedy pass always takes one
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_length: int = 0  # tokens; 0: the same as in training

    def __post_init__(self) -> None:
        require("evaluation.num_samples", self.num_samples, self.num_samples >= 1, ">= 1")
        require(
            "evaluation.temperature", self.temperature, self.temperature >= COOLEST,
            f">= {COOLEST} (a greedy pass is always made beside it)",
        )  # fmt: skip
        require("evaluation.top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")


@dataclass
class ClusterConfig:
    """How many processes there are and what each may use."""

    # of a running Ray cluster; default: start one here
    address: str | None = None
    num_rollout_workers: int = 1
    num_learner_ranks: int = 1
    cpus_per_rollout_worker: float = 1.0
    cpus_per_learner_rank: float = 1.0
    gpus_per_rollout_worker: float = 0.0
    gpus_per_learner_rank: float = 0.0
    # with trainer.learner.reference=actor: processes that hold the KL penalty's reference, beside
    # those above
    num_reference_workers: int = 0
    cpus_per_reference_worker: float = 1.0
    gpus_per_reference_worker: float = 0.0
    colocate: bool = True  # rollout and learner take turns on the same processors
    # whoever has not the turn gives up its GPU memory: weights, keys and values, optimiser. Left
    # out: with colocate, where both have GPUs
    sleep: bool | None = None
    # how new weights reach the engines: object_store (shared memory of each machine, copied between
    # machines once), or group (broadcast over NCCL, or gloo where a GPU is shared or there is none)
    weight_transport: str = "object_store"
    weight_timeout_seconds: float = 300.0  # group: longest wait for a member or a bucket
    start_timeout_seconds: float = 180.0  # for all processes to come up
    call_timeout_seconds: float = (
        3600.0  # for one call of a worker; then the error names who is missing
    )

    def __post_init__(self) -> None:
        for name in ("num_rollout_workers", "num_learner_ranks"):
            require(f"cluster.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        require(
            "cluster.num_reference_workers", self.num_reference_workers,
            self.num_reference_workers >= 0, ">= 0",
        )  # fmt: skip
        for name in (
            "cpus_per_rollout_worker",
            "cpus_per_learner_rank",
            "cpus_per_reference_worker",
        ):
            require(f"cluster.{name}", getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in (
            "gpus_per_rollout_worker",
            "gpus_per_learner_rank",
            "gpus_per_reference_worker",
        ):
            require(f"cluster.{name}", getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require(
            "cluster.weight_transport", self.weight_transport,
            self.weight_transport in WEIGHT_TRANSPORTS, " or ".join(WEIGHT_TRANSPORTS),
        )  # fmt: skip
        for name in ("weight_timeout_seconds", "start_timeout_seconds", "call_timeout_seconds"):
            require(f"cluster.{name}", getattr(self, name), getattr(self, name) > 0, "> 0")
        if self.sleep and not self.colocate:
            raise ValueError(
                "cluster.sleep=true is for samplers and learners that take turns, but with "
                "cluster.colocate=false they work at the same time: leave sleep out, or set "
                "cluster.colocate=true"
            )

    @property
    def sleeps(self) -> bool:
        """Whether samplers and learners give up memory in turns."""
        return self.shares_gpus if self.sleep is None else self.sleep

    @property
    def shares_gpus(self) -> bool:
        """Whether a rollout worker and a learner rank are on the same GPU."""
        return self.colocate and self.gpus_per_rollout_worker > 0 < self.gpus_per_learner_rank


@dataclass
class TrainConfig:
    """Everything a training run is told."""

    experiment_name: str = "default"  # names the folder below output_dir
    seed: int = 0
    output_dir: str = "outputs"
    resume_mode: str = (
        "auto"  # auto: go on with the unfinished run; disable: a new run; or a run's folder
    )
    max_prompt_length: int = 512  # tokens
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSettings = field(default_factory=DataSettings)
    rollout: dict[str, Any] = field(default_factory=dict)  # `strategy` and that strategy's settings
    engine: EngineSettings = field(default_factory=EngineSettings)
    algorithm: AdvantageSettings = field(default_factory=AdvantageSettings)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    reward: RewardSettings = field(default_factory=RewardSettings)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def __post_init__(self) -> None:
        require("max_prompt_length", self.max_prompt_length, self.max_prompt_length >= 1, ">= 1")
        require("seed", self.seed, self.seed >= 0, ">= 0")
        if "/" in self.experiment_name or not self.experiment_name:
            raise ValueError(
                f"experiment_name={self.experiment_name!r}: a folder name is wanted, without '/'"
            )
        ranks, prompts = self.cluster.num_learner_ranks, self.trainer.ppo_mini_batch_size
        if prompts < ranks:
            raise ValueError(
                f"cluster.num_learner_ranks={ranks} is more than "
                f"trainer.ppo_mini_batch_size={prompts}: some ranks would never have a tree to "
                "train on; lower the one or raise the other"
            )
        checks.check_reference(self)
        checks.check_kept_kv(self)
        name, strategy = strategy_settings(self)
        checks.check_lengths(self, strategy)
        checks.check_uses_advantages(self.trainer.learner.policy_loss.name)
        checks.check_levels(self.algorithm, self.trainer.learner.policy_loss.name)
        checks.check_masks(self.algorithm, self.trainer.learner)
        checks.check_forks(self.algorithm, name, strategy)
        checks.check_segments(self, strategy)
        check_pipeline(self, strategy.max_response_length)
        checks.check_ages(self)
        updates = updates_per_step(self) * self.trainer.total_steps
        warmup = self.trainer.learner.optimizer.lr_warmup_steps
        if warmup >= updates:
            raise ValueError(
                f"trainer.learner.optimizer.lr_warmup_steps={warmup} is not less than the run's "
                f"{updates} updates: lower it (trainer.learner.optimizer.lr_warmup_steps=0), or "
                "raise trainer.total_steps"
            )


def strategy_settings(config: TrainConfig) -> tuple[str, Any]:
    """The rollout strategy's name and its own settings, built from ``config.rollout``.

    Raises:
        ValueError: no or unknown strategy; a key that this strategy does not use.
    """
    from rollout.strategies.base import STRATEGIES

    values = dict(config.rollout)
    name = values.pop("strategy", None)
    if name is None:
        raise ValueError(
            f"rollout.strategy is missing: choose one of {', '.join(STRATEGIES.names())}"
        )
    settings_class = STRATEGIES.get(name).Settings
    return name, settings_from(settings_class, values, where=f"rollout (strategy {name})")


def resolve_model_path(path: str) -> str:
    """Folder of a model: ``asset:NAME`` means one shipped with the package.

    Raises:
        ValueError: no such asset, a path that does not exist, or a folder without a config.json.
    """
    if path.startswith(ASSET_PREFIX):
        assets = Path(__file__).resolve().parent / "assets"
        folder = assets / path.removeprefix(ASSET_PREFIX)
        if not (folder / "config.json").is_file():
            known = (
                sorted(p.name for p in assets.iterdir() if p.is_dir()) if assets.is_dir() else []
            )
            raise ValueError(
                f"model {path!r} is not shipped; shipped: {', '.join(known) or 'none'}"
            )
        return str(folder)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model.path={path!r}: the folder has no config.json, so it holds no model"
            )
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise ValueError(f"model.path={path!r}: the folder has no weights (*.safetensors)")
        return str(folder)
    return _hub_name(path, "model.path")


def resolve_tokenizer_path(path: str, *, field_name: str) -> str:
    """Folder of a tokenizer, which needs no model beside it, or its name on the Hub;
    ``asset:NAME`` is that of a model shipped with the package.

    Raises:
        ValueError: no such asset, or a path that does not exist.
    """
    if path.startswith(ASSET_PREFIX):
        return resolve_model_path(path)
    folder = Path(path).expanduser()
    return str(folder) if folder.is_dir() else _hub_name(path, field_name)


def _hub_name(path: str, field_name: str) -> str:
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"{field_name}={path!r}: no such folder (from {Path.cwd()})")
    return path


def learner_settings(config: TrainConfig) -> LearnerSettings:
    """The learner's settings with the length of its schedule filled in."""
    learner = config.trainer.learner
    total = learner.optimizer.total_training_steps or updates_per_step(config) * (
        config.trainer.total_steps
    )
    return replace(learner, optimizer=replace(learner.optimizer, total_training_steps=total))


def updates_per_step(config: TrainConfig) -> int:
    """Optimiser updates that a step makes of a full batch."""
    trainer = config.trainer
    return trainer.ppo_epochs * trainer.train_batch_size // trainer.ppo_mini_batch_size


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    return below + [d for d in divisors if d > wanted][:1]
