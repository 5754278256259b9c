"""Megatron's flags in a recipe: rendering, checks by Megatron's own parser, and checks of the parallel
layout."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.load import nearest
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.sections import FlagValue

_LAYOUT = """
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
    expert-tensor-parallel-size sequence-parallel num-layers-per-virtual-pipeline-stage
    use-distributed-optimizer
    micro-batch-size recompute-granularity recompute-method recompute-num-layers moe-token-dispatcher-type
"""
_INCIDENTAL = """
    log-interval save-interval save-retain-interval num-workers timing-log-level distributed-timeout-minutes
    exit-signal-handler exit-duration-in-mins exit-interval log-throughput log-memory-to-tensorboard
    tensorboard-log-interval async-save logging-level log-num-zeros-in-grad log-params-norm data-cache-path
"""
LAYOUT, INCIDENTAL = frozenset(_LAYOUT.split()), frozenset(_INCIDENTAL.split())
# The flags of `train` that affect how a checkpoint is read and scored. The others affect training only.
SCORING = ("seq-length", "max-position-embeddings", "micro-batch-size", "bf16", "fp16")


def render(flags: Mapping[str, FlagValue]) -> list[str]:
    """Command-line words of flags.

    true is a bare flag, false and None are left out, and a list is several values. A single value that starts
    with a dash is joined by `=`, because argparse would take it for a flag.
    """
    words: list[str] = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(_text, value)]
        elif value is not None and value is not False:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", _text(value)]
    return words


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def relevant(flags: Mapping[str, FlagValue]) -> dict[str, FlagValue]:
    """The flags that affect a result.

    Left out are flags that render to nothing, flags for logging, saving and time limits, and the parallel
    layout. Results do not depend on the layout (up to rounding), so a change of the layout reruns nothing.
    """
    left_out = LAYOUT | INCIDENTAL
    return {
        name: value
        for name, value in flags.items()
        if name not in left_out and value is not None and value is not False
    }


def sections(recipe: Recipe) -> dict[str, Mapping[str, FlagValue]]:
    """Key path -> flags, for every part of the recipe that holds Megatron's flags."""
    found: dict[str, Mapping[str, FlagValue]] = {
        "model": recipe.model,
        "train": recipe.train,
        "parallel": recipe.parallel,
    }
    found |= {"pretrain": recipe.pretrain or {}, "tokenizer": recipe.tokenizer or {}}
    return found | {f"methods.{place}.train": method.train for place, method in enumerate(recipe.methods)}


def check_names(recipe: Recipe, source: str, known: Iterable[str]) -> None:
    """Raise RamoeError for flags that Megatron's parser does not know, each with the nearest known flag."""
    names = {flag.removeprefix("--") for flag in known}
    public = [name for name in names if not name.startswith("ramoe-")]
    problems = [
        f"{source}: {path}.{name}: Megatron has no flag --{name}{nearest(name, public)}"
        for path, flags in sections(recipe).items()
        for name in flags
        if name not in names
    ]
    if problems:
        raise RamoeError("\n".join(problems))


def megatron_flags() -> list[str]:
    """The flags of Megatron and of this package.

    A new process lists them, because importing Megatron takes seconds and prints much.
    """
    code = (
        "import json; from ramoe_megatron.mcore.arguments import known_flags; "
        "print('\\nRAMOE-FLAGS ' + json.dumps(sorted(known_flags())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RAMOE-FLAGS "):
            return json.loads(line.removeprefix("RAMOE-FLAGS "))
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    raise RamoeError(
        f"Megatron's flags cannot be listed ({last}): check the installation of megatron-core and torch"
    )


def size_of(flags: Mapping[str, FlagValue], name: str, default: int = 1) -> int:
    """A parallel size, or another number of at least 1. Raises RamoeError for any other value."""
    value = flags.get(name)
    if value is None or value is False:
        return default
    try:
        number = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise RamoeError(f"{name}: expected a whole number of at least 1, found {value!r}")
    return number


