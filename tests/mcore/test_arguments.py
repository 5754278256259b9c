"""Our flags through Megatron's real parser, and what the configuration refuses."""

import argparse
import dataclasses
from typing import Any, Literal, get_origin, get_type_hints

import pytest

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.jobs.evaluate import EvaluateOptions
from ramoe_megatron.jobs.offline_job import OfflineOptions
from ramoe_megatron.jobs.predict import PredictOptions
from ramoe_megatron.jobs.profile import ProfileOptions
from ramoe_megatron.mcore.arguments import (
    DataOptions,
    RoutingAlignmentConfig,
    add_arguments,
    arguments_with,
)
from ramoe_megatron.mcore.flags import options_from_args
from ramoe_megatron.mcore.select.selective_options import SelectiveOptions

ON: dict[str, Any] = {"coeff": 1.0, "experts": "e.safetensors", "taxonomy": "t.jsonl"}


def parse(*words: str, provider: Any = add_arguments) -> argparse.Namespace:
    from megatron.training.arguments import add_megatron_arguments

    parser = provider(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return parser.parse_args(list(words))


def test_without_flags_alignment_is_off() -> None:
    args = parse()
    assert RoutingAlignmentConfig.from_args(args) == RoutingAlignmentConfig()
    assert RoutingAlignmentConfig().coeff == 0
    assert options_from_args(DataOptions, args) == DataOptions()
    assert options_from_args(SelectiveOptions, args) == SelectiveOptions()


def test_every_flag_reaches_its_field() -> None:
    words = (
        "--lr 1e-3 --ramoe-coeff 2.5 --ramoe-experts e --ramoe-taxonomy t --ramoe-priors p "
        "--ramoe-divergence js --ramoe-target example --ramoe-layers 2-5 --ramoe-tokens last "
        "--ramoe-pooling token --ramoe-examples ci+cc --ramoe-normalize ci --ramoe-shuffle-targets 3 "
        "--ramoe-data a.jsonl b --ramoe-split dev --ramoe-languages en tr --ramoe-anchor eng "
        "--ramoe-columns prompt=text --ramoe-weights */en=0.4 *=0.6 --ramoe-missing-priors skip "
        "--ramoe-layer-weights d.csv --ramoe-coeff-warmup-iters 9 --ramoe-coeff-decay cosine "
        "--ramoe-coeff-unit lm-loss"
    )
    args = parse(*words.split())
    assert RoutingAlignmentConfig.from_args(args) == RoutingAlignmentConfig(
        coeff=2.5, experts="e", taxonomy="t", priors="p", divergence="js", target="example", layers="2-5",
        tokens="last",
        pooling="token", examples="ci+cc", normalize="ci", shuffle_targets=3, missing_priors="skip",
        layer_weights="d.csv",
        coeff_warmup_iters=9, coeff_decay="cosine", coeff_unit="lm-loss",
    )  # fmt: skip
    data = options_from_args(DataOptions, args)
    assert data == DataOptions(
        ["a.jsonl", "b"], "dev", ["en", "tr"], "eng", ["prompt=text"], ["*/en=0.4", "*=0.6"]
    )
    words = "--ramoe-train rise --ramoe-usage u --ramoe-train-budget 12 --ramoe-train-split 3 4 5"
    assert options_from_args(SelectiveOptions, parse(*words.split())) == SelectiveOptions(
        "rise", "u", 12, [3, 4, 5]
    )
    words = "--ramoe-train esft-gate --ramoe-usage u --ramoe-train-top-p 0.2"
    assert options_from_args(SelectiveOptions, parse(*words.split())) == SelectiveOptions(
        "esft-gate", "u", train_top_p=0.2
    )
    assert data.column_mapping() == {"prompt": "text"}
    assert data.weight_mapping() == {"*/en": 0.4, "*": 0.6}


@pytest.mark.parametrize("job", [(), (EvaluateOptions,), (ProfileOptions,), (PredictOptions,)])
def test_every_field_has_a_help_text_that_prints(job: tuple[type, ...]) -> None:
    groups = (
        (DataOptions, OfflineOptions, *job)
        if job
        else (RoutingAlignmentConfig, DataOptions, SelectiveOptions)
    )
    # of ours alone: Megatron 0.19 cannot print all of its own help
    parser = arguments_with(*groups)(argparse.ArgumentParser())
    told = parser.format_help()
    helps = {action.dest: action.help for action in parser._actions}
    for group in groups:
        for field in dataclasses.fields(group):
            flag = "--ramoe-" + field.name.replace("_", "-")
            assert flag in told
            text = helps[f"ramoe_{field.name}"] or ""
            assert text.split(" (default:")[0].strip() not in ("", "None"), flag


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coeff": -1.0}, ["--ramoe-coeff -1.0", ">= 0"]),
        ({"coeff": float("nan")}, ["--ramoe-coeff nan"]),
        ({"coeff": float("inf")}, ["--ramoe-coeff inf", "finite"]),
        ({"experts": None}, ["--ramoe-experts", "ramoe profile"]),
        ({"taxonomy": None}, ["--ramoe-taxonomy", "ramoe taxonomy"]),
        ({"target": "example"}, ["--ramoe-priors", "--ramoe-save-priors"]),
        ({"shuffle_targets": 1}, ["--ramoe-shuffle-targets", "--ramoe-target example"]),
        ({"pooling": "mean"}, ["--ramoe-pooling 'mean'", "sequence, token"]),
        ({"normalize": "none"}, ["--ramoe-normalize 'none'", "samples, ci"]),
        ({"tokens": "first"}, ["--ramoe-tokens 'first'", "prompt, response, all, last"]),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RamoeError) as error:
        RoutingAlignmentConfig(**{**ON, **change})
    for word in words:
        assert word in str(error.value)


