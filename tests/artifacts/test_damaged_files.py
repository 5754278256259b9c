"""Each file of a run is refused by name when it is cut short or replaced by another kind of file."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import FORMATS, load_document, save_document
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import (
    read_divergence,
    read_examples,
    read_taxonomy,
    write_divergence,
    write_taxonomy,
)
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.artifacts.usage import UsageFile
from ramoe_megatron.data.parallel import load_examples
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.shards import Shards
from ramoe_megatron.method.categories import TaxonomyRow
from ramoe_megatron.method.divergence import DivergenceRow, NoZone
from ramoe_megatron.recipe.manifest import Manifest
from ramoe_megatron.report.inputs import load_run
from ramoe_megatron.report.inspect import describe

SHAPE = ModelShape(num_moe_layers=3, num_experts=4, topk=2, score_function="softmax", hidden_size=8)
EXAMPLE = {"id": "a", "task": "t", "language": "en"}


@dataclass(frozen=True)
class File:
    """How a valid file of some kind is written and read. ``by_line``: fewer lines are a valid file too."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    by_line: bool = False


def experts(path: Path) -> None:
    random = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0))
    ExpertFile(
        tasks=("t",),
        shape=SHAPE,
        expert_mask=random > 0.5,
        delta=random,
        task_frequency=random,
        general_frequency=random[0],
        english_pattern={"last": random.softmax(-1)},
        layer_number=torch.arange(3),
        rule={"name": "tau", "tau": 0.3},
        zone=NoZone("flat"),
        checkpoint="base",
    ).save(path)


def usage(path: Path) -> None:
    share = torch.full((2, 3, 4), 0.5)
    UsageFile(("en", "tr"), SHAPE, torch.tensor([7, 9]), share, share / 2, torch.arange(3), "base").save(path)


def priors(path: Path) -> None:
    Priors.save(path, ["a", "b"], torch.full((2, 3, 4), 0.25), tokens="last", shape=SHAPE, checkpoint="base")


def document(name: str) -> Callable[[Path], None]:
    return lambda path: save_document(path, name, dict.fromkeys(FORMATS[name][1], "x"))


def divergence(path: Path) -> None:
    write_divergence(
        path, [DivergenceRow("tr", layer, layer + 1, 0.123456789, 4321, 987) for layer in range(3)]
    )


def lines(*rows: dict[str, object]) -> Callable[[Path], object]:
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(path: Path) -> None:
    made = Manifest(path.parent / "new", "demo")
    made.path = path
    made.write()


def shards_of(path: Path) -> Shards:
    """The job whose state lies at `path`: OUT/.job-shards/KEY/state.safetensors."""
    return Shards(path.parents[2], "job", 3, lambda: {"key": "a"})


def shard(path: Path) -> None:
    with shards_of(path) as made:
        made.save(0, {"sums": torch.ones(3, dtype=torch.float64)})
        assert made.folder == path.parent


def go_on(path: Path) -> None:
    with shards_of(path):
        pass


KEY = hashlib.sha256(b'{"key": "a"}').hexdigest()[:16]
DOCUMENTS = [
    name for name, (_, keys) in FORMATS.items() if keys and name not in ("ramoe-evaluation", "ramoe-shard")
]
FILES = [
    File("experts.safetensors", experts, ExpertFile.load),
    File("priors.safetensors", priors, Priors.load),
    File("usage.safetensors", usage, UsageFile.load),
    File(
        "taxonomy.jsonl",
        lambda path: write_taxonomy(path, [TaxonomyRow("a", "t", "tr", "train", True, False)]),
        read_taxonomy,
        True,
    ),
    File("examples.jsonl", lines({**EXAMPLE, "correct": True}), read_examples, True),
    File(
        "parallel.jsonl",
        lines(*({**EXAMPLE, "id": id_, "prompt": "p", "response": "r", "split": "train"} for id_ in "ab")),
        lambda path: load_examples([str(path)]),
        True,
    ),
    File("divergence.csv", divergence, read_divergence, True),
    File("manifest.json", manifest, lambda path: Manifest(path.parent, "demo")),
    File(
        "recipe.yaml",
        lambda path: path.write_text(yaml.safe_dump({"name": "demo"})),
        lambda path: load_run(path.parent),
        True,
    ),
    File("evaluations/e.json", document("ramoe-evaluation"), lambda path: load_run(path.parents[1])),
    *(
        File(f"{name}.json", document(name), lambda path, name=name: load_document(path, name))
        for name in DOCUMENTS
    ),
    File("shown/e.safetensors", experts, describe),
    File("shown/d.csv", divergence, describe, True),
    File("shown/t.json", document("ramoe-taxonomy"), describe),
    File(f".job-shards/{KEY}/state.safetensors", shard, go_on),
]
BY_NAME = {file.name: file for file in FILES}


def place(folder: Path, file: File) -> Path:
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    file.write(path)
    return path


def refused(file: File, path: Path) -> None:
    with pytest.raises(RamoeError) as error:
        file.read(path)
    assert str(path) in str(error.value), error.value
    assert len(str(error.value)) > len(str(path)) + 10


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "recipe.yaml"])
def test_a_file_cut_short_anywhere_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = BY_NAME[name]
    path = place(tmp_path, file)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 97)):
        rest = whole[:length]
        if (
            file.by_line
            and length
            and (rest.endswith(b"\n") or (path.suffix == ".jsonl" and rest.endswith(b"}")))
        ):
            continue  # a shorter file, which nothing tells from one that was written so
        if rest == whole.rstrip():
            continue  # JSON's last line end
        path.write_bytes(rest)
        refused(file, path)


@pytest.mark.parametrize("name", BY_NAME)
def test_another_kind_of_file_in_its_place_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = BY_NAME[name]
    path = place(tmp_path, file)
    others = {other.name: place(tmp_path / "others", other).read_bytes() for other in FILES}
    others |= {
        "text": b"not one of ours\n",
        "bytes": bytes(range(128, 256)) * 4,
        "list": b"[1]",
        "zeros": bytes(64),
    }
    for kind, content in others.items():
        same = kind.removeprefix("shown/") in {name.removeprefix("shown/")} or content == others[name]
        if same or (name.startswith("shown/") and kind.split(".")[-1] == name.split(".")[-1]):
            continue
        if name == "recipe.yaml" and kind.endswith((".json", ".jsonl", ".yaml")):
            continue  # a mapping is a recipe's form; `ramoe run` checks its keys
        path.write_bytes(content)
        try:
            refused(file, path)
        except BaseException as error:
            raise AssertionError(f"{kind} in the place of {name}") from error
