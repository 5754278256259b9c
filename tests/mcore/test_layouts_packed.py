"""Packed samples are the padded ones: router gradients and logged figures, in every layout.

Without per-token loss Megatron's cross-entropy is a mean over packs of the mean over their tokens, not over
samples: there the comparison is of the alignment alone; with per-token loss it is also of alignment and
language-model loss together. z-loss and load balancing count padding, so they are off.
"""

from pathlib import Path

import pytest
from layout_laws import assert_same
from layout_rows import ROWS
from packed_rows import MULTIPLES, PACKS, ROOM, SAME_PADDED, samples_of_first_packs
from small_run import SEQUENCE, gradients, outcome


@pytest.mark.parametrize("name", SAME_PADDED)
def test_packed_samples_are_the_padded_ones(layouts: Path, name: str) -> None:
    assert_same(layouts, name, SAME_PADDED[name])


def test_packing_saves_most_of_the_padding(layouts: Path) -> None:
    """The comparison is of real packs: several samples in each, unequal numbers, fewer rows than padded."""
    for room in MULTIPLES:
        samples = samples_of_first_packs(layouts, room)
        assert samples > 3 * PACKS
        assert samples % PACKS, "a mean over packs would be a mean over samples"
        assert samples * SEQUENCE > PACKS * ROOM


def test_a_mean_over_packs_would_be_another(layouts: Path) -> None:
    """Each sample counts the same, whatever pack it lies in: not so under per-token loss."""
    alone, tokens = gradients(layouts, "packed-alone"), gradients(layouts, "packed-alone-tokens")
    assert all((tokens[layer] - alone[layer]).norm() > 0.05 * alone[layer].norm() for layer in (2, 3))
    assert outcome(layouts, "packed-alone")["first"]["ramoe/aligned_share"] > 0
    assert {ROWS[name].ranks for name in SAME_PADDED} == {1, 2, 4}
