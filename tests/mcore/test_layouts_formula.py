"""The logged alignment loss is the formula, by hand in float64 from the routing of each example."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from small_run import LAYERS, SAMPLES, outcome

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import read_taxonomy
from ramoe_megatron.data.parallel import load_examples
from ramoe_megatron.data.sampler import order


def reference_loss(
    folder: Path, divergence: Any, tokens: str, target: str, chosen: set[str], **how: bool
) -> float:
    """The logged value of the first step, by hand in float64 from the routing of each example."""
    examples = load_examples([str(folder / "parallel.jsonl")], split="train")
    found = load_file(folder / "reference/reference.safetensors")
    experts, priors = (
        ExpertFile.load(folder / "profile/experts.safetensors"),
        Priors.load(folder / "profile/priors.safetensors"),
    )
    category = {(row.id, row.language): row.category for row in read_taxonomy(folder / "taxonomy.jsonl")}
    total = unit_total = aligned_total = 0.0
    for index in order(examples, 2 * SAMPLES, 7)[:SAMPLES]:
        example = examples[index]
        unit = float(found["loss_tokens"][index]) if how.get("per_token") else 1.0
        unit_total += unit
        if category.get((example.id, example.language)) not in chosen:
            continue
        aligned_total += unit
        task = experts.tasks.index(example.task)
        q_en = priors.rows([example.id])[0] if target == "example" else experts.english_pattern[tokens][task]
        for layer in LAYERS:
            p = q_en[layer].double().numpy()
            q = found[f"pooled.{tokens}"][index, layer].double().numpy()
            total += unit * divergence(p, q, experts.expert_mask[task, layer].numpy()) / len(LAYERS)
    return total / (aligned_total if how.get("by_aligned") else unit_total)


def kl(p: np.ndarray, q: np.ndarray, _: Any = None) -> float:
    return float((p * np.log(p / q)).sum())


def lump(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.append(p[mask], p[~mask].sum())


def two(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.array([p[mask].sum(), p[~mask].sum()])


BY_HAND = {
    "lumped-kl": lambda p, q, mask: kl(lump(p, mask), lump(q, mask)),
    "mass": lambda p, q, mask: kl(two(p, mask), two(q, mask)),
    "kl": kl,
    "js": lambda p, q, _: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
}


@pytest.mark.parametrize(
    ("name", "divergence", "tokens", "target", "chosen", "how"),
    [
        ("one-alone", "lumped-kl", "last", "example", {"ci"}, {}),
        ("one-whole-tokens", "lumped-kl", "last", "example", {"ci"}, {"per_token": True}),
        ("one-ci", "lumped-kl", "last", "example", {"ci"}, {"by_aligned": True}),
        ("one-ci-tokens", "lumped-kl", "last", "example", {"ci"}, {"by_aligned": True, "per_token": True}),
        ("one-all", "lumped-kl", "last", "example", {"cc", "ci", "ic", "ii"}, {}),
        ("one-profile", "lumped-kl", "last", "profile", {"ci"}, {}),
        ("one-kl", "kl", "prompt", "profile", {"ci", "cc"}, {}),
        ("one-js", "js", "response", "profile", {"ci"}, {}),
        ("one-mass", "mass", "all", "profile", {"ci"}, {}),
    ],
)
def test_the_logged_loss_is_the_formula(
    layouts: Path,
    name: str,
    divergence: str,
    tokens: str,
    target: str,
    chosen: set[str],
    how: dict[str, bool],
) -> None:
    first_step = outcome(layouts, name)["first"]
    expected = reference_loss(layouts, BY_HAND[divergence], tokens, target, chosen, **how)
    assert expected > 0
    # float32 logarithms of near-equal numbers
    assert first_step["routing_alignment_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-8)
