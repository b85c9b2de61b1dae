"""The data section of a run's configuration, and that of each evaluation split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ROW_FORMATS = ("auto", "verl", "trl", "gsm8k")
ON_OVERLAP = ("drop", "error", "allow")
LARGEST_SIZE = 1_000_000  # problems of one generated set


@dataclass
class DataSettings:
    """Where problems come from and how they become prompts."""

    # reasoning_gym: generated; file: local .jsonl, .json or .parquet; hub: a data set of the
    # Hugging Face Hub or a local folder; or your own 'module:function' that takes these settings
    # and gives rows (dicts in one of the row formats)
    source: str = "reasoning_gym"

    task: str = "chain_sum"  # reasoning_gym: which of its tasks
    # reasoning_gym: settings of the task; chain_sum also takes min_value and max_value (its terms)
    task_config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0  # reasoning_gym: of the generator; sets of different seeds share no row
    size: int = 1000  # reasoning_gym: number of problems

    files: list[str] = field(default_factory=list)  # file: paths, read in this order
    name: str = ""  # hub: data set, e.g. openai/gsm8k, or a local folder
    config_name: str = ""  # hub: its configuration, e.g. main
    split: str = "train"  # hub
    revision: str = ""  # hub: branch, tag or commit; empty: the newest

    # columns of a row: verl (prompt, data_source, reward_model.ground_truth, extra_info), trl
    # (prompt; the other columns go to the reward), gsm8k (question, answer); auto: told by columns
    row_format: str = "auto"
    data_source: str = ""  # names the verifier for rows that don't name theirs; empty: file or set
    max_samples: int = 0  # keep only the first so many rows; 0: all

    # rewrites the question: text with {question} in it, or your own 'module:function' (str -> str)
    prompt_template: str = ""
    system_prompt: str = ""  # put before the question, as a message of its own
    instruction_suffix: str = ""  # appended to the question as it stands, e.g. " Think first."
    apply_chat_template: bool = True  # the tokenizer's; false: the question as raw text
    # keywords for the chat template, e.g. {enable_thinking: false}
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # drop prompts longer than max_prompt_length; false: they are an error
    filter_overlong_prompts: bool = False
    # an evaluation split's problem that is also trained on: drop (from the split), error, or allow
    on_overlap: str = "drop"

    def __post_init__(self) -> None:
        _one_of("data.row_format", self.row_format, ROW_FORMATS)
        _one_of("data.on_overlap", self.on_overlap, ON_OVERLAP)
        if self.max_samples < 0:
            raise ValueError(f"data.max_samples={self.max_samples}: must be >= 1, or 0 for all")
        if self.source == "reasoning_gym":
            if self.size < 1:
                raise ValueError(f"data.size={self.size}: must be >= 1")
            if self.size > LARGEST_SIZE:
                raise ValueError(f"data.size={self.size}: must be <= {LARGEST_SIZE}")
            if not 0 <= self.seed < 4000:
                raise ValueError(f"data.seed={self.seed}: must be in 0..3999")
            for key in ("seed", "size"):
                if key in self.task_config:
                    raise ValueError(f"data.task_config.{key}: set data.{key} instead")
        if self.source == "file" and not self.files:
            raise ValueError(
                "data.files is empty with data.source=file: name at least one .jsonl, .json or "
                ".parquet file, e.g. 'data.files=[train.jsonl]'"
            )
        if self.source == "hub" and not self.name:
            raise ValueError(
                "data.name is empty with data.source=hub: name a data set, e.g. "
                "data.name=openai/gsm8k"
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
