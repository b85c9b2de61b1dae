"""The policy: a causal language model of transformers that maps a packed row to log-probabilities.

Everything that touches a weight happens in this module's ``forward``, so that an engine which
shards weights over ranks can gather them by its hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainers import attention
from trainers.batch import PackedBatch
from trainers.logprobs import LogprobHead
from trainers.settings import LearnerSettings

if TYPE_CHECKING:
    from trainers.lora import Adapters

_LAYER_TYPES = {"full_attention", "sliding_attention"}


class PolicyModel(torch.nn.Module):
    """A causal language model over packed rows.

    Attributes:
        model: the transformers model, its head included.
        head: the same head, giving log-probabilities.
        attention_kernel: ``LearnerSettings.attention``.
        adapters: what is trained in place of the weights; None with full training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        logprob_chunk_size: int = 4096,
        fp32_lm_head: bool = False,
        attention_kernel: str = "auto",
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.adapters = adapters
        self.attention_kernel = attention_kernel
        lm_head = model.get_output_embeddings()
        if not isinstance(lm_head, torch.nn.Linear):
            raise ValueError(
                f"{type(model).__name__} has no linear language-model head; choose a causal LM"
            )
        self.head = LogprobHead(
            lm_head, model.config, chunk_size=logprob_chunk_size, fp32=fp32_lm_head
        )

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [T, hidden size] of a row."""
        context = attention.PackedTreeContext(
            visible_until=batch.visible_until,
            position_ids=batch.position_ids,
            device=batch.token_ids.device,
            requested=self.attention_kernel,
        )
        output = self.model.base_model(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            packed_tree=context,
        )
        return output.last_hidden_state[0]

    def forward(
        self, batch: PackedBatch, index: torch.Tensor, entropy_grad: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies [M] of the row's tokens ``index`` (int64 [M]), each
        predicted from its parent in the tree, under the temperature it was sampled with.
        """
        predictor = batch.predictor[index]
        hidden = self.hidden_states(batch)[predictor.clamp(min=0)]
        return self.head(hidden, batch.token_ids[index], batch.temperature[index], entropy_grad)

    def weights(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a plain model that computes the same.

        Args:
            state: ``self.model.state_dict()`` with whole tensors; without adapters it is this.
        """
        return dict(state) if self.adapters is None else self.adapters.merged(state)


def load_policy(model_path: str, settings: LearnerSettings, *, trained: bool = True) -> PolicyModel:
    """Load a folder or Hub name with packed-tree attention, as one function of its weights: in
    evaluation mode, without dropout, noise on routers or sampled experts.

    Args:
        trained: False: without adapters, and without recomputing layers for a gradient.

    Raises:
        ValueError: the model's attention can't be trained on packed trees, the kernel that is asked
            for can't work here, or the model has no such layers as ``lora`` asks for.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, settings.dtype)
    attention.check_attention(settings.attention, device, dtype)
    config = AutoConfig.from_pretrained(model_path)
    check_supported(config)
    switch_off_dropout(config)
    attention.register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, config=config, dtype=dtype, attn_implementation=attention.NAME
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the weights of {model_path!r} cannot be loaded: {error}") from error
    model.eval()
    if trained and settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # which is when it recomputes; its parts stay as they are
    adapters = None
    if trained and settings.lora.is_on:
        from trainers.lora import Adapters  # peft takes a while to load

        adapters = Adapters(model, settings.lora)
    return PolicyModel(
        model,
        logprob_chunk_size=settings.logprob_chunk_size,
        fp32_lm_head=settings.fp32_lm_head,
        attention_kernel=settings.attention,
        adapters=adapters,
    )


def check_supported(config: PretrainedConfig) -> None:
    """Refuse models whose layers mix tokens by other means than (windowed) causal attention: they
    would silently see across branches.
    """
    text_config = config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    if unknown := layer_types - _LAYER_TYPES:
        raise ValueError(
            f"model_type={config.model_type!r} has layers of type {', '.join(sorted(unknown))}; "
            "training on token trees supports full and sliding-window attention only"
        )
    if getattr(text_config, "attention_chunk_size", None):
        raise ValueError(
            f"model_type={config.model_type!r} uses chunked attention, which training on token "
            "trees doesn't support"
        )


def switch_off_dropout(config: PretrainedConfig) -> None:
    """A policy gradient compares log-probabilities of one function: no dropout of any kind."""
    text_config: Any = config.get_text_config()
    for name, value in text_config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(text_config, name, 0.0)
