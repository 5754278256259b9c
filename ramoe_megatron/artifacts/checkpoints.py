"""The folders of Megatron's checkpoints."""

from pathlib import Path

TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
"""The file that names the latest iteration, and its content for weights without an iteration."""


def latest_checkpoint(path: Path) -> tuple[str, Path]:
    """Content of a checkpoint folder's tracker file, and the folder of the iteration that it names."""
    mark = (path / TRACKER).read_text(encoding="utf-8").strip()
    return mark, path / (mark if mark == RELEASE else f"iter_{int(mark):07d}" if mark.isdigit() else ".")
