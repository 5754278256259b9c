"""Laws of the labels: which samples are aligned, their weights and targets, and errors for wrong data."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_rows import example
from hypothesis import given
from hypothesis import strategies as st
from label_files import EXAMPLES, TASKS, TOKENIZER, category, config

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import write_taxonomy
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.data.dataset import SFTDataset
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.labels import AlignedDataset, shuffled_ids
from ramoe_megatron.method.categories import TaxonomyRow


def dataset(
    files: dict[str, str], draws: int = 64, batch: int = 8, per_token: bool = False, **changes: Any
) -> AlignedDataset:
    return AlignedDataset(
        SFTDataset(EXAMPLES, TOKENIZER, 40, draws, 3), config(files, **changes), "en", batch, per_token
    )


@pytest.mark.parametrize(
    ("examples", "chosen"), [("ci", {"ci"}), ("ci+cc", {"ci", "cc"}), ("all", {"cc", "ci", "ic", "ii"})]
)
def test_aligned_are_the_target_views_of_the_chosen_categories(
    files: dict[str, str], examples: str, chosen: set[str]
) -> None:
    found = dataset(files, examples=examples)
    for e, on in zip(EXAMPLES, found.labels.aligned, strict=True):
        assert on == (e.language != "en" and category(e.id, e.language) in chosen)


def test_without_a_taxonomy_all_target_views_are_aligned(files: dict[str, str]) -> None:
    found = dataset(files, examples="all", taxonomy=None)
    assert found.labels.aligned.tolist() == [e.language != "en" for e in EXAMPLES]


def test_items_say_which_are_ci_whatever_is_aligned(files: dict[str, str]) -> None:
    found = dataset(files, examples="all")
    for draw in range(len(found)):
        e = EXAMPLES[int(found.dataset.order[draw])]
        assert bool(found[draw]["ramoe_ci"]) == (e.language != "en" and category(e.id, e.language) == "ci")
    assert "ramoe_ci" not in dataset(files, examples="all", taxonomy=None)[0]


def test_an_item_carries_its_own_english_routing(files: dict[str, str]) -> None:
    found, priors = dataset(files), Priors.load(files["priors"])
    seen = set()
    for draw in range(len(found)):
        item, index = found[draw], int(found.dataset.order[draw])
        e, on = EXAMPLES[index], bool(found.labels.aligned[index])
        assert (int(item["ramoe_task"]), float(item["ramoe_weight"])) == (TASKS.index(e.task), float(on))
        expected = priors.rows([e.id])[0, 1:3] if on else torch.zeros(2, 8)
        assert torch.equal(item["ramoe_target"], expected)
        seen.add(on)
    assert seen == {True, False}
    assert (
        "ramoe_target"
        not in dataset(files, target="profile", priors=None, layers="1-2", examples="ci", **no_sum(files))[0]
    )


def no_sum(files: dict[str, str]) -> dict[str, str]:
    """A taxonomy by which no example of the task "sum" is aligned."""
    rows = [json.loads(line) for line in Path(files["taxonomy"]).read_text().splitlines()]
    kept = [
        TaxonomyRow(
            r["id"], r["task"], r["language"], r["split"], r["english_correct"] and r["task"] != "sum", False
        )
        for r in rows
    ]
    path = Path(files["folder"]) / "no_sum.jsonl"
    write_taxonomy(path, kept)
    return {"taxonomy": str(path)}


def test_a_loader_process_reads_the_same(files: dict[str, str]) -> None:
    found = dataset(files)
    copy = pickle.loads(pickle.dumps(found))
    workers = torch.utils.data.DataLoader(found, batch_size=8, num_workers=2)
    for number, batch in enumerate(workers):
        for row in range(8):
            for one in (found[8 * number + row], copy[8 * number + row]):
                assert all(torch.equal(batch[key][row], value) for key, value in one.items())


@given(st.integers(0, 2**31), st.lists(st.booleans(), min_size=len(EXAMPLES), max_size=len(EXAMPLES)))
def test_shuffled_targets_are_a_derangement_within_a_task(seed: int, on: list[bool]) -> None:
    ids = list(shuffled_ids(EXAMPLES, np.array(on), seed))
    assert ids == list(shuffled_ids(EXAMPLES, np.array(on), seed))
    task_of = {e.id: e.task for e in EXAMPLES}
    for task in TASKS:
        own = {
            e.id: other
            for e, other, aligned in zip(EXAMPLES, ids, on, strict=True)
            if aligned and e.task == task
        }
        # a permutation of the aligned examples, the same for all languages of an id
        assert set(own.values()) == set(own)
        assert len(own) < 2 or all(other != id_ for id_, other in own.items())
        assert all(task_of[other] == task for other in own.values())
    plain = list(shuffled_ids(EXAMPLES, np.array(on), None))
    assert plain == [e.id for e in EXAMPLES]


def test_the_shuffle_reaches_the_items(files: dict[str, str]) -> None:
    plain, moved = dataset(files), dataset(files, shuffle_targets=5)
    for draw in range(len(plain)):
        aligned = float(plain[draw]["ramoe_weight"]) > 0
        assert torch.equal(plain[draw]["ramoe_target"], moved[draw]["ramoe_target"]) == (not aligned)


def test_ids_that_the_shuffle_cannot_move_are_counted(files: dict[str, str]) -> None:
    """A task with one aligned id keeps its target. It is an error if all tasks are like this."""
    assert dataset(files).labels.unshuffled == dataset(files, shuffle_targets=5).labels.unshuffled == 0

    def few(*ids: str) -> AlignedDataset:
        data = SFTDataset([e for e in EXAMPLES if e.id in ids], TOKENIZER, 40, 8, 3)
        return AlignedDataset(data, config(files, examples="all", taxonomy=None, shuffle_targets=5), "en", 8)

    found = few("currency/0", "currency/1", "sum/1")
    assert found.labels.unshuffled == 1
    for e, target, on in zip(
        found.dataset.examples, found.labels.target_ids, found.labels.aligned, strict=True
    ):
        assert not on or (target == e.id) == (e.id == "sum/1")
    with pytest.raises(
        RamoeError, match=r"--ramoe-shuffle-targets 5 shuffles nothing: each of the 2 aligned ids"
    ):
        few("currency/0", "sum/1")


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("batch", [4, 8, 24])
def test_normalize_ci_averages_to_one_over_each_global_batch(
    files: dict[str, str], batch: int, per_token: bool
) -> None:
    found = dataset(files, 96, batch, per_token, normalize="ci")
    unit = found.dataset.encoded.loss_tokens[found.dataset.order] if per_token else np.ones(96)
    weight, aligned = (
        found.weight.reshape(-1, batch),
        found.labels.aligned[found.dataset.order].reshape(-1, batch),
    )
    for weights, units, on in zip(weight, unit.reshape(-1, batch), aligned, strict=True):
        assert ((weights > 0) == on).all()
        assert len(set(weights[on])) <= 1
        expected = 1.0 if on.any() else 0.0
        assert (weights * units).sum() / units.sum() == pytest.approx(expected)
    longer = dataset(files, 96 + batch, batch, per_token, normalize="ci")
    assert np.array_equal(longer.weight[:96], found.weight)  # a resumed or longer run weighs its draws alike


def test_examples_that_the_taxonomy_lacks_are_counted(files: dict[str, str]) -> None:
    with pytest.raises(
        RamoeError,
        match=r"short.jsonl: 16 training examples have no category, "
        r"first currency/0 \(tr\).*currency/4 \(tr\)",
    ):
        dataset(files, taxonomy=files["short"])


def test_aligned_examples_without_a_prior_are_counted(files: dict[str, str]) -> None:
    message = r"few.safetensors: no English routing for 2 aligned examples, first currency/1, sum/5; run"
    with pytest.raises(RamoeError, match=message):
        dataset(files, priors=files["few"])


def test_a_task_without_experts_is_named(files: dict[str, str]) -> None:
    extra = [*EXAMPLES, example("capital/1", "es", "capital")]
    data = SFTDataset(extra, TOKENIZER, 40, 8, 3)
    with pytest.raises(
        RamoeError, match=r"no experts for the tasks capital of the training data; the file has currency, sum"
    ):
        AlignedDataset(data, config(files, examples="all", taxonomy=None), "en", 8)
    anchor = SFTDataset([*EXAMPLES, example("text/1", "en", "text")], TOKENIZER, 40, 8, 3)
    found = AlignedDataset(anchor, config(files), "en", 8)
    assert found.labels.task[-1] == -1  # what is not aligned needs no experts


def test_a_task_without_an_english_pattern_is_named(files: dict[str, str]) -> None:
    with pytest.raises(RamoeError, match="task 'sum' has no English-correct example"):
        dataset(files, target="profile", priors=None)


@pytest.mark.parametrize(
    ("said", "target", "refused"),
    [("en", "profile", False), (None, "profile", False), ("tr", "example", False), ("tr", "profile", True)],
)
def test_patterns_of_another_anchor_are_no_target(
    files: dict[str, str], said: str | None, target: str, refused: bool
) -> None:
    path = Path(files["folder"]) / f"of-{said}.safetensors"
    own = ExpertFile.load(files["experts"])
    patterns = {"last": own.english_pattern["last"][:1].expand(2, -1, -1).clone()}
    replace(own, anchor=said, english_pattern=patterns).save(path)
    changes = {"experts": str(path), "target": target} | ({"priors": None} if target == "profile" else {})
    if refused:
        with pytest.raises(
            RamoeError, match=r"of-tr.safetensors: .* anchor 'tr', but --ramoe-anchor is 'en'"
        ):
            dataset(files, **changes)
    else:
        assert len(dataset(files, **changes))


def test_priors_of_other_tokens_or_another_model_are_told(files: dict[str, str]) -> None:
    with pytest.raises(RamoeError, match=r"pooled over the tokens 'last', but --ramoe-tokens is 'all'"):
        dataset(files, tokens="all")
    path = Path(files["folder"]) / "other.safetensors"
    shape = ModelShape(num_moe_layers=4, num_experts=4, topk=2, score_function="softmax", hidden_size=16)
    Priors.save(path, ["a"], torch.full((1, 4, 4), 0.25), tokens="last", shape=shape, checkpoint="x@1")
    with pytest.raises(RamoeError, match="num_experts is 4 in the file, 8 in the model"):
        dataset(files, priors=str(path))
