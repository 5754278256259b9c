"""Hugging Face to Megatron and back: plan, check, stream, write.

Both directions know every shape before the first byte is written. A file holds a few gigabytes and is renamed
when it is whole, so an interrupted conversion goes on with the next file. The memory is that of one piece.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ramoe_megatron.artifacts.checkpoints import RELEASE, TRACKER, latest_checkpoint
from ramoe_megatron.artifacts.files import (
    atomic_write,
    atomic_write_text,
    package_version,
    read_json,
    save_document,
)
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.models.decoder import Family, Flags, Piece, extra_states
from ramoe_megatron.models.families import CONFIG, family_of
from ramoe_megatron.models.note import FLAGS, NOTE, ORIGINAL, ModelNote, note_in
from ramoe_megatron.models.operations import Copy, Shape
from ramoe_megatron.models.safetensors_folder import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    Stored,
    bytes_of,
    header_of,
)
from ramoe_megatron.models.torch_dist import (
    COMMON,
    METADATA,
    VERSION,
    ChunkFile,
    TorchDist,
    Written,
    write_metadata,
)

PLAN = "plan.json"
"""In an unfinished output: what it is the output of."""
FILE_BYTES = 4 << 30
"""Largest `.distcp` file, unless a single piece is larger."""
SHARD_BYTES = 5 * 10**9
"""Largest safetensors file, unless the tensors of a single piece are larger."""
UNUSED = ("rotary_emb.inv_freq",)
"""Ends of the names of tensors that old folders have and that no model reads."""
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")

Progress = Callable[[int], None]
"""Called with a number of bytes after they have been moved."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A checked plan to convert a Hugging Face folder."""

    source: SafetensorsFolder
    family: Family
    config: Any
    batches: list[list[Piece]]
    """Pieces of each `.distcp` file."""
    bytes: int
    """Bytes that will be written."""
    memory: int
    """Most bytes of tensors that are in memory at once: a piece that is written, and the next one."""

    @property
    def identity(self) -> dict[str, str]:
        """What an unfinished output says that it is the output of."""
        return {"source": digest_of(self.source)}


@dataclasses.dataclass(frozen=True)
class Export:
    """A checked plan to export a checkpoint."""

    source: TorchDist
    note: ModelNote
    files: dict[str, list[list[Piece]]]
    """File name -> groups of pieces. A group is all the pieces of some tensors."""
    tensors: dict[str, tuple[torch.dtype, Shape]]
    bytes: int

    @property
    def identity(self) -> dict[str, str]:
        """What an unfinished output says that it is the output of."""
        digest = hashlib.sha256((self.source.folder / METADATA).read_bytes()).hexdigest()
        return {"source": f"{self.source.folder.resolve()} {digest}"}


def plan_conversion(folder: Path) -> Conversion:
    """Read a folder's configuration and headers, and check every tensor against the family's list.

    Raises:
        RamoeError: the family is unknown, or tensors are missing, unexpected or of another shape.
    """
    family, config = family_of(folder)
    source = SafetensorsFolder(folder)
    pieces = list(family.pieces(config, source.tensors))
    check_tensors(folder, source.tensors, pieces)
    sizes = [math.prod(piece.shape) * _dtype(piece, source.tensors).itemsize for piece in pieces]
    batches: list[list[Piece]] = [[]]
    filled = 0
    for piece, size in zip(pieces, sizes, strict=True):
        if filled and filled + size > FILE_BYTES:
            batches.append([])
            filled = 0
        batches[-1].append(piece)
        filled += size
    made = [_work(piece, source.tensors) * size for piece, size in zip(pieces, sizes, strict=True)]
    memory = max(size + then for size, then in zip(sizes, [*made[1:], 0], strict=True))
    return Conversion(source, family, config, batches, sum(sizes), max(memory, made[0]))


def check_tensors(folder: Path, tensors: Mapping[str, Stored], pieces: Iterable[Piece]) -> None:
    """Raise RamoeError, with all findings, unless these are exactly the tensors that the pieces need."""
    missing: dict[str, Shape] = {}
    misshapen, used = [], set()
    for piece in pieces:
        for part, shape in zip(piece.parts, piece.operation.parts(piece.shape), strict=True):
            used.add(part.name)
            if part.name not in tensors:
                missing[part.name] = shape
                continue
            found = tensors[part.name].shape
            if found[len(part.index) :] != shape or any(
                number >= length for number, length in zip(part.index, found, strict=False)
            ):
                misshapen.append(
                    f"{part.name} is {list(found)}, expected {['...'] * len(part.index) + list(shape)}"
                )
    extra = [name for name in tensors if name not in used and not name.endswith(UNUSED)]
    told = [
        f"{len(found)} {what}: {', '.join(dict.fromkeys(found))[:600]}"
        for what, found in (
            ("missing", list(missing)),
            ("of another shape", misshapen),
            ("unexpected", extra),
        )
        if found
    ]
    if told:
        raise RamoeError(
            f"{folder}: its tensors are not those that {CONFIG} describes. {'; '.join(told)}. "
            "Download the folder again, or correct its config.json"
        )


