"""The command line of every entry point, and the project's one file with Hydra.

A command is a config name (``configs/<name>.yaml``), a dataclass that the composed config must fit
and a function that does the work. What the user got wrong ends as one line on standard error and
exit code 2; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from treepo.base.errors import RunFailed

C = TypeVar("C")


def config_dir() -> Path:
    """The folder of shipped configs: in a source tree beside the package, in an installed one
    inside it.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"the shipped configs are missing: no configs/train.yaml beside or inside {package}"
    )


def run_command(name: str, schema: type[C], work: Callable[[C, bool], None]) -> None:
    """Compose ``configs/<name>.yaml`` with the command line, check it against ``schema`` and call
    ``work``.

    Args:
        work: called with the config and whether ``--dry-run`` was given.
    """
    dry_run = "--dry-run" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--dry-run"]
    _store_schema(name, schema)

    def task(composed: DictConfig) -> None:
        # SLURM, timeouts and service managers ask with SIGTERM: workers are stopped as on Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            work(to_config(composed), dry_run)
        except (ValueError, OSError) as error:
            fail(error, code=2)
        except RunFailed as error:
            fail(error, code=1)
        except KeyboardInterrupt:
            words = "goes on from the last checkpoint, or begins anew if there is none"
            print(f"interrupted; the same command {words}", file=sys.stderr)
            raise SystemExit(130) from None

    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(task)()


def typed_overrides() -> list[str]:
    """What was typed after the command that is running; nothing where a config was composed by
    :func:`compose`.
    """
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def compose(name: str, schema: type[C], overrides: list[str]) -> C:
    """The config that ``python -m treepo.<name> <overrides>`` would run with, for tests and
    notebooks.
    """
    _store_schema(name, schema)
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return to_config(hydra.compose(name, overrides))


def to_config(composed: DictConfig | ListConfig) -> Any:
    """Turn a composed config into its dataclasses, whose checks then run.

    Raises:
        ValueError: a value is missing, of a wrong type, or refused by a check.
    """
    _refuse_unknown_keys(composed, "")
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ValueError(_of_a_missing_value(str(error.__cause__ or error))) from error


def _of_a_missing_value(message: str) -> str:
    """OmegaConf's words, of a value that must be given those of this command line."""
    if "missing mandatory value" not in message:
        return message
    key = message.partition("full_key: ")[2].partition("\n")[0]
    return f"{key} is missing: give it as {key}=..., or see --help"


def _refuse_unknown_keys(node: Any, where: str) -> None:
    """``+key=value`` adds keys that no dataclass has, and OmegaConf would drop them in silence."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    schema = OmegaConf.get_type(node)
    if is_dataclass(schema):
        known = [field.name for field in fields(schema)]
        for key in map(str, node):
            if key not in known:
                raise ValueError(
                    f"unknown key {where}{key}: {where.rstrip('.') or 'the configuration'} "
                    f"knows {', '.join(known)}"
                )
    for key in map(str, node):
        _refuse_unknown_keys(node._get_node(key), f"{where}{key}.")


def settings_from(schema: type[C], values: dict[str, Any], *, where: str) -> C:
    """Build a settings dataclass from plain values; an unknown key or a wrong type is an error that
    lists the keys.

    Args:
        where: the config key that holds ``values``, for the message; more words may follow it.
    """
    known = OmegaConf.structured(schema)
    unknown = [name for name in values if name not in known]
    if unknown:
        key = where.partition(" ")[0]
        raise ValueError(
            f"{where}: {', '.join(map(repr, unknown))} is not used by this choice; "
            f"it knows {', '.join(map(str, known))}. Leave out what you added; take out what an "
            f"experiment sets with {' '.join(f'~{key}.{name}' for name in unknown)}"
        )
    try:
        merged = OmegaConf.merge(known, OmegaConf.create(values))
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {error}") from error
    return to_config(merged)


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML text, as it stands in a run's folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(path: Path, schema: type[C]) -> C:
    """Read back what :func:`to_yaml` wrote."""
    return to_config(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))


def differing_keys(one: str, other: str) -> list[str]:
    """Keys, with dots, whose values differ between two configurations in YAML."""
    values = [_flat(OmegaConf.to_container(OmegaConf.create(text)), "") for text in (one, other)]
    return sorted(
        key for key in {**values[0], **values[1]} if values[0].get(key) != values[1].get(key)
    )


def _flat(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {where.rstrip("."): value}
    return {k: v for key, child in value.items() for k, v in _flat(child, f"{where}{key}.").items()}


def fail(error: Exception, *, code: int) -> None:
    """End the program with one message for the user; HYDRA_FULL_ERROR=1 gives the traceback."""
    if os.environ.get("HYDRA_FULL_ERROR"):
        raise error
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


def _store_schema(name: str, schema: type) -> None:
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
