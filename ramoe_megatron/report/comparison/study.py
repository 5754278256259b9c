"""The evaluations of several run folders side by side, with the keys that its tables are over."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ramoe_megatron.report.comparison.contrasts import Row, contrast, keys_of
from ramoe_megatron.report.inputs import Evaluation, ExampleKey, RunInputs
from ramoe_megatron.report.pairing import Pair, pair_up

Cell = tuple[str, str]
"""(task, language)"""

Values = dict[tuple[str, int | None], float]
"""One number for each (base model, seed); seed None where nothing is trained."""


@dataclass(frozen=True)
class Study:
    runs: Mapping[str, RunInputs]
    """By label, one a base model."""
    by_method: Mapping[str, list[Evaluation]]
    """In the order that tables show."""
    anchor: str
    reference: str
    main: str

    @cached_property
    def keys(self) -> dict[ExampleKey, str]:
        return keys_of(e for evaluations in self.by_method.values() for e in evaluations)

    @cached_property
    def by_cell(self) -> dict[Cell, list[ExampleKey]]:
        """Examples by task and language, sorted."""
        cells: dict[Cell, list[ExampleKey]] = defaultdict(list)
        for key, task in sorted(self.keys.items()):
            cells[task, key[1]].append(key)
        return dict(sorted(cells.items()))

    @cached_property
    def target_cells(self) -> dict[Cell, list[ExampleKey]]:
        return {cell: keys for cell, keys in self.by_cell.items() if cell[1] != self.anchor}

    @cached_property
    def target_keys(self) -> list[ExampleKey]:
        return [key for keys in self.target_cells.values() for key in keys]

    @cached_property
    def anchor_keys(self) -> list[ExampleKey]:
        return [key for cell, keys in self.by_cell.items() if cell[1] == self.anchor for key in keys]

    @property
    def targets(self) -> list[str]:
        return sorted({language for _, language in self.target_cells})

    @property
    def tasks(self) -> list[str]:
        return sorted({task for task, _ in self.by_cell})

    @property
    def others(self) -> list[str]:
        """Every method but the reference and the model before training."""
        return [method for method in self.by_method if method not in ("base", self.reference)]

    @cached_property
    def _pairs(self) -> dict[tuple[str, str], list[Pair]]:
        return {}

    def pairs(self, method: str, other: str) -> list[Pair]:
        if (method, other) not in self._pairs:
            self._pairs[method, other] = pair_up(self.by_method.get(method, []), self.by_method.get(other, []))
        return self._pairs[method, other]

    def against(self, method: str, other: str, keys: list[ExampleKey]) -> Row | None:
        """`method` minus `other` on these examples; None for a method with itself, or when nothing is shared."""
        return None if method == other else contrast(self.pairs(method, other), keys)


def matched(own: Values, other: Values) -> dict[str, list[tuple[float, float]]]:
    """Numbers of the same base model and seed, by base model; one without a seed goes with every seed of the other."""
    found = {}
    for (base, seed), value in own.items():
        for (other_base, other_seed), beside in other.items():
            if base == other_base and (seed == other_seed or None in (seed, other_seed)):
                found[base, other_seed if seed is None else seed] = value, beside
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for base, seed in sorted(found, key=lambda key: (key[0], key[1] or 0)):
        pairs[base].append(found[base, seed])
    return pairs
