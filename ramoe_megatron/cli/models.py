"""`ramoe convert` and `ramoe export`: Hugging Face folders to Megatron checkpoints and back."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click

from ramoe_megatron.artifacts.checkpoints import TRACKER, latest_checkpoint
from ramoe_megatron.cli.show import EXISTING, FOLDER


@click.command()
@click.argument("folder", metavar="HF_FOLDER", type=EXISTING)
@click.option("--out", type=FOLDER, required=True, help="Folder of the checkpoint. It must be new.")
@click.option("--check", is_flag=True, help="Only check the folder, and tell what would be written.")
def convert(folder: Path, out: Path, check: bool) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint.

    The checkpoint loads with --load or --pretrained-checkpoint in any parallel layout. Beside it:
    model_args.yaml, the model's Megatron flags. No GPU is needed.
    """
    with _reading_ahead([] if check else folder.glob("*.safetensors")):
        from ramoe_megatron.models import convert as engine

        plan = engine.plan_conversion(folder)
    tensors = sum(len(batch) for batch in plan.batches)
    click.echo(
        f"ramoe: {plan.family.name}: {tensors} pieces, {plan.bytes / 1e9:.2f} GB, "
        f"at most {plan.memory / 1e9:.2f} GB of them in memory"
    )
    if check:
        engine.refuse_output(plan, out)
        return
    with _bar("convert", plan.bytes) as moved:
        engine.convert_folder(plan, out, moved)
    click.echo(f"ramoe: wrote {out}; its flags are in {out / engine.FLAGS}")


@click.command()
@click.argument("checkpoint", metavar="CHECKPOINT", type=EXISTING)
@click.option("--out", type=FOLDER, required=True, help="The Hugging Face folder. It must be new.")
@click.option("--check", is_flag=True, help="Only check the checkpoint, and tell what would be written.")
def export(checkpoint: Path, out: Path, check: bool) -> None:
    """Export a Megatron checkpoint to a Hugging Face folder.

    The checkpoint may have been saved in any parallel layout. Its base model must come from `ramoe convert`.
    """
    with _reading_ahead([] if check else _files_of(checkpoint)):
        from ramoe_megatron.models import convert as engine

        plan = engine.plan_export(checkpoint)
    click.echo(
        f"ramoe: {plan.note.family}: {len(plan.tensors)} tensors, {plan.bytes / 1e9:.2f} GB, "
        f"{len(plan.files)} files"
    )
    if check:
        engine.refuse_output(plan, out)
        return
    with _bar("export", plan.bytes) as moved:
        engine.export_checkpoint(plan, out, moved)
    click.echo(f"ramoe: wrote {out}")


def _files_of(checkpoint: Path) -> Iterator[Path]:
    """The weight files of a checkpoint's latest iteration; none if there is no checkpoint."""
    if (checkpoint / TRACKER).is_file():
        yield from latest_checkpoint(checkpoint)[1].glob("*.distcp")


@contextlib.contextmanager
def _reading_ahead(files: Iterable[Path]) -> Iterator[None]:
    """Read files into the page cache while the block imports torch and plans, which leaves the disk idle."""
    done = threading.Event()

    def read() -> None:
        buffer = bytearray(8 << 20)
        with contextlib.suppress(OSError):
            for path in sorted(files):
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        if done.is_set():
                            return

    threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        done.set()


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes. At the end, the rate in GB/s."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)
    seconds = time.monotonic() - started
    click.echo(
        f"ramoe: {total / 1e9:.2f} GB in {seconds:.1f} s ({total / 1e9 / max(seconds, 1e-9):.2f} GB/s)"
    )
