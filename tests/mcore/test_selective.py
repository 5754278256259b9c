"""Selective training on real Megatron, in every layout.

Frozen weights stay bit-for-bit, and selected weights train as in a full run.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from data_rows import SmallTokenizer
from safetensors.torch import load_file
from selective_rows import BUDGET, CASES, DISTRIBUTED, LAYOUTS, RESUMED, TOP_P, name, table, write_usages
from small_run import load_flags, outcome, profile_flags, run_table, training_flags, write_world
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.usage import UsageFile
from ramoe_megatron.data.encode import encode
from ramoe_megatron.data.parallel import load_examples
from ramoe_megatron.method.selection import esft, rise


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rows, and the base model and profile that they start from."""
    folder = tmp_path_factory.mktemp("selective")
    write_world(folder)
    base = training_flags(
        folder, "--train-iters", "4", "--save", str(folder / "base"), "--save-interval", "4"
    )
    jobs: list[dict[str, Any]] = [{"name": "base", "job": "finetune", "argv": base}]
    jobs.append(
        {"name": "profile", "job": "profile", "argv": profile_flags(folder, "profile", "--ramoe-save-usage")}
    )
    jobs.append({"name": "profile-plain", "job": "profile", "argv": profile_flags(folder, "profile-plain")})
    run_table(1, jobs, folder, "base")
    write_usages(folder)
    for ranks in (1, 2, 4):
        run_table(ranks, table(folder, ranks), folder)
    after = training_flags(folder, *load_flags(folder, "through-pp-late"), "--train-iters", "1")
    run_table(1, [{"name": "after", "job": "finetune", "argv": after, "everything": True}], folder, "after")
    return folder


def chosen(folder: Path, kind: str) -> torch.Tensor:
    """The experts that a row should train. bool [L, E]"""
    if kind == "routers":
        return torch.zeros(4, 8, dtype=torch.bool)
    if kind == "task-experts":
        return ExpertFile.load(folder / "profile/experts.safetensors").expert_mask.any(0)
    if kind in ("late", "early"):
        mask = torch.zeros(4, 8, dtype=torch.bool)
        mask[(slice(2, 4), slice(4, 8)) if kind == "late" else (slice(0, 2), slice(0, 4))] = True
        return mask
    usage = UsageFile.load(folder / "profile/usage.safetensors")
    assert usage.languages == ("en", "es", "tr")
    if kind == "rise":
        return rise(usage.frequency, [1, 2], BUDGET)
    return esft(usage.mean("gate" if kind == "esft-gate" else "frequency", ["en", "es", "tr"]), TOP_P)


