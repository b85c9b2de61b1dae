"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685, eq. 3) on a policy, by peft.

A linear layer of weight W [out, in] becomes

    y = W x + scale * B A x,    A [r, in], B [out, r],    scale = alpha / r

W is frozen, A and B are trained, and B begins at 0, so that the model begins as it was. Everything
outside sees an ordinary model: engines and exports get the merged weight W + scale * B A under the
layer's own name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainers.lora_settings import ALL_LINEAR, LoraSettings

_NAME = "default"  # peft's name of an adapter that is the only one
_BASE = ".base_layer."  # where peft puts the layer that it wraps


class Adapters:
    """The adapters of one model, which it gets here; all its other parameters are frozen.

    Attributes:
        layers: the wrapped layers by the names they had.

    Raises:
        ValueError: ``target_modules`` names no layer, or one that cannot have an adapter.
    """

    def __init__(self, model: PreTrainedModel, settings: LoraSettings) -> None:
        self.settings = settings
        targets = _targets(model, settings.target_modules)
        self._config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides what it is given
            use_rslora=settings.use_rslora,
            fan_in_fan_out=any(not isinstance(m, torch.nn.Linear) for m in targets.values()),
            target_modules=[f"model.{name}" for name in targets],
        )
        # Within a module without a configuration: peft rewrites the targets of models that it knows
        # as mixtures of experts, to adapt stacked weights, which have no layer to merge into.
        around = torch.nn.Module()
        around.model = model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            peft.inject_adapter_in_model(self._config, around)
        self.layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        assert self.layers.keys() == targets.keys()
        trained = {id(p) for layer in self.layers.values() for p in _factors(layer)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def merged(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model as engines and exports know it: names, order and ties of a model without
        adapters, and the weight W + scale * B A where there is one. The sum is taken in float32
        or wider and rounded to W's dtype; all other tensors are those of ``state``.

        Args:
            state: the model's ``state_dict`` with whole tensors.
        """
        weights = self.base(state)
        for name, layer in self.layers.items():
            weight = weights[f"{name}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            a, b = (state[f"{name}.lora_{x}.{_NAME}.weight"].to(wide) for x in "AB")
            delta = self.settings.scale * (b @ a)
            if layer.fan_in_fan_out:  # GPT-2's layers store W transposed
                delta = delta.T
            weights[f"{name}.weight"] = (weight.to(wide) + delta).to(weight.dtype)
        return weights

    def base(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The frozen weights by the names of a model without adapters."""
        return {
            name.replace(_BASE, "."): tensor
            for name, tensor in state.items()
            if not _is_factor(name)
        }

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is the one that training began with: each layer adds 0 * B A x.

        The products are still taken, so that the modules run in one order, which ZeRO-3 fetches
        weights by.
        """
        scales = [layer.scaling[_NAME] for layer in self.layers.values()]
        try:
            for layer in self.layers.values():
                layer.scaling[_NAME] = 0.0
            yield
        finally:
            for layer, scale in zip(self.layers.values(), scales, strict=True):
                layer.scaling[_NAME] = scale

    def save(self, state: Mapping[str, torch.Tensor], folder: Path, base_model: str) -> None:
        """Write the adapters alone, as ``peft.PeftModel.from_pretrained(base, folder)`` reads them.

        Args:
            state: as :meth:`merged`'s.
            base_model: folder or name of the model without adapters.
        """
        folder.mkdir(parents=True, exist_ok=True)
        factors = {
            f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor.contiguous().cpu()
            for name, tensor in state.items()
            if _is_factor(name)
        }
        save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = replace(
            self._config,
            target_modules=list(self.layers),
            base_model_name_or_path=base_model,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))


def _factors(layer: Any) -> list[torch.nn.Parameter]:
    return [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]


def _is_factor(name: str) -> bool:
    return name.endswith((f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"))


def _targets(model: PreTrainedModel, names: list[str]) -> dict[str, torch.nn.Module]:
    """The linear layers that get an adapter, by path.

    Raises:
        ValueError: see :class:`Adapters`.
    """
    head = model.get_output_embeddings()
    linear: dict[str, torch.nn.Module] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    if names == [ALL_LINEAR]:
        return linear
    for name in names:
        if not any(_is_named(path, name) for path in linear):
            there = any(_is_named(path, name) for path, _ in model.named_modules())
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise ValueError(
                f"trainer.learner.lora.target_modules: {name!r} is no "
                f"{'linear layer below the head' if there else 'layer'} of "
                f"{type(model).__name__}; its linear layers are {known}"
            )
    return {p: m for p, m in linear.items() if any(_is_named(p, name) for name in names)}


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
