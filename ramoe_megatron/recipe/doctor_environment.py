"""Checks of this node: installed versions, devices, connection to other nodes, Slurm, the output folder."""

import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from ramoe_megatron.artifacts.files import atomic_write_text
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.compat import JOBS_NEED
from ramoe_megatron.mcore.findings import Finding, attempt
from ramoe_megatron.recipe.launcher import Place
from ramoe_megatron.recipe.megatron_flags import cuda_devices

PYTHON = ">=3.12,<3.13"
PACKAGES = {"torch": ">=2.9", "megatron-core": JOBS_NEED}
"""What a job needs. Repeated here because a source tree may run without being installed."""
GIB = 1 << 30


def environment_findings(
    ranks: int,
    nodes: int,
    out: Path | None,
    environment: Mapping[str, str],
    local_layers: bool = False,
    needed: int = 0,
) -> list[Finding]:
    """Findings about this node.

    Args:
        ranks: ranks per node.
        out: output folder, if any. It may be missing.
        environment: variables, as `os.environ` holds them.
        local_layers: whether the model's flags contain `--transformer-impl local`.
        needed: number of bytes that the run is expected to write; 0 if unknown.
    """
    devices = cuda_devices(environment)
    found = [*_versions(), _transformer_engine(devices, local_layers), *_devices(ranks, devices)]
    found += [*_nodes(nodes, environment), *_slurm(nodes, environment)]
    return found + (folder_findings(out, needed) if out else [])


def _versions() -> list[Finding]:
    from packaging.specifiers import SpecifierSet

    found = []
    for name, wanted in {"Python": PYTHON, **PACKAGES}.items():
        version = platform.python_version() if name == "Python" else _installed(name)
        fits = version is not None and SpecifierSet(wanted).contains(version, prereleases=True)
        advice = (
            "" if fits else f"use {name}{wanted}" if name == "Python" else f"pip install '{name}{wanted}'"
        )
        found.append(Finding(name, "ok" if fits else "fatal", version or "not installed", advice))
    return found


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _transformer_engine(devices: int | None, local_layers: bool) -> Finding:
    name = "transformer-engine"
    if version := _installed(name) or _installed("transformer_engine"):
        return Finding(name, "ok", version)
    if devices is None or local_layers:
        why = "not needed on the CPU" if devices is None else "not needed by local layers"
        return Finding(name, "ok", f"not installed; {why}")
    advice = "pip install 'ramoe-megatron[gpu]', or give --transformer-impl local"
    return Finding(name, "warning", "not installed, and Megatron builds its layers from it", advice)


def _devices(ranks: int, devices: int | None) -> list[Finding]:
    if devices is None:
        advice = "for a job on GPUs, run the doctor on a node with GPUs"
        return [Finding("GPUs", "ok", "none: the CPU backend with gloo", advice)]
    import torch

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    built = f"CUDA {torch.version.cuda or 'none'}, NCCL {nccl or 'none'}"
    if (seen := torch.cuda.device_count()) == 0:
        fault = (
            f"{devices} on this node, but torch (built for {built}) sees none: the job would run on the CPU"
        )
        return [
            Finding("GPUs", "fatal", fault, "install torch for CUDA, and a driver that is new enough for it")
        ]
    fits, found = seen >= ranks, f"{seen} for {ranks} ranks on this node"
    advice = "" if fits else f"start at most {seen} ranks a node"
    return [
        Finding("GPUs", "ok" if fits else "fatal", found, advice),
        Finding("CUDA", "ok" if nccl else "fatal", built, "" if nccl else "install torch with NCCL"),
    ]


