"""Taxonomies and priors for the tests of several anchors: random ones, and a small one to follow by hand."""

from pathlib import Path

import torch
from hypothesis import strategies as st

from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.method.categories import TaxonomyRow

SHAPE = ModelShape(num_moe_layers=2, num_experts=3, topk=1, score_function="softmax", hidden_size=4)
LANGUAGES = ("zh", "es", "sw")


@st.composite
def tables(draw: st.DrawFn) -> list[TaxonomyRow]:
    """A complete taxonomy against en: every id in every language, in any order."""
    rows = []
    for n in range(draw(st.integers(1, 6))):
        task, english = draw(st.sampled_from(["t", "u"])), draw(st.booleans())
        rows += [
            TaxonomyRow(f"x{n}", task, language, "train", english, draw(st.booleans()))
            for language in LANGUAGES
        ]
    return draw(st.permutations(rows))


def by_hand() -> list[TaxonomyRow]:
    """Correct answers: a in en; b in zh; c in none; d in en, zh and sw."""
    outcomes = {
        "a": (True, False, False),
        "b": (False, True, False),
        "c": (False, False, False),
        "d": (True, True, True),
    }
    return [
        TaxonomyRow(id_, "t", language, "train", en, correct)
        for id_, (en, zh, sw) in outcomes.items()
        for language, correct in (("zh", zh), ("sw", sw))
    ]


def save_priors(
    path: Path,
    ids: str,
    value: float,
    tokens: str = "last",
    checkpoint: str = "base",
    shape: ModelShape = SHAPE,
) -> Path:
    """Row n is [value + n / 100, 1 - that, 0] in each layer."""
    first = torch.tensor([value + n / 100 for n in range(len(ids))])
    rows = torch.stack([first, 1 - first, torch.zeros(len(ids))], -1)[:, None].expand(-1, 2, -1)
    data = [{"path": f"{path.stem}.jsonl", "sha256": "0" * 64}]
    Priors.save(path, list(ids), rows, tokens=tokens, shape=shape, checkpoint=checkpoint, data=data)
    return path
