"""``python -m treepo.sft +experiment=make_tiny_model``: train a model on demonstrations."""

from __future__ import annotations

from treepo.cli import run_command, to_yaml
from treepo.progress import quiet_libraries
from treepo.sft_settings import SFTSettings


def work(settings: SFTSettings, dry_run: bool) -> None:
    """Train with a progress display, then say where the model is."""
    if dry_run:
        print(to_yaml(settings))
        return
    quiet_libraries()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    from treepo.sft_loop import summary, train_sft  # torch loads here, after what a typo can spoil

    console = Console()
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeLeft(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=settings.steps, loss=float("nan"))

        def report(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=loss)
            if not console.is_terminal and (step % 100 == 0 or step == settings.steps):
                print(f"step {step}/{settings.steps}  loss {loss:.4f}", flush=True)

        result = train_sft(settings, report)
    print(summary(result))


def main() -> None:
    run_command("sft", SFTSettings, work)


if __name__ == "__main__":
    main()