def _nodes(nodes: int, environment: Mapping[str, str]) -> list[Finding]:
    if nodes == 1:
        return []
    try:
        place = Place.from_environment(nodes, environment)
    except RamoeError as error:
        variables = ("NODE_RANK", "SLURM_NODEID", "GROUP_RANK", "MASTER_ADDR")
        if not any(environment.get(name) for name in variables):  # such as a login node
            apart = (
                f"this is none of the {nodes} nodes: NODE_RANK (or SLURM_NODEID) and MASTER_ADDR are not set"
            )
            advice = "run the doctor on the nodes too, where these variables are set"
            return [Finding("nodes", "warning", apart, advice)]
        return [Finding("nodes", "fatal", str(error), "set the variables on every node")]
    found = [Finding("nodes", "ok", f"this is node {place.node} of {nodes}")]
    found.append(
        attempt(
            "MASTER_ADDR",
            lambda: _resolved(place.address),
            "set it to a name of node 0 that every node can resolve",
        )
    )
    if place.node == 0:
        advice = "set MASTER_PORT to a free port whose next port is free too"
        found.append(attempt("MASTER_PORT", lambda: _free(place), advice))
    return found


def _resolved(address: str) -> str:
    return f"{address} is {socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0]}"


def _free(place: Place) -> str:
    place.refuse_taken(0, 1)
    return f"{place.port} and {place.port + 1} are free"


def _slurm(nodes: int, environment: Mapping[str, str]) -> list[Finding]:
    if not (job := environment.get("SLURM_JOB_ID")):
        return []
    found = f"job {job} on {environment.get('SLURM_JOB_NODELIST', 'unknown nodes')}"
    tasks, allocated = environment.get("SLURM_NTASKS_PER_NODE", "1"), environment.get("SLURM_JOB_NUM_NODES")
    if tasks != "1":
        advice = "give --ntasks-per-node 1: torchrun starts a node's ranks"
        return [Finding("Slurm", "fatal", f"{found}, {tasks} tasks a node", advice)]
    if allocated and allocated.isdigit() and int(allocated) < nodes:
        fault = f"{found}: {allocated} nodes, {nodes} asked for"
        return [Finding("Slurm", "fatal", fault, f"allocate {nodes} nodes")]
    return [Finding("Slurm", "ok", found)]


def folder_findings(folder: Path, needed: int = 0) -> list[Finding]:
    """Check that a folder can be created and written to, that file locks work there, and the free space.

    No files stay behind.

    Args:
        needed: number of bytes that the run is expected to write; 0 if unknown.
    """
    parent = folder.resolve()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        return [Finding("output folder", "fatal", f"{parent} is a file", "give another folder")]
    # the process id is in the name, because another check may run here at the same time
    probe, lock = (parent / f".ramoe-doctor-{os.getpid()}{ending}" for ending in ("", ".lock"))
    try:
        atomic_write_text(probe, "ramoe doctor\n")
    except OSError as error:
        fault = f"{parent} cannot be written to ({error.strerror})"
        return [Finding("output folder", "fatal", fault, "give another folder, or make room")]
    finally:
        probe.unlink(missing_ok=True)
    found = f"{folder} is writable" if parent == folder.resolve() else f"{folder} can be made"
    locks = attempt("file locks", lambda: _locks(lock), "put the run folder on a file system with flock")
    return [Finding("output folder", "ok", found), locks, _disk(parent, needed)]


def _locks(path: Path) -> str:
    """Take a lock. A second lock on the same file must fail, or two runs could use one folder."""
    import filelock

    try:
        with (
            filelock.FileLock(path, timeout=0, fallback_to_soft=False),
            filelock.FileLock(path, timeout=0, fallback_to_soft=False),
        ):
            raise RamoeError(f"{path.parent}: the file system grants two locks on one file at once")
    except filelock.Timeout:
        return "work"
    finally:
        path.unlink(missing_ok=True)


def _disk(folder: Path, needed: int) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        return Finding("disk", "fatal", found, "make room: a truncated checkpoint cannot be loaded")
    if needed:
        found += (
            f"; the fine-tunes to come save about {needed / GIB:.1f} GiB "
            "(a checkpoint of the base's size each)"
        )
    if free < needed:
        return Finding("disk", "warning", found, "make room, or run fewer fine-tunes")
    return Finding("disk", "ok", found)
