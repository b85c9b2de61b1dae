"""Token log-probabilities and entropies from hidden states, a chunk of logits at a time.

A vocabulary of 152k and a row of 128k tokens would be 80 GB of float32 logits, so they are computed
for a chunk of tokens and, when there are several chunks, computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

LogitsFunction = Callable[[torch.Tensor], torch.Tensor]


class LogprobHead(torch.nn.Module):
    """A language-model head that gives log-probabilities of chosen tokens in place of logits.

    The head's weight is a parameter of this module's child; the loop over chunks runs inside one
    ``forward``, so that a sharded weight is gathered once, however many chunks there are.
    """

    def __init__(
        self, lm_head: torch.nn.Linear, config: PretrainedConfig, *, chunk_size: int, fp32: bool
    ) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.chunk_size = chunk_size
        self.fp32 = fp32
        self.scale, self.softcap = _logit_transform(config)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] as the model's own forward gives them (in float32 with ``fp32``)."""
        weight: torch.Tensor = self.lm_head.weight
        bias: torch.Tensor | None = self.lm_head.bias
        if self.fp32:
            hidden, weight = hidden.float(), weight.float()
            bias = None if bias is None else bias.float()
        logits = F.linear(hidden, weight, bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def forward(
        self,
        hidden: torch.Tensor,  # [N, hidden size], at the tokens' predictors
        token_ids: torch.Tensor,  # int64 [N]
        temperature: torch.Tensor,  # [N]
        entropy_grad: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies (nats) [N] under softmax(logits / temperature), float32
        or wider. Entropies carry no gradient unless ``entropy_grad``.
        """
        return token_logprobs(
            self.logits, hidden, token_ids, temperature, self.chunk_size, entropy_grad
        )


def token_logprobs(
    logits_of: LogitsFunction,
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    temperature: torch.Tensor,
    chunk_size: int,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`LogprobHead.forward`; a temperature of 0 (greedy) counts as 1."""

    def chunk(
        hidden: torch.Tensor, token_ids: torch.Tensor, temperature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(hidden)
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        divisor = torch.where(temperature > 0, temperature, 1.0).to(logits.dtype)
        logprobs = torch.log_softmax(logits / divisor[:, None], dim=-1)
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, token_ids[:, None]).squeeze(1), entropy

    if hidden.shape[0] <= chunk_size:
        return chunk(hidden, token_ids, temperature)
    parts = [
        checkpoint(chunk, *inputs, use_reentrant=False)
        if torch.is_grad_enabled()
        else chunk(*inputs)
        for inputs in zip(
            hidden.split(chunk_size),
            token_ids.split(chunk_size),
            temperature.split(chunk_size),
            strict=True,
        )
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """What a model does to its head's output: a factor (Cohere, Granite) and a soft cap
    (Gemma 2).
    """
    text_config = config.get_text_config()
    scale = float(getattr(text_config, "logit_scale", None) or 1.0)
    scale /= float(getattr(text_config, "logits_scaling", None) or 1.0)
    return scale, getattr(text_config, "final_logit_softcapping", None)
