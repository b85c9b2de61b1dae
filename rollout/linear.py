"""Linear layers as an engine runs them: weights packed for few rows, a head in fp32, and how many
rows make a row's result independent of its company.

On a CPU, decoding multiplies few rows by large weights. oneDNN does that up to twice as fast as
torch's own path when the weight lies in its blocked layout, and a row's result then hardly depends
on the number of rows. The packed weight is a second copy; it is made again whenever the parameter
changes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_HEAD_CHUNK = 1 << 24  # weights of the head cast to fp32 at a time
_LEAST_PACKED = 1 << 17  # weights of a float32 layer: below, torch's own path is faster
_MOST_ROWS = 40  # of ``row_rule``: any remainder a kernel may treat apart, and full blocks
_MOST_COLUMNS = 4096  # of the layers it tries


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
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
            self._packed_version = version
        return torch.ops.mkldnn._linear_pointwise.default(
            input.contiguous(), self._packed, self.bias, "none", [], ""
        )

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


def pack_linear_layers(model: torch.nn.Module) -> None:
    """Let the linear layers of a CPU model use packed weights, where this CPU has them and where
    they pay.
    """
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    packable = {d: _can_pack(d) for d in {layer.weight.dtype for layer in layers}}
    for layer in layers:
        weight = layer.weight
        is_small = weight.dtype == torch.float32 and weight.numel() < _LEAST_PACKED
        if packable[weight.dtype] and weight.device.type == "cpu" and not is_small:
            layer.__class__ = PackedLinear


def undo_linear_changes(model: torch.nn.Module) -> None:
    """Undo ``pack_linear_layers`` and ``use_fp32_head``."""
    for module in model.modules():
        if type(module) in (PackedLinear, Fp32Head):
            module.__class__ = torch.nn.Linear
            module.__dict__.pop("_packed", None)


def _can_pack(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype))
    except RuntimeError:  # the CPU lacks the instructions for this dtype
        return False
    return True


@dataclass(frozen=True, slots=True)
class RowRule:
    """Row counts at which a row's result does not depend on how many rows there are: multiples of
    ``multiple`` from ``least`` on.
    """

    least: int
    multiple: int

    def padding(self, num_rows: int) -> int:
        """Rows to add to ``num_rows`` >= 1."""
        return max(self.least - num_rows, -num_rows % self.multiple)


_RULES = [RowRule(1, 1), RowRule(2, 1), RowRule(4, 1), RowRule(2, 2), RowRule(4, 4), RowRule(8, 8)]
_TRIED_ROWS = (*range(1, 13), 16, 17, 24, 31)


def row_rule(model: torch.nn.Module) -> RowRule:
    """The cheapest rule that the model's linear layers obey on this machine, found by trying one
    layer of each shape with random rows. (Experts of a mixture see what rows the router sends them:
    no rule helps there.)
    """
    generator = torch.Generator().manual_seed(0)
    unequal: set[int] = set()  # row counts that give other rows
    layers: dict[tuple[Any, ...], torch.nn.Linear | Conv1D] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            layers.setdefault((type(module), *module.weight.shape), module)
    for layer in layers.values():
        product, width = _narrow(layer)
        rows = torch.randn(_MOST_ROWS, width, generator=generator)
        rows = rows.to(layer.weight.device, layer.weight.dtype)
        with torch.inference_mode():
            expected = product(rows)
            counts = [n for n in _TRIED_ROWS if n not in unequal]
            unequal |= {n for n in counts if not torch.equal(product(rows[:n]), expected[:n])}
    return next((r for r in _RULES if all(r.padding(n) for n in unequal)), _RULES[-1])


def _narrow(
    layer: torch.nn.Linear | Conv1D,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """The layer's product, with so few outputs that it is quick, and the number of its inputs."""
    weight = layer.weight.detach()
    if isinstance(layer, Conv1D):
        columns = weight[:, :_MOST_COLUMNS].contiguous()
        bias = columns.new_zeros(columns.shape[1])
        return lambda rows: torch.addmm(bias, rows, columns), weight.shape[0]
    weight = weight[:_MOST_COLUMNS]
    if not isinstance(layer, PackedLinear | Fp32Head):
        return lambda rows: F.linear(rows, weight), weight.shape[1]
    small = type(layer)(1, 1, bias=False, device="meta")  # draws nothing
    small.weight = torch.nn.Parameter(weight, requires_grad=False)
    return small, weight.shape[1]
