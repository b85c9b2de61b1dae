"""Linear layers as an engine runs them: weights packed for few rows, and a head in fp32.

On a CPU, decoding multiplies few rows by large weights. oneDNN does that up to twice as fast as
torch's own path when the weight lies in its blocked layout, and a row's result then hardly depends
on the number of rows. The packed weight is a second copy; it is made again whenever the parameter
changes.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

_HEAD_CHUNK = 1 << 24  # weights of the head cast to fp32 at a time
_LEAST_PACKED = 1 << 17  # weights of a float32 layer: below, torch's own path is faster


class PackedLinear(torch.nn.Linear):
    """A linear layer that keeps its weight in oneDNN's layout too, for inference on a CPU.

    It notices new values by autograd's version counter, which writes through ``.data`` bypass.
    """

    _packed: torch.Tensor | None = None
    _packed_version: tuple[int, int] = (0, 0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        is_plain = torch.is_grad_enabled() or weight.is_inference()  # the latter has no version
        if is_plain or input.dtype != weight.dtype or not input.numel():
            return super().forward(input)
        version = (weight._version, weight.data_ptr())
        if self._packed is None or self._packed_version != version:
            self._packed = pack(weight)
            self._packed_version = version
        return packed_product(input.contiguous(), self._packed, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs for itself: the packed weight cannot be copied."""
        return {k: v for k, v in self.__dict__.items() if k != "_packed"}


class Fp32Head(torch.nn.Linear):
    """A language-model head whose logits are float32, from weights of fewer bits.

    On CUDA the product takes the weights as they are and keeps its fp32 sums; elsewhere the weight
    is cast a chunk at a time. What a model does to its logits afterwards (factor, soft cap) is then
    done in float32, too.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        bias = None if self.bias is None else self.bias.float()
        if weight.is_cuda and input.dtype == weight.dtype:
            rows = input.reshape(-1, input.shape[-1])
            logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
            logits = logits if bias is None else logits + bias
            return logits.view(*input.shape[:-1], -1)
        wide = input.float()
        chunks = weight.split(max(1, _HEAD_CHUNK // weight.shape[1]))
        logits = torch.cat([F.linear(wide, chunk.float()) for chunk in chunks], dim=-1)
        return logits if bias is None else logits + bias


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def packed_product(
    rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``F.linear`` of contiguous rows with a weight from ``pack``."""
    return torch.ops.mkldnn._linear_pointwise.default(rows, packed, bias, "none", [], "")


def use_fp32_head(model: PreTrainedModel) -> None:
    """Let ``model`` compute its logits in float32. A float32 or float64 model does already.

    Raises:
        ValueError: its head is no plain linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"engine setting fp32_lm_head=True does not fit model {type(model).__name__}: its head "
            f"is a {type(head).__name__}, no linear layer. Set fp32_lm_head=False"
        )
    if head.weight.dtype in (torch.bfloat16, torch.float16):
        head.__class__ = Fp32Head


def use_float64_experts(model: PreTrainedModel) -> None:
    """Let the experts of a float64 model be computed one after the other: torch's grouped product
    takes no float64.
    """
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def pack_linear_layers(model: torch.nn.Module, inside: Iterable[torch.nn.Linear] = ()) -> None:
    """Let the linear layers of a CPU model, but those ``inside`` others that run them, use packed
    weights, where this CPU has them and where they pay.
    """
    others = {id(layer) for layer in inside}
    every = (module for module in model.modules() if type(module) is torch.nn.Linear)
    layers = [layer for layer in every if id(layer) not in others]
    packable = {d: can_pack(d) for d in {layer.weight.dtype for layer in layers}}
    for layer in layers:
        weight = layer.weight
        if packable[weight.dtype] and weight.device.type == "cpu" and packing_pays(weight):
            layer.__class__ = PackedLinear


def packing_pays(weight: torch.Tensor) -> bool:
    """Whether a product with a packed weight of this size is faster."""
    return weight.dtype != torch.float32 or weight.numel() >= _LEAST_PACKED


def undo_linear_changes(model: torch.nn.Module) -> None:
    """Undo ``pack_linear_layers`` and ``use_fp32_head``."""
    for module in model.modules():
        if type(module) in (PackedLinear, Fp32Head):
            module.__class__ = torch.nn.Linear
            module.__dict__.pop("_packed", None)


def forget_packed(model: torch.nn.Module) -> None:
    """Free the packed weights; they are made again when they are used."""
    for module in model.modules():
        if type(module) is PackedLinear:
            module._packed = None


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies by packed weights of ``dtype``."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    try:
        pack(torch.zeros(16, 16, dtype=dtype))
    except RuntimeError:  # the CPU lacks the instructions for this dtype
        return False
    return True
