"""What alignment costs at a router, in operations: an exact number, which no load of the machine changes.

Counted are operations that compute or copy, of forward and backward, on two gloo ranks: those a GPU starts a
kernel for. Not covered: what a kernel takes, and what a GPU's compiler makes of them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import run_table

from benchmarks.measure import innermost, operations
from benchmarks.operations import Case, cases
from benchmarks.tables import AT_MOST
from ramoe_megatron.method.losses import reference, weighted_divergence

JOB = str(Path(__file__).parents[1] / "support/operations_job.py")
ONCE = 130
"""Operations of a micro-batch and of the log, however many layers are aligned."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("operations")
    out = folder / "found.json"
    run_table(2, [{"name": "operations", "job": JOB, "argv": ["tiny", str(out)]}], folder)
    return json.loads(out.read_text())["cases"]


def test_an_aligned_layer_takes_at_most_forty_operations(counted: dict[str, dict[str, int]]) -> None:
    """With the default options and with those that take the most, in each layout of a sequence's rows."""
    assert counted.keys() == {str(case) for case in cases(ranks=2, few=True)}
    assert {found["layer"] for found in counted.values()} <= set(range(1, AT_MOST + 1)), counted
    assert all(0 < found["once"] <= ONCE for found in counted.values()), counted


def test_pieces_of_a_sequence_take_a_few_operations_more(counted: dict[str, dict[str, int]]) -> None:
    one, *pieces = (counted[str(Case(layout=layout))]["layer"] for layout in ("", "tp", "cp"))
    assert all(one <= layer <= one + 4 for layer in pieces)


def test_views_and_allocations_are_no_operations() -> None:
    x = torch.rand(4, 3)

    def action() -> None:
        y = x.t().reshape(2, 6)[0].view(3, 2).expand(5, 3, 2)
        torch.empty(3)
        y.sum(dim=0).softmax(-1).masked_fill(x[:3, :2] > 0.5, 0.0)

    # reshape copies; sum, softmax, a comparison; masked_fill copies and fills
    assert operations(action, on_cpu=True) == 6


def test_the_innermost_spans_of_each_thread_are_counted() -> None:
    first = [(1, 0, 10), (1, 1, 3), (1, 4, 9), (1, 5, 6), (1, 12, 13)]
    assert innermost(first) == 3
    assert innermost([*first, (2, 0, 20), (2, 2, 4)]) == 4
    assert innermost([]) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_the_compiler_fuses_a_divergence_and_its_gradient() -> None:
    """As Megatron's `jit_fuser` compiles it on a CUDA device; here with torch's compiler for the CPU."""
    from torch._inductor import metrics

    generator = torch.Generator().manual_seed(0)
    q_en, q = torch.rand(2, 3, 8, generator=generator).softmax(-1)
    known = reference("lumped-kl", q_en, torch.rand(3, 8, generator=generator) < 0.4)
    weight = torch.tensor([0.5, 0.0, 2.0])
    metrics.reset()
    found = torch.compile(weighted_divergence, fullgraph=True)("lumped-kl", known, q, weight)
    expected = weighted_divergence("lumped-kl", known, q, weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    eager = operations(lambda: weighted_divergence("lumped-kl", known, q, weight), on_cpu=True)
    assert 0 < metrics.generated_kernel_count <= 4 < eager
