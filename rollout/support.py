"""Models that the tree engine cannot serve, known by their structure before anything is computed.

The load probe (``rollout.probe``) decides by numbers and refuses what differs; this names the
cause where it can be seen. A tree serves a model whose tokens meet in causal attention alone: full,
with a window, a soft cap or sinks.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

# What a family's code may raise for a configuration or a call that is not its own.
CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

_ADVICE = (
    "Choose a model whose tokens meet in causal attention alone (such as llama, qwen3, mistral, "
    "gemma3, gpt_oss, deepseek_v3)"
)
_RECURRENT_KINDS = {
    "linear_attention": "linear-attention or recurrent",
    "mamba": "recurrent (mamba)",
    "mamba2": "recurrent (mamba2)",
    "recurrent": "recurrent",
    "hybrid": "hybrid (attention and recurrent)",
    "conv": "convolution",
    "chunked_attention": "chunked-attention",
}
# What the parameters of state-space, RWKV and xLSTM layers are called.
_STATE_PARAMETERS = ("A_log", "time_decay", "igate_preact.weight", "rg_lru.recurrent_param")


def refusal(model: PreTrainedModel, what: str) -> ValueError:
    """The error for a model that cannot be served."""
    kind = model.config.model_type
    return ValueError(
        f"model {type(model).__name__} ({kind}) cannot be served by the tree engine: {what}. "
        f"{_ADVICE}"
    )


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse what is known not to work.

    Raises:
        ValueError: encoder-decoder, recurrent, linear-attention, convolution or chunked-attention
            layers, position biases inside attention.
    """
    cause = unsupported(model)
    if cause is not None:
        raise refusal(model, cause)


def unsupported(model: PreTrainedModel) -> str | None:
    """What of the model is not supported; None if nothing is known."""
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder, the tree holds one sequence of tokens a path"
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    kinds += getattr(text, "layers_block_type", None) or ()
    found = sorted({_RECURRENT_KINDS[kind] for kind in kinds if kind in _RECURRENT_KINDS})
    if found:
        return f"it has {' and '.join(found)} layers, which are no attention over a path"
    names = {name for name, _ in model.named_parameters()}
    if any(name.endswith(_STATE_PARAMETERS) for name in names):
        return "it has recurrent layers, which are no attention over a path"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return "it has convolution layers, through which neighbouring tokens meet"
    if _has_alibi(text) or any("relative_attention_bias" in name for name in names):
        return "it adds position biases (ALiBi or relative ones) to its attention scores"
    return None


def _has_alibi(config: object) -> bool:
    if getattr(config, "model_type", None) == "bloom":
        return True
    attention = getattr(config, "attn_config", None)  # MPT
    return bool(getattr(config, "alibi", False) or getattr(attention, "alibi", False))