def _dtype(piece: Piece, tensors: Mapping[str, Stored]) -> torch.dtype:
    dtype = tensors[piece.parts[0].name].dtype
    return torch.bfloat16 if dtype == torch.uint8 else dtype  # MXFP4 is decoded


def _work(piece: Piece, tensors: Mapping[str, Stored]) -> int:
    """Bytes that are in memory while a piece is made, in sizes of the piece (measured, rounded up)."""
    if tensors[piece.parts[0].name].dtype == torch.uint8:
        return 9  # MXFP4 is looked up by numbers of 8 bytes
    return 1 if piece.operation == Copy() else 4


def convert_folder(plan: Conversion, out: Path, progress: Progress = lambda _: None) -> None:
    """Write the checkpoint. An interrupted conversion of the same folder goes on where it stopped.

    Raises:
        RamoeError: `out` holds something else, or the disk is too small.
    """
    unfinished = begin(plan, out)
    weights = unfinished / RELEASE
    weights.mkdir(exist_ok=True)
    files: dict[str, list[Written]] = {}
    with contextlib.closing(plan.source):
        for number, pieces in enumerate(plan.batches):
            name = f"__{number}_0.distcp"
            files[name] = _one_file(weights / name, number, plan, pieces, progress)
    write_metadata(weights, files)
    flags = plan.family.flags(plan.config)
    atomic_write_text(unfinished / FLAGS, flags_text(plan.family, flags))
    copy_others(plan.source.folder, unfinished / ORIGINAL)
    save_document(
        unfinished / NOTE,
        "ramoe-model",
        {
            "family": plan.family.name,
            "modules": plan.family.modules,
            "source": {"folder": plan.source.folder.name, "sha256": digest_of(plan.source)},
            "package_version": package_version(),
        },
    )
    atomic_write_text(unfinished / TRACKER, RELEASE)
    (unfinished / PLAN).unlink()
    for path in weights.glob("*.json.part"):
        path.unlink()
    os.replace(unfinished, out)


def _one_file(
    path: Path, number: int, plan: Conversion, pieces: Sequence[Piece], progress: Progress
) -> list[Written]:
    record = path.with_name(f"{path.name}.json.part")
    if record.is_file():
        written = [_written(entry) for entry in read_json(record)]
        if path.is_file() and path.stat().st_size == max(entry.offset + entry.length for entry in written):
            progress(path.stat().st_size)
            return written
    with atomic_write(path) as temporary:
        file = ChunkFile(temporary)
        if number == 0:
            file.add_object(COMMON, [{"checkpoint_version": VERSION, "iteration": 0}])  # Megatron reads [0]
            for key, place, count in extra_states(plan.family.numbers(plan.config)):
                shard = ".".join(map(str, place)), ".".join(map(str, count))
                file.add_object(f"{key}._extra_state/shard_{'_'.join(shard)}", [None])

        def joined(piece: Piece) -> Tensor:
            return piece.operation.join([plan.source.read(part.name, part.index) for part in piece.parts])

        for piece, tensor in ahead(joined, pieces):
            file.add(piece.key, piece.place, tensor)
            progress(tensor.nbytes)
        file.close()
    atomic_write_text(record, json.dumps([dataclasses.asdict(entry) for entry in file.written]))
    return file.written


def _written(entry: Mapping[str, Any]) -> Written:
    offsets = entry["offsets"]
    fixed = {"offsets": None if offsets is None else tuple(offsets), "sizes": tuple(entry["sizes"])}
    return Written(**{**entry, **fixed})


def digest_of(source: SafetensorsFolder) -> str:
    """SHA-256 of the configuration and of each tensor's name, type, shape and place. Values are not read."""
    found = hashlib.sha256((source.folder / CONFIG).read_bytes())
    for name, stored in sorted(source.tensors.items()):
        entry = (name, str(stored.dtype), stored.shape, stored.file.name, stored.offset)
        found.update(json.dumps(entry).encode())
    return found.hexdigest()


