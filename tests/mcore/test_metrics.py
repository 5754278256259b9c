"""Laws of the logged figures, in one gloo rank with Megatron's own process groups: what is summed, averaged,
written and printed.

Equality between layouts is the business of the layout tests; here one rank stands for all.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_logging

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align import metrics, state
from ramoe_megatron.mcore.align.metrics import (
    CI_MASS,
    COEFFICIENT,
    COLUMNS,
    LOSS,
    OTHER_MASS,
    SHARE,
    AlignmentMetrics,
    LoggedSamples,
)
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.state import AlignmentState

NUMBERS = (2, 4, 6, 8)  # a model of 8 layers, every second one of experts
ZONE = (1, 2)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


class Writer:
    """Stands for TensorBoard's and, with `log`, for a Weights & Biases run: keeps what it is given."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        self.seen.setdefault(step, {})[name] = float(value)

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self.add_scalar(name, value, step)


def samples(count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    aligned = torch.rand(count, generator=generator) < 0.5
    return {
        "loss": torch.rand(count, generator=generator) * aligned,
        "unit": torch.randint(1, 9, (count,), generator=generator).float(),
        "aligned": aligned,
        "ci": torch.rand(count, generator=generator) < 0.5,
        "has_task": torch.rand(count, generator=generator) < 0.8,
        "task_mass": torch.rand(count, generator=generator),
    }


def record(tracker: AlignmentMetrics, batch: dict[str, torch.Tensor], where: slice = slice(None)) -> None:
    """A micro-batch in both aligned layers; in the second one half the loss and half the mass."""
    part = {name: values[where] for name, values in batch.items()}
    weight, count = (
        torch.full_like(part["unit"], 2.0),
        [part[n] for n in ("unit", "aligned", "ci", "has_task")],
    )
    logged = LoggedSamples.of(weight, *count)
    for layer, share in zip(ZONE, (1.0, 0.5), strict=True):
        masses = torch.stack([share * part["task_mass"], 1 - share * part["task_mass"]], dim=-1)
        tracker.record_alignment(layer, logged, part["loss"] / 2, masses, weight=share)


def report(
    tracker: AlignmentMetrics,
    step: int,
    writer: Any = None,
    wandb: Any = None,
    layers: bool = False,
    table: Any = None,
) -> None:
    """As Megatron's training_log calls it."""
    tracker.report(
        loss_scale=0.5, iteration=step, writer=writer, wandb_writer=wandb, per_layer_logging=layers,
        force_initialize=True,
        track_names=[], num_layers=8, moe_layer_freq=2, mtp_num_layers=None, total_loss_dict=table,
        pg_collection=None,
    )  # fmt: skip


def test_the_figures_are_their_definitions_and_micro_batches_add_up() -> None:
    whole, pieces, batch = AlignmentMetrics(NUMBERS, "cpu"), AlignmentMetrics(NUMBERS, "cpu"), samples(12, 1)
    record(whole, batch)
    for start, stop in ((0, 1), (1, 8), (8, 12)):
        record(pieces, batch, slice(start, stop))
    found, again = whole.reduced(), pieces.reduced()
    ci, other = batch["ci"] & batch["has_task"], ~batch["ci"] & batch["has_task"]
    expected = {
        LOSS: 0.75 * batch["loss"].sum() / batch["unit"].sum(),
        SHARE: batch["aligned"].float().mean(),
        CI_MASS: 0.75 * batch["task_mass"][ci].mean(),
        OTHER_MASS: 0.75 * batch["task_mass"][other].mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-6), name
        assert again[name].item() == pytest.approx(value.item(), rel=1e-6), name


def test_layers_in_another_order_and_without_some_micro_batch_have_their_own_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As recompute and pipeline stages record them. Where a program never reports, sums are taken early."""
    batches = [
        LoggedSamples.of(*(samples(4, seed)[n] for n in ("unit", "unit", "aligned", "ci", "has_task")))
        for seed in (1, 2)
    ]
    figures = {
        (layer, n): (torch.rand(4), torch.rand(4, 2))
        for layer in ZONE
        for n in (0, 1)
        if (layer, n) != (2, 0)
    }
    orders = [sorted(figures), sorted(figures, reverse=True), sorted(figures, key=lambda key: key[1])]
    found = []
    for waiting, order in ((metrics.WAITING, orders[0]), (metrics.WAITING, orders[1]), (1, orders[2])):
        monkeypatch.setattr(metrics, "WAITING", waiting)
        tracker = AlignmentMetrics(NUMBERS, "cpu")
        for layer, n in order:
            tracker.record_alignment(layer, batches[n], *figures[layer, n])
        found.append(tracker.sums_LM.clone())
    for sums in found[1:]:
        torch.testing.assert_close(sums, found[0])
    alone = figures[2, 1][0] * batches[1].columns_MB[0]
    torch.testing.assert_close(found[0][2, 0], alone.sum())
    assert found[0][:, COLUMNS.index("samples")].tolist() == [0, 8, 4, 0]


def test_layers_are_written_under_megatrons_own_numbers_and_their_mean_is_the_figure() -> None:
    tracker, board, run = AlignmentMetrics(NUMBERS, "cpu"), Writer(), Writer()
    record(tracker, samples(12, 2))
    report(tracker, 7, board, run, layers=True)
    assert board.seen == run.seen
    seen = board.seen[7]
    names = {LOSS: LOSS, CI_MASS: "ramoe_task_expert_mass_ci", OTHER_MASS: "ramoe_task_expert_mass_other"}
    indices = [NUMBERS[layer] - 1 for layer in ZONE]
    assert {name for name in seen if name.startswith("moe/")} == {
        f"moe/{name}_layer_{i}" for name in names.values() for i in indices
    }
    for scalar, name in names.items():
        values = [seen[f"moe/{name}_layer_{i}"] for i in indices]
        assert sum(values) / len(values) == pytest.approx(seen[scalar], rel=1e-6), name
        assert values[1] == pytest.approx(values[0] / 2, rel=1e-6)
    assert not tracker.sums_LM.any()


def test_megatrons_layer_curves_have_the_same_names() -> None:
    """Its own loss of the router in layer n and ours stand under one index."""
    tracker, board = AlignmentMetrics(NUMBERS, "cpu"), Writer()
    record(tracker, samples(4, 3))
    tracker.record("z_loss", torch.tensor(1.0), NUMBERS[ZONE[0]], 8)
    tracker.report(
        1.0, 1, board, per_layer_logging=True, track_names=["z_loss"], num_layers=8, moe_layer_freq=2
    )
    (stock,) = [
        name.removeprefix("moe/z_loss")
        for name, value in board.seen[1].items()
        if name.startswith("moe/z_loss") and value
    ]
    assert f"moe/{LOSS}{stock}" in board.seen[1]


@pytest.mark.parametrize("layers", [False, True])
def test_a_step_without_ci_samples_is_logged_as_zero_and_no_mass_is_invented(layers: bool) -> None:
    tracker, board, batch = AlignmentMetrics(NUMBERS, "cpu"), Writer(), samples(6, 4)
    nothing = torch.zeros(6, dtype=torch.bool)
    record(tracker, batch | {"ci": nothing, "aligned": nothing, "loss": torch.zeros(6)})
    report(tracker, 1, board, layers=layers)
    seen = board.seen[1]
    assert seen[LOSS] == seen[SHARE] == 0
    assert seen[OTHER_MASS] > 0
    # only where --moe-per-layer-logging asks for it
    assert any(name.startswith("moe/") for name in seen) == layers
    assert not any("mass_ci" in name for name in seen)
    assert all(torch.isfinite(value) for value in tracker.latest.values())
    report(tracker, 2, board, layers=layers)  # a step in which nothing was recorded at all
    assert board.seen[2] == {LOSS: 0, SHARE: 0}


def test_the_printed_line_is_the_mean_over_the_steps_since_the_last_one() -> None:
    """The table of Megatron's training_log: counts rise before the report and are reset by a printed line."""
    tracker, table = AlignmentMetrics(NUMBERS, "cpu"), {}
    batches = [samples(8, seed) for seed in range(10, 17)]
    skipped = {2, 5}  # by the optimizer (float16 overflow): they do not count
    printed = []
    for step, batch in enumerate(batches):
        name = "skipped iterations" if step in skipped else "advanced iterations"
        table[name] = table.get(name, 0) + 1
        record(tracker, batch)
        report(tracker, step, table=table)
        if step in (1, 6):
            printed.append(
                {
                    key: float(table[key]) / max(1, table["advanced iterations"])
                    for key in (LOSS, SHARE, CI_MASS)
                }
            )
            table = dict.fromkeys(table, 0) | {LOSS: torch.tensor([0.0])}
    for line, steps in zip(printed, ([0, 1], [3, 4, 6]), strict=True):
        joined = {key: torch.cat([batches[step][key] for step in steps]) for key in batches[0]}
        alone = AlignmentMetrics(NUMBERS, "cpu")
        record(alone, joined)
        for name, value in alone.reduced().items():
            if name in line:
                assert line[name] == pytest.approx(value.item(), rel=1e-6), (steps, name)


def test_skipped_steps_alone_print_no_figure() -> None:
    tracker, table = (
        AlignmentMetrics(NUMBERS, "cpu"),
        {"advanced iterations": 0, "skipped iterations": 1, LOSS: torch.tensor([0.0])},
    )
    record(tracker, samples(4, 5))
    report(tracker, 1, table=table)
    assert table == {"advanced iterations": 0, "skipped iterations": 1}


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Megatron's arguments in its loop of six iterations, which counts those that are done."""
    args = SimpleNamespace(curr_iteration=0, train_iters=6, load=None, save=None)
    monkeypatch.setattr(state, "_training_args", lambda: args)
    return args


def tracked(**changes: Any) -> tuple[AlignmentMetrics, AlignmentState]:
    """Megatron's tracker, ours, and the state of an alignment, as `attach` makes them."""
    config = RoutingAlignmentConfig(coeff=8.0, experts="e", taxonomy="t", **changes)
    of_run = AlignmentState(config, "cpu")
    moe_logging.destroy_moe_metrics_tracker()
    return AlignmentMetrics.install(
        NUMBERS, "cpu", of_run.coefficient.now if config.scheduled else None
    ), of_run


def test_a_coefficient_that_changes_is_written_and_printed(training: SimpleNamespace) -> None:
    """Warm-up over two iterations (1/3, 2/3), then half a cosine over four: 0, 45, 90 and 135 degrees."""
    tracker, _ = tracked(coeff_warmup_iters=2, coeff_decay="cosine")
    board, run, table, printed = Writer(), Writer(), {}, []
    half = 2**-0.5
    by_hand = [8 / 3, 16 / 3, 8, 4 * (1 + half), 4, 4 * (1 - half)]
    for step in range(6):
        training.curr_iteration = step
        name = "skipped iterations" if step == 4 else "advanced iterations"
        table[name] = table.get(name, 0) + 1
        record(tracker, samples(8, step))
        report(tracker, step + 1, board, run, table=table)
        if step in (1, 5):
            printed.append(float(table[COEFFICIENT]) / table["advanced iterations"])
            table = dict.fromkeys(table, 0) | {LOSS: torch.tensor([0.0])}
    assert board.seen == run.seen
    assert [board.seen[step + 1][COEFFICIENT] for step in range(6)] == pytest.approx(by_hand, rel=1e-6)
    assert printed == pytest.approx(
        [sum(by_hand[:2]) / 2, (by_hand[2] + by_hand[3] + by_hand[5]) / 3], rel=1e-6
    )


def test_a_constant_coefficient_is_no_figure(training: SimpleNamespace) -> None:
    tracker, _ = tracked()
    board, table = Writer(), {"advanced iterations": 1}
    record(tracker, samples(8, 1))
    report(tracker, 1, board, table=table)
    assert COEFFICIENT not in board.seen[1].keys() | table.keys()


def test_a_coefficient_in_parities_is_zero_in_the_step_that_measures_it(training: SimpleNamespace) -> None:
    """The validation between two steps, and a step without an aligned sample, leave nothing in it."""
    tracker, of_run = tracked(coeff_unit="lm-loss")
    board, batch = Writer(), samples(8, 1)
    nothing = torch.zeros(8, dtype=torch.bool)
    for step in range(3):
        training.curr_iteration = step
        if step:
            with torch.no_grad():
                of_run.record_lm_loss(torch.tensor(900.0), torch.tensor(3))
        for loss, tokens in ((10.0, 4), (20.0, 6)):
            of_run.record_lm_loss(torch.tensor(loss * (step + 1)), torch.tensor(tokens))
        record(tracker, batch | ({"aligned": nothing, "loss": torch.zeros(8)} if step == 0 else {}))
        report(tracker, step + 1, board)
        of_run.after_step(step + 1)
    aligned = board.seen[2][LOSS]
    assert [board.seen[step][COEFFICIENT] for step in (1, 2, 3)] == pytest.approx(
        [0, 0, 8 * 6 / aligned], rel=1e-6
    )


@pytest.mark.parametrize("recorded", [None, (0.0, 4), (float("nan"), 4)])
def test_a_loss_function_that_tells_no_loss_is_refused_once_a_sample_is_aligned(
    training: SimpleNamespace, recorded: Any
) -> None:
    tracker, of_run = tracked(coeff_unit="lm-loss")
    batch = samples(8, 1)
    for aligned in (False, True):
        if recorded is not None:
            of_run.record_lm_loss(*map(torch.tensor, recorded))
        record(tracker, batch if aligned else batch | {"loss": torch.zeros(8)})
        report(tracker, 1 + aligned)
        if not aligned:
            of_run.after_step(1)
            continue
        with pytest.raises(
            RamoeError,
            match=r"--ramoe-coeff-unit lm-loss: .* call ramoe_megatron.record_lm_loss\(loss, tokens\)",
        ):
            of_run.after_step(2)


def test_installing_twice_keeps_the_tracker_and_megatrons_entries() -> None:
    moe_logging.destroy_moe_metrics_tracker()
    moe_logging.get_moe_metrics_tracker().record("z_loss", torch.tensor(2.0), 1, 8)
    first = AlignmentMetrics.install(NUMBERS, "cpu")
    assert AlignmentMetrics.install(list(NUMBERS), "cpu") is first is moe_logging.get_moe_metrics_tracker()
    assert first.metrics["z_loss"].values[0] == 2
    assert AlignmentMetrics.install(NUMBERS[:2], "cpu") is not first
