"""Examples of known category, and the files that give them labels."""

from pathlib import Path
from typing import Any

import torch
from data_rows import SmallTokenizer, example

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import write_taxonomy
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig
from ramoe_megatron.method.categories import TaxonomyRow
from ramoe_megatron.method.divergence import Zone

TOKENIZER = SmallTokenizer()
SHAPE = ModelShape(num_moe_layers=4, num_experts=8, topk=2, score_function="softmax", hidden_size=16)
TASKS = ("currency", "sum")
OUTCOMES = {"cc": (True, True), "ci": (True, False), "ic": (False, True), "ii": (False, False)}
# ids 0-3 of each task: one of each category in Spanish; in Turkish the next category
EXAMPLES = [
    example(f"{task}/{n}", language, task, response=" ".join(["EUR"] * (n + 1)))
    for task in TASKS
    for n in range(8)
    for language in ("en", "es", "tr")
]


def category(id_: str, language: str) -> str:
    return list(OUTCOMES)[(int(id_.split("/")[1]) + (language == "tr")) % 4]


def write_files(folder: Path) -> dict[str, str]:
    """An expert file, priors and taxonomies of these examples, by name; "folder": where they are."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(2, 4, 8, generator=generator).softmax(-1)
    pattern[1] = 0  # "sum" has no English-correct example
    ExpertFile(
        tasks=TASKS, shape=SHAPE, expert_mask=torch.rand(2, 4, 8, generator=generator) > 0.5,
        delta=torch.zeros(2, 4, 8),
        task_frequency=torch.full((2, 4, 8), 0.25), general_frequency=torch.full((4, 8), 0.25),
        english_pattern={"last": pattern, "all": pattern}, layer_number=torch.arange(1, 5),
        rule={"name": "top-m", "m": 4},
        zone=Zone(1, 2, "1-2", "given"), checkpoint="base@1",
    ).save(folder / "experts.safetensors")  # fmt: skip
    ids = [f"{task}/{n}" for task in TASKS for n in range(8)]
    priors = torch.rand(16, 4, 8, generator=generator).softmax(-1)
    Priors.save(folder / "priors.safetensors", ids, priors, tokens="last", shape=SHAPE, checkpoint="base@1")
    few = [i for i in ids if i not in ("currency/1", "sum/5")]
    Priors.save(folder / "few.safetensors", few, priors[:14], tokens="last", shape=SHAPE, checkpoint="base@1")
    rows = [
        TaxonomyRow(e.id, e.task, e.language, e.split, *OUTCOMES[category(e.id, e.language)])
        for e in EXAMPLES
        if e.language != "en"
    ]
    write_taxonomy(folder / "taxonomy.jsonl", rows)
    write_taxonomy(folder / "short.jsonl", [row for row in rows if row.language != "tr"])
    return {path.stem: str(path) for path in folder.iterdir()} | {"folder": str(folder)}


def config(files: dict[str, str], **changes: Any) -> RoutingAlignmentConfig:
    settings = {"coeff": 1.0, "target": "example", "tokens": "last", "priors": files["priors"]}
    return RoutingAlignmentConfig(
        **({"experts": files["experts"], "taxonomy": files["taxonomy"]} | settings | changes)
    )
