"""Where a run's metrics go besides its own ``metrics.jsonl``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

WANDB_MODES = ("disabled", "offline", "online")


@dataclass
class TrackingSettings:
    """Weights & Biases. ``metrics.jsonl`` is always written, whatever stands here."""

    wandb_mode: str = "disabled"  # disabled | offline (no network, no account) | online
    project_name: str | None = None  # a family of experiments; default: the experiment's name
    entity: str | None = None  # account or team; default: W&B's own default
    group: str | None = None  # what the web page groups runs by; default: the run's id
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.wandb_mode not in WANDB_MODES:
            raise ValueError(
                f"tracking.wandb_mode={self.wandb_mode!r} is not known: choose one of "
                f"{', '.join(WANDB_MODES)} (offline needs no network and no account)"
            )
