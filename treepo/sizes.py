"""What a training run's settings amount to: batches, updates, memory. Printed before any work."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path

from trainers.lora_settings import ALL_LINEAR, LoraSettings
from treepo.config import TrainConfig, resolve_model_path, strategy_settings, updates_per_step
from treepo.pipelines import num_in_flight


def derived_sizes(config: TrainConfig) -> dict[str, str]:
    """What the settings amount to, for people to check before any work."""
    _, strategy = strategy_settings(config)
    trainer = config.trainer
    leaves = trainer.train_batch_size * strategy.n
    updates = updates_per_step(config)
    takes_what_ended = trainer.segments.is_on and trainer.segments.train_on == "all"
    sizes = {
        "responses a step": f"{leaves} = {trainer.train_batch_size} prompts x {strategy.n}",
        "updates a step": f"{updates} of {trainer.ppo_mini_batch_size} prompts each"
        + (", more or fewer as they end" if takes_what_ended else ""),
        "updates in all": _at_most(config) + str(updates * trainer.total_steps),
        "prompts in all": str(trainer.train_batch_size * trainer.total_steps),
        **_dynamic_sampling(config),
        **_segments(config, strategy.max_response_length),
        **_one_step(config),
        "longest path": f"{config.max_prompt_length + strategy.max_response_length} tokens",
    }
    sizes.update(_memory(config))
    if config.cluster.sleeps:
        sizes["taking turns"] = "samplers and learners give up their memory to each other"
    return sizes


def _dynamic_sampling(config: TrainConfig) -> dict[str, str]:
    most = config.algorithm.max_num_gen_batches
    if most == 1:
        return {}
    prompts = most * config.trainer.train_batch_size
    return {"dynamic sampling": f"up to {most} batches, {prompts} prompts a step"}


def _at_most(config: TrainConfig) -> str:
    """Steps in segments make fewer updates where too little has ended."""
    segments = config.trainer.segments
    if not segments.is_on or config.trainer.pipeline == "async":
        return ""
    return "about " if segments.train_on == "all" else "at most "


def _one_step(config: TrainConfig) -> dict[str, str]:
    if config.trainer.pipeline != "one_step":
        return {}
    counted = ", which the cap counts too" if config.trainer.segments.max_staleness else ""
    return {
        "sampling and learning": "a step apart: the next batch is drawn while an update is made, "
        f"so its tokens are a version of the weights older when they train{counted}"
    }


def _segments(config: TrainConfig, max_response_length: int) -> dict[str, str]:
    segments = config.trainer.segments
    if not segments.is_on:
        return {}
    number = segments.num_segments(max_response_length)
    if config.trainer.pipeline == "async":
        begun = (segments.max_staleness + 1) * config.trainer.train_batch_size
        return {
            "segments": f"up to {number} of {segments.segment_length} tokens a response: between "
            "two a worker loads the newest weights",
            "sampling and learning": f"at once: {num_in_flight(config.trainer)} trees grow, at "
            f"most {begun} prompts are begun and not yet in an update, no token is more than "
            f"{segments.max_staleness} versions of the weights old",
        }
    words = f"up to {number} of {segments.segment_length} tokens a response"
    cap = f", at most {segments.max_staleness} (cap)" if segments.max_staleness else ""
    if segments.stop_when_finished:
        end = f"a step ends with {segments.stop_when_finished} trees that are done"
        return {"segments": f"{words}; {end}, so its tokens may be of any age{cap}"}
    return {
        "segments": f"{words}: its oldest token is up to {number - 1} versions of the weights "
        f"(steps) old when it ends{cap}"
    }


def _memory(config: TrainConfig) -> dict[str, str]:
    folder = Path(resolve_model_path(config.model.path))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return {"memory": "unknown before the model is downloaded"}
    parameters = sum(map(_num_parameters, files))
    width = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[config.engine.dtype]
    model = json.loads((folder / "config.json").read_text())
    learner = config.trainer.learner
    weights = parameters * {"float32": 4, "bfloat16": 2}[learner.dtype]
    if learner.lora.is_on:
        _check_adapted_layers(files, learner.lora)
    adapted = sum(_adapter_parameters(file, learner.lora) for file in files)
    size, what = parameters * 16, "weights, gradients, two Adam moments in fp32"
    if learner.lora.is_on:
        size, what = weights + adapted * 16, "frozen weights; adapters as in full training"
    sizes = {
        "parameters": f"{parameters:,}",
        **({"adapters": _adapters(adapted, learner.optimizer.lr)} if learner.lora.is_on else {}),
        "learner memory": f"{_gib(size)} ({what}) "
        f"over {config.cluster.num_learner_ranks} ranks, ZeRO {learner.zero_stage}",
        "engine weights": _engine_weights(config, parameters * width),
    }
    if learner.has_reference:
        sizes["reference model"] = {
            "own": f"{_gib(weights)} a learner rank, for the KL penalty",
            "actor": f"{_gib(weights)} a reference worker, of which there are "
            f"{config.cluster.num_reference_workers}",
            "lora_off": "none: the model without its adapters",
        }[learner.reference]
    heads = model.get("num_key_value_heads") or model.get("num_attention_heads")
    layers, hidden = model.get("num_hidden_layers"), model.get("hidden_size")
    if heads and layers and hidden:
        head_dim = model.get("head_dim") or hidden // model["num_attention_heads"]
        kv = 2 * layers * heads * head_dim * width * config.engine.num_kv_slots
        sizes["KV pool"] = f"{_gib(kv)} a worker for {config.engine.num_kv_slots} tokens"
    return sizes


def _adapters(parameters: int, lr: float) -> str:
    hint = "they need about ten times full training's"
    return f"{parameters:,} parameters, learning rate {lr:g} ({hint})"


def _engine_weights(config: TrainConfig, size: float) -> str:
    engine = config.engine
    packs = engine.pack_weights and engine.device == "cpu" and engine.dtype != "float64"
    return f"{_gib(size)} a worker" + (", and as much packed for few rows" if packs else "")


def _num_parameters(file: Path) -> int:
    return sum(prod(shape) for shape in _shapes(file).values())


def _adapter_parameters(file: Path, lora: LoraSettings) -> int:
    """r (in + out) of each linear layer of a file of Llama's names, which end in ``_proj``."""
    names = lora.target_modules
    return sum(
        lora.rank * sum(shape)
        for name, shape in _shapes(file).items()
        if name.endswith("_proj.weight")
        and len(shape) == 2
        and (names == [ALL_LINEAR] or name.split(".")[-2] in names)
    )


def _check_adapted_layers(files: Sequence[Path], lora: LoraSettings) -> None:
    """
    Raises:
        ValueError: ``target_modules`` names no layer of files of Llama's names. Of others the
            learner says it, when it has the model.
    """
    shapes = [item for file in files for item in _shapes(file).items()]
    known = {name.split(".")[-2] for name, s in shapes if len(s) == 2 and name.endswith(".weight")}
    if lora.target_modules == [ALL_LINEAR] or not any(name.endswith("_proj") for name in known):
        return
    for target in lora.target_modules:
        if target.rpartition(".")[2] not in known:
            linear = ", ".join(sorted(name for name in known if name.endswith("_proj")))
            raise ValueError(
                f"trainer.learner.lora.target_modules: {target!r} is no linear layer of the model; "
                f"its linear layers are {linear}"
            )


def _shapes(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:  # a safetensors file starts with the length of its JSON header
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        except (struct.error, ValueError) as error:
            raise ValueError(f"{file} is no complete safetensors file: {error}") from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
