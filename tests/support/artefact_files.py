"""An expert file and priors for the tests of the artefacts to write and to read."""

from pathlib import Path

import torch
from hypothesis import strategies as st

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.method.divergence import NoZone, Zone

SHAPE = ModelShape(num_moe_layers=3, num_experts=4, topk=2, score_function="softmax", hidden_size=8)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def expert_file(seed: int = 0, zone: Zone | NoZone | None = None) -> ExpertFile:
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(2, 3, 4, generator=generator)
    return ExpertFile(
        tasks=("currency", "continent"),
        shape=SHAPE,
        expert_mask=random > 0.5,
        delta=random - 0.5,
        task_frequency=random,
        general_frequency=random[0],
        english_pattern={"last": random.softmax(-1), "all": random.softmax(-1)},
        layer_number=torch.tensor([2, 4, 6]),
        rule={"name": "tau", "tau": 0.3},
        zone=zone or Zone(1, 2, "auto", "floor of the curve"),
        checkpoint="checkpoints/base",
        data=[{"path": "parallel.jsonl", "sha256": "0" * 64}],
        sequences={"task": {"currency": 5, "continent": 7}, "general": 9},
    )


def save_priors(path: Path, ids: list[str], seed: int = 0) -> torch.Tensor:
    priors = torch.rand(len(ids), 3, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    Priors.save(path, ids, priors, tokens="last", shape=SHAPE, checkpoint="checkpoints/base")
    return priors
