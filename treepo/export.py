"""``python -m treepo.export checkpoint=... output=FOLDER``: a Hugging Face folder of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from treepo.cli import run_command
from treepo.model_folder import find_model

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ExportConfig:
    """What to export, and where to."""

    checkpoint: str = "???"  # a run, its checkpoints/global_step_N, or a model folder
    output: str = "???"  # a folder that is new or empty
    dtype: str = "auto"  # of the weights: auto (as they are stored), float32, bfloat16, float16
    verify: bool = True  # load the result and run the engine's load probe on it

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")


def work(config: ExportConfig, dry_run: bool) -> None:
    """Check what can be checked at once, then write the folder."""
    source = find_model(config.checkpoint)
    output = Path(config.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={config.output!r} is not empty: name a new folder")
    if dry_run:
        print(f"would export {source.model} to {output}")
        return
    from treepo.export_model import export_model  # torch loads here

    export_model(source, output, dtype=config.dtype, verify=config.verify)
    print(f"exported {source.model} to {output}")


def main() -> None:
    run_command("export", ExportConfig, work)


if __name__ == "__main__":
    main()