def test_off_asks_for_nothing_and_all_for_no_taxonomy() -> None:
    # a recipe may keep its settings for the SFT baseline
    RoutingAlignmentConfig(coeff=0.0, target="example", shuffle_targets=1)
    RoutingAlignmentConfig(**{**ON, "taxonomy": None, "examples": "all"})


@pytest.mark.parametrize("value", ["prompt", "=text", "prompt="])
def test_pairs_need_both_sides(value: str) -> None:
    with pytest.raises(RamoeError, match="--ramoe-columns"):
        DataOptions(columns=[value]).column_mapping()


def test_weights_are_numbers_and_patterns_may_hold_an_equals_sign() -> None:
    assert DataOptions(weights=["a=b/*=2"]).weight_mapping() == {"a=b/*": 2.0}
    with pytest.raises(RamoeError, match=r"--ramoe-weights.*PATTERN=NUMBER"):
        DataOptions(weights=["*/en=half"]).weight_mapping()


def test_remembered_docstrings_make_the_same_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    from ramoe_megatron.mcore import compat

    def helps() -> dict[str, str | None]:
        parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
        return {action.dest: action.help for action in parser._actions}

    read = helps()
    # put back afterwards
    monkeypatch.setattr(
        ArgumentGroupFactory, "_get_field_docstrings", ArgumentGroupFactory._get_field_docstrings
    )
    compat.remember_docstrings()
    assert helps() == read
    assert helps() == read


def test_a_refused_value_is_told_with_its_flag() -> None:
    """As it is typed: Megatron's parser knows every flag that a refusal names."""
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {flag for action in parser._actions for flag in action.option_strings}
    kinds = get_type_hints(RoutingAlignmentConfig)
    checked = [name for name, kind in kinds.items() if get_origin(kind) is Literal]
    assert "missing_priors" in checked
    for name in checked:
        with pytest.raises(RamoeError) as refused:
            RoutingAlignmentConfig(**{name: "nothing"})
        flag = str(refused.value).split()[0]
        assert flag in known
        assert flag.removeprefix("--ramoe-").replace("-", "_") == name