def expected(folder: Path, layout: str, kind: str, rank: int, weight: str) -> bool:
    """Whether a weight of a rank, by its own name ("CHUNK.module....") is trained."""
    at, words = LAYOUTS[layout], weight.split(".")
    if "router" in words:
        return kind == "routers"
    if "local_experts" not in words:
        return False
    stage, ep_rank = rank // (at.ranks // at.pp), rank // at.etp % at.ep
    layer = int(words[words.index("layers") + 1]) + stage * (4 // at.pp)
    expert = int(words[words.index("local_experts") + 1]) + ep_rank * (8 // at.ep)
    return bool(chosen(folder, kind)[layer, expert])


def recorded(folder: Path, row: str) -> list[dict[str, torch.Tensor]]:
    """What each rank recorded."""
    found = [load_file(path) for path in sorted(folder.glob(f"{row}.[0-9].safetensors"))]
    assert found
    return found


def of(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {
        key.removeprefix(f"{kind}."): tensor for key, tensor in tensors.items() if key.startswith(f"{kind}.")
    }


@pytest.mark.parametrize(("layout", "kind", "more"), CASES)
def test_frozen_weights_stay_bit_for_bit_and_the_selected_change(
    runs: Path, layout: str, kind: str, more: tuple[str, ...]
) -> None:
    """Three steps with weight decay and clipping. Gradient buffers hold the selected weights and nothing
    else, the optimizer two moments of them."""
    count = {"trained": 0, "kept": 0}
    for rank, tensors in enumerate(recorded(runs, name(layout, kind, more))):
        before, after, gradients = of(tensors, "start"), of(tensors, "weight"), of(tensors, "gradient")
        should = {
            weight
            for weight in before
            if expected(runs, layout, kind, rank, weight.removeprefix("0.module."))
        }
        assert {weight for weight in before if not torch.equal(before[weight], after[weight])} == should
        assert gradients.keys() == should
        buffers, kept = tensors["elements"].tolist()
        trained = sum(before[weight].numel() for weight in should)
        assert buffers == trained
        if not more:
            assert kept == 2 * trained
        count = {"trained": count["trained"] + trained, "kept": count["kept"] + kept}
    assert count["trained"] > 0
    if more and layout != "tp-ep" and layout != "ep-pp":
        dense_copies = LAYOUTS[layout].ranks // LAYOUTS[layout].pp if kind == "routers" else 1
        assert count["kept"] == 2 * count["trained"] // dense_copies


@pytest.mark.parametrize(("layout", "kind", "more"), CASES)
def test_the_selected_have_the_gradients_of_a_full_run(
    runs: Path, layout: str, kind: str, more: tuple[str, ...]
) -> None:
    if kind == "task-experts":
        pytest.skip("trained with alignment, which the full run has not")
    full = recorded(runs, name(layout, "all"))
    for rank, tensors in enumerate(recorded(runs, name(layout, kind, more))):
        for weight, gradient in of(tensors, "gradient").items():
            reference = full[rank][f"gradient.{weight}"]
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("layout", "more"), [("pp", DISTRIBUTED), ("ep", ()), ("tp", ()), ("tp-ep", ())])
def test_the_gradient_norm_is_that_of_one_rank(runs: Path, layout: str, more: tuple[str, ...]) -> None:
    """The one that Megatron logs and clips by: a sum over the selected weights, each counted once."""
    one, other = (
        outcome(runs, row)["gradient_norms"] for row in (name("one", "rise"), name(layout, "rise", more))
    )
    assert len(one) == 3
    assert min(one) > 0.5  # so that the clipping, which the norm acts through, is at work
    assert other == pytest.approx(one, rel=1e-5)


def test_the_expert_bias_of_a_frozen_router_stays_bit_for_bit(runs: Path) -> None:
    """Megatron starts it at 0 and moves it by the load, not by a gradient; that of a trained router moves."""
    for kind, moves in (("late", False), ("routers", True)):
        (tensors,) = recorded(runs, f"bias-{kind}")
        biases = of(tensors, "bias")
        assert len(biases) == 4
        assert all(bool(bias.any()) == moves for bias in biases.values())


@pytest.mark.parametrize(("layout", "kind", "more"), RESUMED)
def test_resuming_goes_on_bit_for_bit(runs: Path, layout: str, kind: str, more: tuple[str, ...]) -> None:
    """Where a rank, the first or the last, has nothing to train and so no optimizer state to save."""
    through = f"through-{name(layout, kind, more)}"
    for rank, (straight, resumed) in enumerate(
        zip(recorded(runs, through), recorded(runs, f"resumed-{through}"), strict=True)
    ):
        assert of(straight, "weight")
        for weight, tensor in of(straight, "weight").items():
            assert torch.equal(of(resumed, "weight")[weight], tensor), (rank, weight)


@pytest.mark.parametrize(
    ("layout", "kind"), [(layout, kind) for layout, kind, more in RESUMED if more == DISTRIBUTED]
)
def test_the_distributed_optimizer_saves_moments_of_the_selected_alone(
    runs: Path, layout: str, kind: str
) -> None:
    reader = FileSystemReader(runs / f"through-{name(layout, kind, DISTRIBUTED)}" / "iter_0000004")
    entries = reader.read_metadata().state_dict_metadata
    moments = {
        key: entry
        for key, entry in entries.items()
        if "exp_avg" in key and isinstance(entry, TensorStorageMetadata)
    }
    experts = int(chosen(runs, kind).sum()) * 3 * 32 * 32  # two projections in, one out
    assert sum(entry.size.numel() for entry in moments.values()) == 2 * experts


def test_a_selection_is_loaded_back_as_any_checkpoint(runs: Path) -> None:
    """The trained weights lie in the checkpoint where a full run has them: another layout evaluates them."""
    straight = recorded(runs, "through-pp-late")[1]
    one = recorded(runs, "after")[0]
    for weight, tensor in of(straight, "weight").items():
        words = weight.split(".")
        if "layers" in words:
            at = words.index("layers") + 1
            words[at] = str(int(words[at]) + 2)
            assert torch.equal(of(one, "start")[".".join(words)], tensor), weight


@pytest.mark.parametrize("layout", ["tp", "pp", "ep"])
def test_usage_agrees_between_layouts(runs: Path, layout: str) -> None:
    """Counts to the bit, gate weights to rounding."""
    one, other = (
        UsageFile.load(runs / folder / "usage.safetensors") for folder in ("profile", f"profile-{layout}")
    )
    assert one.languages == other.languages == ("en", "es", "tr")
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.frequency, other.frequency)
    torch.testing.assert_close(one.gate, other.gate, rtol=1e-4, atol=1e-6)


def test_usage_is_that_of_the_tokens(runs: Path) -> None:
    usage = UsageFile.load(runs / "profile/usage.safetensors")
    torch.testing.assert_close(usage.frequency.sum(-1), torch.full((3, 4), 2.0))
    # softmax over the chosen two: Megatron's default
    torch.testing.assert_close(usage.gate.sum(-1), torch.ones(3, 4))
    assert ((usage.gate > 0) == (usage.frequency > 0)).all()
    tokenizer = SmallTokenizer((runs / "tokenizer.model").read_bytes())
    rows = load_examples([str(runs / "parallel.jsonl")], split="train,test")
    for place, language in enumerate(usage.languages):
        own = [encode(row, tokenizer) for row in rows if row.language == language]
        assert usage.tokens[place] == sum(len(encoded.ids) - 1 for encoded in own)


def test_the_profile_is_the_same_with_and_without_usage(runs: Path) -> None:
    for file in ("experts.safetensors", "divergence.csv", "priors.safetensors"):
        assert (runs / "profile" / file).read_bytes() == (runs / "profile-plain" / file).read_bytes()
    assert not (runs / "profile-plain/usage.safetensors").exists()


def test_the_start_tells_what_trains(runs: Path) -> None:
    """The same figures in every layout; parameters of the whole model, each counted once."""
    full = sum(tensor.numel() for tensor in of(recorded(runs, "one-all")[0], "start").values())
    for ranks in (1, 2, 4):
        log = (runs / f"ranks{ranks}.log").read_text()
        told = set(re.findall(r"parameters +(\d+) of (\d+)", log))
        assert {int(total) for _, total in told} == {full}
        assert (str(8 * 3 * 32 * 32), str(full)) in told if ranks > 1 else told  # late, early: 8 experts