def check_layout(recipe: Recipe, devices: int | None) -> None:
    """Raise RamoeError when launch, parallel sizes, model and batch sizes do not fit together.

    Args:
        devices: CUDA devices of this node. None without any; the CPU backend takes any number of ranks.
    """
    launch = recipe.launch
    trainings = {"train": recipe.train} | {
        f"methods.{i}.train": recipe.train_of(m) for i, m in enumerate(recipe.methods)
    }
    by_kind = {"finetune": trainings}
    if recipe.pretrain is not None:
        by_kind["pretrain"] = {"pretrain": recipe.pretrain_flags()}
    others = {path: flags for kind in by_kind.keys() - launch.ranks for path, flags in by_kind[kind].items()}
    _check_layout(recipe, devices, "launch.ranks-per-node", launch.ranks_per_node, others)
    for kind, ranks in launch.ranks.items():
        _check_layout(recipe, devices, f"launch.ranks.{kind}", ranks, by_kind.get(kind, {}))


def _check_layout(
    recipe: Recipe, devices: int | None, key: str, ranks: int, trainings: Mapping[str, Mapping[str, Any]]
) -> None:
    """`check_layout` of the stages whose ranks on a node the key gives, with their training flags by path."""
    flags = {**recipe.model, **recipe.train, **recipe.parallel}
    nodes = recipe.launch.nodes
    world = ranks * nodes
    tp, pp, cp, ep = (
        size_of(flags, f"{name}-parallel-size")
        for name in ("tensor-model", "pipeline-model", "context", "expert-model")
    )
    etp = size_of(flags, "expert-tensor-parallel-size", tp)
    launched = f"launch gives {nodes} x {ranks} = {world} ranks"
    layout = f"TP {tp} x PP {pp} x CP {cp}"
    if devices is not None and ranks > devices:
        raise RamoeError(
            f"{key} is {ranks}, but this node has {devices} CUDA devices: lower it to at most {devices}"
        )
    if world % (tp * pp * cp):
        raise RamoeError(
            f"{launched}, but {layout} needs a multiple of {tp * pp * cp}: "
            f"change {key}, launch.nodes or parallel"
        )
    if world % (ep * etp * pp):
        raise RamoeError(
            f"{launched}, but EP {ep} x expert-TP {etp} x PP {pp} needs a multiple of {ep * etp * pp}: lower "
            f"parallel.expert-model-parallel-size or raise {key}"
        )
    if (experts := size_of(flags, "num-experts", ep)) % ep:
        raise RamoeError(
            f"parallel.expert-model-parallel-size {ep} does not divide model.num-experts {experts}"
        )
    uneven = any(
        name.startswith(("decoder-", "num-layers-in-", "pipeline-model-parallel-layout", "hybrid-"))
        for name in flags
    )
    if (layers := size_of(flags, "num-layers", pp)) % pp and not uneven:
        raise RamoeError(
            f"parallel.pipeline-model-parallel-size {pp} does not divide model.num-layers {layers}"
        )
    if (heads := size_of(flags, "num-attention-heads", tp)) % tp:
        raise RamoeError(
            f"parallel.tensor-model-parallel-size {tp} does not divide model.num-attention-heads {heads}"
        )
    if tp > 1 and "num-experts" in flags and flags.get("sequence-parallel") is not True:
        raise RamoeError(
            "tensor parallelism with experts needs sequence parallelism: "
            "set parallel.sequence-parallel to true"
        )
    replicas = world // (tp * pp * cp)
    for path, training in trainings.items():
        micro = size_of(training, "micro-batch-size")
        batch = size_of(training, "global-batch-size", micro * replicas)
        if batch % (micro * replicas):
            raise RamoeError(
                f"{path}: {launched} and {layout} make {replicas} data-parallel replicas, "
                f"so global-batch-size {batch} would have to be a multiple of micro-batch-size {micro} x "
                f"{replicas} = {micro * replicas}: change one of them, or use fewer ranks"
            )


def cuda_devices(
    environment: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")
) -> int | None:
    """Number of CUDA devices that processes started here may use, found without torch. None without any."""
    present = len(list(driver.iterdir())) if driver.is_dir() else 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and present:
        present = min(present, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
    return present or None
