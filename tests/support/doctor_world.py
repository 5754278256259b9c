"""Shared by the doctor's tests: a folder of data, tokenizer and expert files; the command; its output."""

from pathlib import Path

import torch
from click.testing import CliRunner, Result
from small_run import write_world

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.artifacts.usage import UsageFile
from ramoe_megatron.cli import main
from ramoe_megatron.mcore.findings import Finding
from ramoe_megatron.method.divergence import NoZone, Zone


def ramoe(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(main, ["doctor", *words])


def told(findings: list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def paths(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def save_experts(
    path: Path,
    zone: Zone | NoZone = Zone(1, 2, "1-2", "given"),  # noqa: B008
    layers: int = 4,
    experts: int = 8,
) -> Path:
    even = torch.full((2, layers, experts), 1 / experts)
    mask = torch.zeros(2, layers, experts, dtype=torch.bool)
    mask[..., 0] = True
    ExpertFile(
        tasks=("even", "odd"), shape=ModelShape(layers, experts, 2, "softmax", 32), expert_mask=mask,
        delta=torch.zeros_like(even),
        task_frequency=even * 2, general_frequency=even[0] * 2, english_pattern={"last": even},
        layer_number=torch.arange(1, layers + 1),
        rule={"name": "top-m", "m": 1}, zone=zone, checkpoint="base@1",
    ).save(path)  # fmt: skip
    return path


def write(folder: Path) -> Path:
    """Data, tokenizer, taxonomy, expert files, and a folder that passes for a checkpoint."""
    write_world(folder)
    (folder / "base").mkdir()
    (folder / "base" / "latest_checkpointed_iteration.txt").write_text("1")
    write_faults(folder)
    return folder


def write_faults(folder: Path) -> None:
    """Beside a small world: an expert file that fits its model, and files that do not fit, or are broken."""
    save_experts(folder / "experts.safetensors")
    save_experts(folder / "foreign.safetensors", layers=6)
    save_experts(folder / "zoneless.safetensors", NoZone("the curve is flat"))
    shape, used = ModelShape(6, 8, 2, "softmax", 32), torch.full((1, 6, 8), 0.25)
    UsageFile(("en",), shape, torch.tensor([9]), used, used, torch.arange(1, 7), "base@1").save(
        folder / "usage.safetensors"
    )
    rows = (folder / "parallel.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*rows[:4], rows[4][:-9], *rows[5:]]) + "\n")
    (folder / "short.jsonl").write_text(
        "\n".join((folder / "taxonomy.jsonl").read_text().splitlines()[:6]) + "\n"
    )
