"""What a training run can be told: plain dataclasses, checked when they are built. No torch in
here.

Each room brings its own settings; this file adds what only the roof knows and checks what spans
rooms.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rewards.settings import RewardSettings
from rollout.sampling_settings import COOLEST
from rollout.settings import EngineSettings
from trainers.settings import LOSS_TRAITS, LearnerSettings, is_sequence_level, loss_traits
from treepo.algorithm_settings import (
    ESTIMATOR_TRAITS,
    AdvantageSettings,
    estimator_traits,
    leaf_level_estimators,
)
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
    # sync: sample, learn, publish in turn | async: all at once; needs the segments' settings of
    # trainer=async, cluster.colocate=false and a correction for tokens of older weights
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
        require(
            "cluster.weight_timeout_seconds", self.weight_timeout_seconds,
            self.weight_timeout_seconds > 0, "> 0",
        )  # fmt: skip
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
        self._check_reference()
        if self.cluster.sleeps and self.engine.keeps_kv and not self.engine.kv_on_host:
            raise ValueError(
                "engine.kv_over_update=keep leaves keys and values in the pool, whose memory is "
                "given up for every update (cluster.sleep): set engine.kv_on_host=true, or "
                "cluster.sleep=false"
            )
        if self.engine.keeps_kv and not self.trainer.segments.is_on:
            raise ValueError(
                "engine.kv_over_update=keep is for trees that go on after an update, and with "
                "trainer.segments.segment_length=0 none does: set "
                "trainer.segments.segment_length, or leave kv_over_update out"
            )
        name, strategy = strategy_settings(self)
        self._check_lengths(strategy)
        check_uses_advantages(self.trainer.learner.policy_loss.name)
        check_levels(self.algorithm, self.trainer.learner.policy_loss.name)
        check_masks(self.algorithm, self.trainer.learner)
        check_forks(self.algorithm, name, strategy)
        check_segments(self, strategy)
        check_pipeline(self)
        updates = updates_per_step(self) * self.trainer.total_steps
        warmup = self.trainer.learner.optimizer.lr_warmup_steps
        if warmup >= updates:
            raise ValueError(
                f"trainer.learner.optimizer.lr_warmup_steps={warmup} is not less than the run's "
                f"{updates} updates: lower it, or raise trainer.total_steps"
            )

    def _check_reference(self) -> None:
        workers, reference = self.cluster.num_reference_workers, self.trainer.learner.reference
        if reference == "actor" and not workers:
            raise ValueError(
                "trainer.learner.reference='actor' needs processes that hold the reference, but "
                "cluster.num_reference_workers=0: set it to 1 or more, or choose "
                "trainer.learner.reference=own"
            )
        if workers and reference != "actor":
            raise ValueError(
                f"cluster.num_reference_workers={workers} is not used with "
                f"trainer.learner.reference={reference!r}: leave it out, or set "
                "trainer.learner.reference=actor"
            )

    def _check_lengths(self, strategy: Any) -> None:
        path = self.max_prompt_length + strategy.max_response_length
        if path > self.engine.num_kv_slots:
            raise ValueError(
                f"engine.num_kv_slots={self.engine.num_kv_slots} cannot hold one path of "
                f"{path} tokens (max_prompt_length + rollout.max_response_length): raise it to at "
                f"least {path}, better to {path * strategy.n} for a whole tree"
            )
        tree = self.max_prompt_length + strategy.n * strategy.max_response_length
        limit = self.trainer.learner.max_tokens_per_micro_batch
        if tree > limit:
            raise ValueError(
                f"trainer.learner.max_tokens_per_micro_batch={limit} cannot hold a prompt's "
                f"largest tree of {tree} tokens (max_prompt_length + rollout.n x "
                f"rollout.max_response_length), and a tree is not split: raise it to {tree}, or "
                "lower one of the three"
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


def check_levels(algorithm: AdvantageSettings, policy_loss: str) -> None:
    """A loss with one term a response needs one advantage a response.

    Raises:
        ValueError: the estimator gives a response's segments different ones.
    """
    node_level = estimator_traits(algorithm.adv_estimator).is_node_level
    if is_sequence_level(policy_loss) and node_level:
        raise ValueError(
            f"trainer.learner.policy_loss.name={policy_loss!r} needs one advantage a response, but "
            f"algorithm.adv_estimator={algorithm.adv_estimator!r} gives each segment its own: "
            f"choose a loss of tokens such as 'ppo_clip', or one of the estimators "
            f"{', '.join(leaf_level_estimators())}"
        )


def check_masks(algorithm: AdvantageSettings, learner: LearnerSettings) -> None:
    """Masks of tokens fit the advantages and what the loss is divided by.

    Raises:
        ValueError: MPT masking with advantages of segments; masked tokens are to leave a
            denominator that counts no tokens.
    """
    gate, estimator = learner.mpt.gate, algorithm.adv_estimator
    if gate != "never" and estimator_traits(estimator).is_node_level:
        raise ValueError(
            f"trainer.learner.mpt.gate={gate!r} masks a response's share of a token, but "
            f"algorithm.adv_estimator={estimator!r} gives all responses of a segment one advantage "
            "together: set trainer.learner.mpt.gate='never', or choose one of the estimators "
            f"{', '.join(leaf_level_estimators())}"
        )
    for name, masks in (("off_policy", learner.off_policy), ("mpt", learner.mpt)):
        if algorithm.loss_weighting == "fixed_length" and not masks.masked_in_denominator:
            raise ValueError(
                f"trainer.learner.{name}.masked_in_denominator=False takes masked tokens out of "
                "the number of tokens that the loss is divided by, and "
                "algorithm.loss_weighting='fixed_length' divides by a constant: leave it out, or "
                "set algorithm.loss_weighting='token_mean'"
            )


def check_uses_advantages(policy_loss: str) -> None:
    """A loss without advantages would train on every response alike, right or wrong.

    Raises:
        ValueError: the policy loss is one for supervised training.
    """
    if not loss_traits(policy_loss).uses_advantages:
        others = [name for name, traits in LOSS_TRAITS.items() if traits.uses_advantages]
        raise ValueError(
            f"trainer.learner.policy_loss.name={policy_loss!r} leaves rewards and advantages out, "
            f"so it is for python -m treepo.sft alone: choose {', '.join(others)}"
        )


def check_forks(algorithm: AdvantageSettings, strategy_name: str, strategy: Any) -> None:
    """An estimator that compares responses below the prompt needs trees that fork there.

    Raises:
        ValueError: the rollout makes none, so that every advantage would be 0.
    """
    if not estimator_traits(algorithm.adv_estimator).needs_forks:
        return
    divergence = getattr(strategy, "initial_divergence_min", 0)
    if strategy_name != "flat" and divergence < strategy.n:
        return
    cause, mend = "rollout=flat", "rollout=treepo"
    if strategy_name != "flat":
        cause = f"rollout.initial_divergence_min={divergence} (rollout.n={strategy.n})"
        mend = f"rollout.initial_divergence_min and _max below {strategy.n}"
    raise ValueError(
        f"algorithm.adv_estimator={algorithm.adv_estimator!r} compares responses that share a "
        f"segment below the prompt, and with {cause} there are none, so every advantage would be "
        f"0: choose algorithm.adv_estimator='grpo', or {mend}"
    )


def check_segments(config: TrainConfig, strategy: Any) -> None:
    """
    Raises:
        ValueError: segments that do not fit the rollout, or further batches in a step of them.
    """
    segments, algorithm = config.trainer.segments, config.algorithm
    segments.check_against(n=strategy.n, max_response_length=strategy.max_response_length)
    if segments.is_on and algorithm.max_num_gen_batches > 1:
        raise ValueError(
            f"algorithm.max_num_gen_batches={algorithm.max_num_gen_batches} asks for further "
            "batches of prompts within a step, and with trainer.segments.segment_length="
            f"{segments.segment_length} a step grows every prompt by one segment alone: set "
            "algorithm.max_num_gen_batches=1 and trainer.segments.train_on=full_batch, under which "
            "an update waits until trainer.train_batch_size groups with a signal are there"
        )


def check_group(algorithm: AdvantageSettings, strategy: Any) -> None:
    """A baseline of the other responses needs other responses, and different ones. (An evaluation
    does not.)

    Raises:
        ValueError: there is one response a prompt, or all are the greedy one.
    """
    if strategy.n == 1 and algorithm.adv_estimator in ESTIMATOR_TRAITS.keys() - {"reinforce_pp"}:
        raise ValueError(
            f"algorithm.adv_estimator={algorithm.adv_estimator!r} compares a prompt's responses, "
            "and with rollout.n=1 there is one: raise rollout.n, or choose "
            "algorithm.adv_estimator='reinforce_pp'"
        )
    if strategy.n > 1 and strategy.temperature == 0:
        raise ValueError(
            f"rollout.temperature=0.0 draws the same greedy response rollout.n={strategy.n} times, "
            "so there is nothing to compare: set rollout.temperature to 1.0, say"
        )


def require(field_name: str, value: object, ok: bool, allowed: str) -> None:
    """Raise a ``ValueError`` that names the field, its value and what is allowed, unless ``ok``."""
    if not ok:
        raise ValueError(f"{field_name}={value!r} is out of range: it must be {allowed}")


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
