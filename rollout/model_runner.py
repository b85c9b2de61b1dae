"""Runs a transformers causal LM over query rows of the tree."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from rollout.attention.base import NAME, AttentionContext, Plan, register
from rollout.fused_layers import fused_layers, undo_fused_layers
from rollout.fusing import fuse_decoder_layers
from rollout.kv_pool import KVPool
from rollout.linear import (
    pack_linear_layers,
    undo_linear_changes,
    use_float64_experts,
    use_fp32_head,
)
from rollout.row_rule import RowRule, row_rule
from rollout.settings import EngineSettings

_GPU_ROWS = RowRule(8, 8)  # tensor cores want multiples of 8
_ANY_ROWS = RowRule(1, 1)


def load_model(model_path: str | Path, *, dtype: str, device: str) -> PreTrainedModel:
    """Load a causal LM folder with tree attention.

    Raises:
        ValueError: no such folder, or no model in it.
    """
    register()
    folder = Path(model_path).expanduser()
    if not (folder / "config.json").is_file():
        problem = "has no config.json" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"model folder {str(model_path)!r} {problem}: give a Hugging Face model folder "
            "(config.json and weights)"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=NAME, local_files_only=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights in {str(folder)!r} cannot be loaded: {error}") from error
    torch.nn.Module.to(model, device)
    return model.eval()


def use_tree_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a loaded model to tree attention and to evaluation."""
    register()
    model.set_attn_implementation(NAME)
    return model.eval()


class ModelRunner:
    """A model, the pool its attention reads, and one forward over query rows.

    On a CPU a linear layer may round a row otherwise when there are few others. A float64 model's
    rows are padded to a number at which it does not (see ``rollout.row_rule``), so that its
    results are the same in any company. Below float64 that is a setting: keys are cut where other
    paths branch off, which moves a row's last digits more than the layers do.
    """

    def __init__(self, model: PreTrainedModel, pool: KVPool, settings: EngineSettings) -> None:
        undo_linear_changes(model)  # another engine's
        undo_fused_layers(model)
        self.max_position, self.max_position_reason = _max_position(model)
        use_float64_experts(model)
        if settings.fp32_lm_head:
            use_fp32_head(model)
        if settings.pack_weights:
            last = None if self.max_position is None else self.max_position - 1
            fuse_decoder_layers(model, last)
            inside = [linear for f in fused_layers(model) for linear in f.linear_layers()]
            pack_linear_layers(model, inside)
        self.row_rule = _GPU_ROWS
        if pool.device.type == "cpu":
            pads = settings.pad_rows or model.dtype == torch.float64
            self.row_rule = row_rule(model) if pads else _ANY_ROWS
        self.model = model
        self.pool = pool
        self.device = pool.device
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def check_length(self, length: int, max_tokens: int) -> None:
        """
        Raises:
            ValueError: a path of ``length`` tokens and ``max_tokens`` more can never fit the pool
                or the model's positions.
        """
        total = length + max_tokens
        if total > self.pool.num_slots:
            raise ValueError(
                f"num_kv_slots={self.pool.num_slots} is too small: a path of {length} tokens plus "
                f"max_tokens={max_tokens} needs {total}"
            )
        limit = self.max_position
        if limit is not None and total > limit:
            raise ValueError(
                f"a path of {length} tokens plus max_tokens={max_tokens} exceeds the {limit} "
                f"positions this model can serve from a cache: {self.max_position_reason}"
            )

    @torch.inference_mode()
    def forward(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        write_slots: np.ndarray,
        plan: Plan,
        wanted: np.ndarray,
    ) -> torch.Tensor:
        """Logits [W, V] at the ``wanted`` rows.

        Args:
            token_ids, positions, write_slots: [N], N >= 1; see ``AttentionContext``.
            wanted: int64 [W], row numbers.
        """
        num_rows = len(token_ids)
        padding = self.row_rule.padding(num_rows)
        slots = np.concatenate([write_slots, np.full(padding, self.pool.trash_slot)])
        context = AttentionContext(self.pool, plan, self._tensor(slots), num_rows)
        zeros = np.zeros(padding, np.int64)
        extra: dict[str, torch.Tensor] = {}
        if self._keeps_logits:
            rows = np.concatenate([wanted, np.zeros(self.row_rule.padding(len(wanted)), np.int64)])
            extra["logits_to_keep"] = self._tensor(rows)
        logits = self.model(
            input_ids=self._tensor(np.concatenate([token_ids, zeros]))[None],
            position_ids=self._tensor(np.concatenate([positions, zeros]))[None],
            use_cache=False,
            tree=context,
            **extra,
        ).logits[0]
        self._check(context)
        return logits[: len(wanted)] if self._keeps_logits else logits[self._tensor(wanted)]

    def run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Logits [T, V] of all rows, from what is on the device already.

        Args:
            token_ids, positions: int64 [T].
        """
        logits = self.model(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, tree=context
        ).logits[0]
        self._check(context)
        return logits

    def _check(self, context: AttentionContext) -> None:
        if not context.calls:
            raise NotImplementedError(
                "it does not take its attention through transformers' attention interface"
            )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64, copy=False)).to(self.device)


def _max_position(model: PreTrainedModel) -> tuple[int | None, str]:
    """Longest path the model can serve and why no longer one: its position table, or the length up
    to which a rotary embedding keeps one set of frequencies.

    Dynamic and longrope embeddings choose their frequencies by the longest position in the batch,
    so keys stored before the threshold would not fit queries after it.
    """
    config = model.config.get_text_config()
    limits = [
        (
            int(kind.get("original_max_position_embeddings") or config.max_position_embeddings),
            f"its {kind['rope_type']} rotary embedding changes all frequencies beyond them, so "
            "that no stored key would fit",
        )
        for kind in _moving_ropes(model)
    ]
    if not getattr(config, "rope_parameters", None):
        learned = getattr(config, "n_positions", None) or getattr(
            config, "max_position_embeddings", None
        )
        if isinstance(learned, int) and learned > 0:
            limits.append((learned, "its table of positions is as long"))
    return min(limits, default=(None, ""))


def _moving_ropes(model: PreTrainedModel) -> list[dict]:
    """Rotary settings under which the frequencies depend on the longest position of a forward."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    return [
        kind
        for kind in kinds
        if isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope")
    ]