def refuse_taken(out: Path) -> None:
    """Raise RamoeError when the output exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RamoeError(f"{out} exists already; nothing is overwritten: give another --out, or remove it")


def refuse_output(plan: Conversion | Export, out: Path) -> Path:
    """The folder in which the output is made before it is moved to its place.

    Raises:
        RamoeError: the output exists, the folder is the unfinished output of another plan, or the disk has
            no room for what is missing.
    """
    refuse_taken(out)
    unfinished = out.with_name(f".{out.name}.unfinished")
    note = unfinished / PLAN
    if unfinished.exists() and (not note.is_file() or read_json(note) != plan.identity):
        raise RamoeError(
            f"{unfinished} is the unfinished output of another model; remove it, or give another --out"
        )
    missing = plan.bytes - sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < missing:
        raise RamoeError(
            f"{place}: {free / 1e9:.1f} GB free, {missing / 1e9:.1f} GB needed; "
            "make room, or give another --out"
        )
    return unfinished


def begin(plan: Conversion | Export, out: Path) -> Path:
    """Make the folder of an unfinished output, or take up the one of the same plan.

    Raises RamoeError as `refuse_output`.
    """
    unfinished = refuse_output(plan, out)
    unfinished.mkdir(parents=True, exist_ok=True)
    for path in unfinished.rglob(".*.tmp"):  # of an attempt that was killed
        path.unlink()
    atomic_write_text(unfinished / PLAN, json.dumps(plan.identity))
    return unfinished


def flags_text(family: Family, flags: Flags) -> str:
    """`model_args.yaml`: the `model` section of a recipe."""
    head = f"# Megatron's flags of this {family.name} model: the `model` section of a recipe.\n"
    return head + yaml.safe_dump(flags, sort_keys=False)


def copy_others(source: Path, target: Path) -> None:
    """Copy the files of a Hugging Face folder that are no weights, such as the tokenizer's."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(NOT_COPIED):
            shutil.copyfile(path, target / path.name)


def plan_export(checkpoint: Path) -> Export:
    """Read a checkpoint's note and metadata, and check every tensor against the family's list.

    Raises:
        RamoeError: the checkpoint has no note, or lacks tensors of the family, or has them in another shape.
    """
    if not (checkpoint / TRACKER).is_file():
        raise RamoeError(f"{checkpoint}: no checkpoint there (expected a folder with {TRACKER})")
    _, folder = latest_checkpoint(checkpoint)
    note = note_in(checkpoint)
    if note is None:
        raise RamoeError(
            f"{checkpoint}: no {NOTE}, so the model's family is not known. `ramoe convert` writes it, and "
            "`ramoe finetune` copies it from --pretrained-checkpoint: copy it and the folder "
            f"{ORIGINAL} from the base model's checkpoint"
        )
    family, config = family_of(checkpoint / ORIGINAL)
    if family.name != note.family:
        raise RamoeError(
            f"{checkpoint / NOTE} says {note.family}, but {checkpoint / ORIGINAL} is a {family.name} model; "
            "copy both from one checkpoint"
        )
    source = TorchDist(folder)
    found: dict[tuple[str, ...], list[Piece]] = {}
    for piece in family.pieces(config, {}):
        found.setdefault(tuple(f"{part.name}{part.index}" for part in piece.parts), []).append(piece)
    pieces, missing = [], []
    for alternatives in found.values():
        chosen = next((piece for piece in alternatives if piece.key in source.shapes), None)
        if chosen is None:
            missing.append(alternatives[0].key)
        else:
            pieces.append(chosen)
    if missing:
        raise RamoeError(
            f"{folder} is no checkpoint of the family {family.name}: it lacks {len(missing)} tensors, first "
            f"{', '.join(dict.fromkeys(missing))[:300]}"
        )
    wrong = [
        f"{piece.key} is {list(source.shapes[piece.key])}, "
        f"expected {['...'] * len(piece.place) + list(piece.shape)}"
        for piece in pieces
        if not _fits(piece, source.shapes[piece.key])
    ]
    if wrong:
        raise RamoeError(
            f"{folder}: not the model that {checkpoint / ORIGINAL / CONFIG} describes: "
            f"{'; '.join(dict.fromkeys(wrong))[:600]}"
        )
    tensors = _exported(pieces, source)
    files = _shards(pieces, tensors)
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    return Export(source, note, files, tensors, total)


def _fits(piece: Piece, shape: Shape) -> bool:
    """Whether a stored tensor holds the piece. A vocabulary may be padded with further rows."""
    rest = shape[len(piece.place) :]
    padded = piece.key in ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
    same = rest[1:] == piece.shape[1:] and rest[0] >= piece.shape[0] if padded else rest == piece.shape
    return len(shape) == len(piece.place) + len(piece.shape) and same


