"""The least time a decode step can take on a machine: it has to read weights, keys and values, and
to do its multiplications.

A step takes at least ``max((W + c U) / BW, FLOPs / F)``: W bytes of weights, c bytes of keys and
values a token, U unique tokens attended to; BW and F are measured on the machine, by a copy and a
product of matrices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """``bytes_per_s`` of memory and ``flops_per_s`` of products in the model's type."""

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """The best of several tries each."""
        is_gpu = device.type == "cuda"
        source = torch.zeros(1 << (31 if is_gpu else 26), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = 8192 if is_gpu else 512
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        copying = _least_seconds(lambda: target.copy_(source), device)
        multiplying = _least_seconds(lambda: torch.mm(a, b, out=product), device)
        return cls(bytes_per_s=2 * source.numel() / copying, flops_per_s=2 * side**3 / multiplying)


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a model's forward must read and compute.

    Attributes:
        weight_bytes: of all weights that a forward reads whole (of an input embedding that is not
            the output layer, too, it reads single rows).
        matmul_params: numbers of the matrices that every row is multiplied by.
        kv_bytes: keys and values of a token.
        attention_flops: of one row that attends to one token, over all layers.
    """

    weight_bytes: int
    matmul_params: int
    kv_bytes: int
    attention_flops: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Costs:
        config = model.config
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        numbers = {id(p): p for p in model.parameters()}
        if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
            del numbers[id(model.get_input_embeddings().weight)]
        size = model.dtype.itemsize
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return cls(
            weight_bytes=sum(p.numel() * p.element_size() for p in numbers.values()),
            matmul_params=sum(p.numel() for p in numbers.values() if p.dim() == 2),
            kv_bytes=2 * kv_heads * head_dim * size * config.num_hidden_layers,
            attention_flops=4 * heads * head_dim * config.num_hidden_layers,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One forward: its query rows, the unique tokens they attend to, and how many tokens they
    attend to in all, each row's counted by itself.
    """

    rows: int
    unique: int
    attended: int

    def bound(self, costs: Costs, machine: Machine) -> float:
        """Seconds it takes at least."""
        read = costs.weight_bytes + costs.kv_bytes * self.unique
        flops = 2 * costs.matmul_params * self.rows + costs.attention_flops * self.attended
        return max(read / machine.bytes_per_s, flops / machine.flops_per_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Trees of equal shape below several prompts.

    Attributes:
        levels: (segments of a prompt, tokens of each) from the prompt downwards; each segment has
            equally many below it.
    """

    name: str
    num_prompts: int
    prompt_length: int
    levels: tuple[tuple[int, int], ...]

    @property
    def num_leaves(self) -> int:
        return self.num_prompts * self.levels[-1][0]

    @property
    def depth(self) -> int:
        """Tokens of a response."""
        return sum(tokens for _, tokens in self.levels)

    @property
    def num_generated(self) -> int:
        """Tokens drawn, each once."""
        return self.num_prompts * sum(count * tokens for count, tokens in self.levels)

    def prefill(self) -> Step:
        prompts, length = self.num_prompts, self.prompt_length
        return Step(
            rows=prompts * length,
            unique=prompts * length,
            attended=prompts * length * (length + 1) // 2,
        )

    def decode(self) -> list[Step]:
        """The forwards after the prompts': a row is the last token of a path."""
        steps = []
        held, length, before = self.prompt_length, self.prompt_length, 1
        for level, (count, tokens) in enumerate(self.levels):
            # The first token of a level is drawn from the last one above, which is forwarded for
            # all below it at once (the prompts' last tokens were forwarded with the prompts).
            if level:
                steps.append(self._step(before, held, length))
            for _ in range(tokens - 1):
                held, length = held + count, length + 1
                steps.append(self._step(count, held, length))
            held, length, before = held + count, length + 1, count
        return steps

    def _step(self, rows: int, held: int, length: int) -> Step:
        prompts = self.num_prompts
        return Step(rows=prompts * rows, unique=prompts * held, attended=prompts * rows * length)


def total_bound(steps: Sequence[Step], costs: Costs, machine: Machine) -> float:
    """Seconds that steps, one after the other, take at least."""
    return sum(step.bound(costs, machine) for step in steps)


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
