"""Errors in the data of a training run are reported from the parsed arguments, before a model is built."""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_rows import SmallTokenizer

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.artifacts.priors import Priors
from ramoe_megatron.artifacts.records import taxonomy_rows, write_taxonomy
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.labels import categories
from ramoe_megatron.mcore.arguments import DataOptions, RoutingAlignmentConfig
from ramoe_megatron.mcore.train.datasets import TrainingInputs, check_data
from ramoe_megatron.method.categories import TaxonomyRow
from ramoe_megatron.method.divergence import Zone

IDS = [f"sum/{number}" for number in range(9)]
TOKENIZER = SmallTokenizer()
SHAPE = ModelShape(num_moe_layers=4, num_experts=4, topk=2, score_function="softmax", hidden_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    rows = [
        {"id": id_, "language": language, "task": "sum", "prompt": "1 + 1 =", "response": "2", "answer": "2",
         "split": "train"}
        for id_ in IDS for language in ("en", "tr")
    ]  # fmt: skip
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    even = torch.full((1, 4, 4), 0.25)
    ExpertFile(
        tasks=("sum",), shape=SHAPE, expert_mask=torch.tensor([True, True, False, False]).expand(1, 4,
                                                                                                 4).clone(),
        delta=torch.zeros(1, 4, 4), task_frequency=even * 2, general_frequency=even[0] * 2,
        english_pattern={"last": even, "all": even},
        layer_number=torch.arange(1, 5), rule={"name": "top-m", "m": 2}, zone=Zone(1, 2, "1-2", "given"),
        checkpoint="base@1",
    ).save(path / "experts.safetensors")  # fmt: skip
    Priors.save(
        path / "priors.safetensors",
        IDS[:2],
        even.expand(2, 4, 4).clone(),
        tokens="last",
        shape=SHAPE,
        checkpoint="base@1",
    )
    write_taxonomy(
        path / "taxonomy.jsonl", [TaxonomyRow(id_, "sum", "tr", "train", True, False) for id_ in IDS]
    )
    write_taxonomy(
        path / "several.jsonl", [TaxonomyRow(id_, "sum", "tr", "train", True, False) for id_ in IDS]
    )
    body = {
        "anchor": "en",
        "anchors": ["en", "tr"],
        "checkpoint": "base@1",
        "data": [],
        "package_version": "0",
        "pairs": [],
    }
    save_document(path / "several.json", "ramoe-taxonomy", body)
    write_taxonomy(path / "short.jsonl", [TaxonomyRow(IDS[0], "sum", "tr", "train", True, False)])
    return path


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> SmallTokenizer:
    """As Megatron's parser leaves it, for `get_tokenizer()`."""
    from megatron.training import global_vars

    monkeypatch.setattr(global_vars, "_GLOBAL_TOKENIZER", TOKENIZER)
    return TOKENIZER


def arguments(folder: Path, **changes: Any) -> types.SimpleNamespace:
    """As Megatron's parser leaves them, as far as the check reads them."""
    options = {
        field: getattr(config(), field)
        for config in (DataOptions, RoutingAlignmentConfig)
        for field in vars(config())
    }
    files = {"experts": "experts.safetensors", "taxonomy": "taxonomy.jsonl"}
    options |= {"data": [str(folder / "train.jsonl")], "coeff": 1.0} | {
        key: str(folder / name) for key, name in files.items()
    }
    settings = {f"ramoe_{name}": value for name, value in options.items()}
    megatron = {
        "eval_iters": 0,
        "full_validation": False,
        "micro_batch_size": 1,
        "rampup_batch_size": None,
        "dataloader_type": "single",
    }
    megatron |= {
        "step_batch_size_schedule": None,
        "calculate_per_token_loss": False,
        "context_parallel_size": 1,
    }
    megatron |= {"overlap_param_gather": False, "moe_input_jitter_eps": None, "seq_length": 40}
    megatron |= {
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": None,
        "seed": 7,
        "max_position_embeddings": 48,
    }
    return types.SimpleNamespace(**settings | megatron | changes)


def test_data_that_fits_is_let_through(folder: Path) -> None:
    check_data(arguments(folder))
    check_data(arguments(folder, ramoe_pack=True))
    check_data(arguments(folder, ramoe_refresh_interval=2))
    check_data(arguments(folder, ramoe_taxonomy=str(folder / "several.jsonl")))
    check_data(arguments(folder, ramoe_target="paired", ramoe_reverse=True, micro_batch_size=2))
    check_data(
        arguments(
            folder, ramoe_coeff=0.0, ramoe_experts=None, micro_batch_size=4, rampup_batch_size=[1, 1, 10]
        )
    )


def test_fewer_ids_are_the_same_for_every_method_and_other_seeds_draw_others(folder: Path) -> None:
    drawn = []
    for seed in range(8):
        plain = {"ramoe_coeff": 0.0, "ramoe_experts": None}
        given = [{"ramoe_ids_per_task": 3, "seed": seed, **changes} for changes in ({}, plain)]
        aligned, sft = (TrainingInputs(arguments(folder, **each)) for each in given)
        ids = {example.id for example in sft.examples}
        assert [e.id for e in aligned.examples] == [e.id for e in sft.examples]
        assert (len(ids), len(sft.examples)) == (3, 6)
        assert len(aligned.labels.aligned) == 6
        drawn.append(frozenset(ids))
    assert len(set(drawn)) > 1
    check_data(arguments(folder, ramoe_ids_per_task=3))
    check_data(arguments(folder, ramoe_ids_per_task=3, ramoe_target="paired", micro_batch_size=2))
    check_data(arguments(folder, ramoe_ids_per_task=3, ramoe_refresh_interval=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ramoe_ids_per_task": 0}, ["--ramoe-ids-per-task 0", "1 or more"]),
        ({"ramoe_ids_per_task": 10}, ["--ramoe-ids-per-task", "split 'train'", "task 'sum' has 9"]),
        ({"ramoe_data": []}, ["--ramoe-data is missing"]),
        ({"ramoe_split": "dev"}, ["empty split 'dev'", "train (18 rows)"]),
        ({"ramoe_languages": ["sw"]}, ["unknown language 'sw'", "tr (9 rows)"]),
        ({"eval_iters": 100}, ["--eval-iters 100", "'validation'", "--eval-iters 0"]),
        ({"eval_iters": 1, "full_validation": True}, ["--full-validation", "remove"]),
        ({"ramoe_pack": True, "micro_batch_size": 2},
         ["--ramoe-pack", "--micro-batch-size 2", "--micro-batch-size 1"]),
        ({"ramoe_pack": True, "rampup_batch_size": [1, 1, 10]},
         ["--ramoe-pack", "--rampup-batch-size", "leave it out"]),
        ({"ramoe_normalize": "ci", "dataloader_type": "cyclic"},
         ["--ramoe-normalize ci", "--dataloader-type"]),
        ({"ramoe_normalize": "ci", "step_batch_size_schedule": "0:8 10:16"},
         ["--step-batch-size-schedule", "--ramoe-normalize samples"]),
        ({"ramoe_target": "paired", "ramoe_reverse": True, "micro_batch_size": 2,
          "calculate_per_token_loss": True},
         ["--ramoe-reverse", "--calculate-per-token-loss"]),
        ({"ramoe_refresh_interval": 2, "moe_input_jitter_eps": 0.01},
         ["--ramoe-refresh-interval", "--moe-input-jitter-eps 0.01"]),
        ({"ramoe_refresh_interval": 2, "ramoe_taxonomy": "several.jsonl"},
         ["--ramoe-refresh-interval", "--ramoe-taxonomy", "'en', 'tr'"]),
        ({"seq_length": 3}, ["18 of 18 examples are longer than --seq-length 3", "--seq-length to at least"]),
        ({"seq_length": 3, "ramoe_pack": True}, ["18 of 18 examples are longer than --seq-length 3"]),
        ({"ramoe_layers": "3-9"}, ["3-9", "0 to 3"]),
        ({"ramoe_taxonomy": "short.jsonl"}, ["short.jsonl", "8 training examples have no category",
                                             "sum/1 (tr)"]),
        ({"ramoe_target": "example", "ramoe_priors": "priors.safetensors"},
         ["priors.safetensors", "no English routing for 7 aligned examples", ", ".join(IDS[2:7]),
          "ramoe profile --ramoe-save-priors"]),
        ({"ramoe_target": "example", "ramoe_priors": "priors.safetensors", "ramoe_tokens": "all"},
         ["'last'", "'all'"]),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_told(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    paths = {
        key: str(folder / value)
        for key, value in changes.items()
        if str(value).endswith(("jsonl", "safetensors"))
    }
    with pytest.raises(RamoeError) as error:
        check_data(arguments(folder, **changes | paths))
    for word in words:
        assert word in str(error.value), error.value


def test_validation_examples_and_the_views_of_pairs_must_fit_too(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    long = "1 + 1 = " * 20 + "1 + 1 ="
    for changed, changes in (
        ([*rows, {**rows[0], "id": "sum/v", "split": "validation", "prompt": long}], {"eval_iters": 1}),
        (
            [{**row, "prompt": long} if row["language"] == "en" else row for row in rows],
            {"ramoe_languages": ["tr"], "ramoe_target": "paired", "micro_batch_size": 2},
        ),
    ):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(RamoeError, match="examples are longer than --seq-length 40"):
            check_data(arguments(folder, ramoe_data=[str(tmp_path / "rows.jsonl")], **changes))


def test_a_second_start_reads_the_taxonomy_only_if_it_has_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taxonomy, read = tmp_path / "taxonomy.jsonl", []

    def counted(path: str) -> Iterator[TaxonomyRow]:
        read.append(path)
        return taxonomy_rows(path)

    def started(right: str) -> list[str]:
        rows = [TaxonomyRow(id_, "sum", "tr", "train", True, id_ == right) for id_ in IDS]
        write_taxonomy(taxonomy, rows)
        given = arguments(folder, ramoe_taxonomy=str(taxonomy), data_cache_path=str(tmp_path / "cache"))
        labels = TrainingInputs(given).labels
        expected = categories(TrainingInputs(given).held, str(taxonomy), "en").tolist()
        assert labels.category.tolist() == expected
        return expected

    monkeypatch.setattr("ramoe_megatron.mcore.align.labels.taxonomy_rows", counted)
    first = started(IDS[0])
    assert started(IDS[0]) == first
    assert len(read) == 3  # `categories` of this test twice, and the first start
    other = started(IDS[1])
    assert len(read) == 5
    assert sorted(other) == sorted(first)
    assert other != first


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "eod", -1)
    with pytest.raises(RamoeError, match="has no end token"):
        check_data(arguments(folder))