def _exported(pieces: Iterable[Piece], source: TorchDist) -> dict[str, tuple[torch.dtype, Shape]]:
    """Type and shape of each Hugging Face tensor, in order."""
    tensors: dict[str, tuple[torch.dtype, Shape]] = {}
    for piece in pieces:
        for part, shape in zip(piece.parts, piece.operation.parts(piece.shape), strict=True):
            before = tensors.get(part.name, (None, ()))[1]
            lead = tuple(
                max(number + 1, length)
                for number, length in zip(part.index, before or (0,) * len(part.index), strict=False)
            )
            tensors[part.name] = (source.dtypes[piece.key], (*lead, *shape))
    return tensors


def _shards(
    pieces: Iterable[Piece], tensors: Mapping[str, tuple[torch.dtype, Shape]]
) -> dict[str, list[list[Piece]]]:
    """File name -> groups of pieces, so that each file holds whole tensors."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        names = {part.name for part in piece.parts}
        same = next((group for group in groups[-4:] if names & {p.name for p in group[0].parts}), None)
        if same is None:
            groups.append([piece])
        else:
            same.append(piece)
    shards: list[list[list[Piece]]] = [[]]
    filled = 0
    for group in groups:
        names = {part.name for piece in group for part in piece.parts}
        size = sum(math.prod(tensors[name][1]) * tensors[name][0].itemsize for name in names)
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(group)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def export_checkpoint(plan: Export, out: Path, progress: Progress = lambda _: None) -> None:
    """Write the Hugging Face folder. An interrupted export of the same checkpoint goes on where it stopped.

    Raises:
        RamoeError: `out` holds something else, or the disk is too small.
    """
    unfinished = begin(plan, out)
    where: dict[str, str] = {}
    for name, groups in plan.files.items():
        names = list(dict.fromkeys(part.name for group in groups for piece in group for part in piece.parts))
        where |= dict.fromkeys(names, name)
        header = header_of((tensor, *plan.tensors[tensor]) for tensor in names)
        size = len(header) + sum(math.prod(plan.tensors[t][1]) * plan.tensors[t][0].itemsize for t in names)
        path = unfinished / name
        if path.is_file() and path.stat().st_size == size:
            progress(size)
            continue
        with atomic_write(path) as temporary:
            _one_shard(temporary, header, names, groups, plan, progress)
    copy_others(plan.note.folder / ORIGINAL, unfinished)
    _write_config(unfinished / CONFIG, {dtype for dtype, _ in plan.tensors.values()})
    if len(plan.files) > 1:
        index = {"metadata": {"total_size": plan.bytes}, "weight_map": dict(sorted(where.items()))}
        atomic_write_text(unfinished / INDEX, json.dumps(index, indent=2) + "\n")
    plan.source.close()
    (unfinished / PLAN).unlink()
    os.replace(unfinished, out)


def _one_shard(
    path: Path,
    header: bytes,
    names: Sequence[str],
    groups: Iterable[Sequence[Piece]],
    plan: Export,
    progress: Progress,
) -> None:
    offsets, place = {}, len(header)
    for name in names:
        dtype, shape = plan.tensors[name]
        offsets[name] = place
        place += math.prod(shape) * dtype.itemsize
    with path.open("wb") as file:
        file.write(header)
        file.truncate(place)
        file.flush()

        def parts(piece: Piece) -> list[Tensor]:
            tensor = plan.source.read(piece.key, piece.place)
            if tensor.shape[:1] > piece.shape[:1]:  # the vocabulary's padding
                tensor = tensor[: piece.shape[0]]
            return piece.operation.split(tensor)

        for piece, split in ahead(parts, [piece for group in groups for piece in group]):
            for part, values in zip(piece.parts, split, strict=True):
                _, shape = plan.tensors[part.name]
                number = 0
                for index, length in zip(part.index, shape, strict=False):
                    number = number * length + index
                _write_at(file.fileno(), offsets[part.name] + number * values.nbytes, values)
                progress(values.nbytes)


def ahead[Value](read: Callable[[Piece], Value], pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Value]]:
    """Each piece with its value. The next one is read in a thread, so that the disk reads while it writes."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, pieces[0]) if pieces else None
        for place, piece in enumerate(pieces):
            assert coming is not None
            value = coming.result()
            coming = pool.submit(read, pieces[place + 1]) if place + 1 < len(pieces) else None
            yield piece, value


def _write_at(descriptor: int, offset: int, values: Tensor) -> None:
    memory, done = bytes_of(values.contiguous()), 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], offset + done)


def _write_config(path: Path, dtypes: set[torch.dtype]) -> None:
    """Correct config.json: an MXFP4 model is exported as bfloat16, and fine-tuning may change the type."""
    config = read_json(path)
    config.pop("quantization_config", None)
    if len(dtypes) == 1:
        (dtype,) = dtypes
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    atomic_write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
