"""Laws of merged and intersected expert files, what is refused, and the command that writes them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from ramoe_megatron.artifacts.expert_file import ExpertFile
from ramoe_megatron.artifacts.expert_sets import intersect, merge
from ramoe_megatron.artifacts.tensors import ModelShape
from ramoe_megatron.cli import main
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.divergence import NoZone, Zone
from ramoe_megatron.method.experts import rule_from

SHAPE = ModelShape(num_moe_layers=3, num_experts=4, topk=2, score_function="softmax", hidden_size=8)
TENSORS = ("expert_mask", "delta", "task_frequency", "general_frequency", "layer_number")
Combine = Callable[[Sequence[ExpertFile]], ExpertFile]
both = pytest.mark.parametrize("combine", [merge, intersect])
seeds = st.integers(0, 2**31)


def expert_file(seed: int, *tasks: str, zone: Zone | NoZone | None = None, patterns: tuple[str, ...] = ("last",)) -> ExpertFile:
    """A file as a profile writes it: delta is the difference of its frequencies, a task that English never gets right has no pattern."""
    random = torch.Generator().manual_seed(seed)
    size = (len(tasks or "ab"), 3, 4)
    frequency = 2 * torch.rand(size, generator=random).softmax(-1)
    general = 2 * torch.rand(3, 4, generator=random).softmax(-1)
    counts = [int(n) for n in torch.randint(1, 50, (5,), generator=random)]
    correct = [int(n) for n in torch.randint(0, 3, (len(tasks or "ab"),), generator=random)]
    right = torch.tensor(correct).clamp_max(1)[:, None, None]
    return ExpertFile(
        tasks=tasks or ("a", "b"),
        shape=SHAPE,
        expert_mask=torch.rand(size, generator=random) > 0.5,
        delta=frequency - general,
        task_frequency=frequency,
        general_frequency=general,
        english_pattern={tokens: torch.rand(size, generator=random).softmax(-1) * right for tokens in patterns},
        layer_number=torch.tensor([2, 4, 6]),
        rule={"name": "tau", "tau": 0.3},
        zone=zone or Zone(1, 2, "auto", "floor"),
        checkpoint="base",
        data=({"path": f"{seed}.jsonl", "sha256": "0" * 64},),
        sequences={
            "english_task": dict(zip(tasks or ("a", "b"), counts, strict=False)),
            "english_correct": dict(zip(tasks or ("a", "b"), correct, strict=True)),
            "general": counts[3],
            "pairs": counts[4],
        },
        path=Path(f"{seed}.safetensors"),
    )


def task(file: ExpertFile, name: str) -> dict[str, torch.Tensor]:
    """All tensors of one task."""
    row = file.task_index(name)
    found = {key: getattr(file, key)[row] for key in ("expert_mask", "delta", "task_frequency")}
    return found | {tokens: pattern[row] for tokens, pattern in file.english_pattern.items()}


def equal(a: ExpertFile, b: ExpertFile) -> None:
    """All but rule, path and the texts of zone and checkpoint, task by task."""
    assert set(a.tasks) == set(b.tasks)
    for name in a.tasks:
        mine, theirs = task(a, name), task(b, name)
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(a.general_frequency, b.general_frequency)
    assert a.layer_number.tolist() == b.layer_number.tolist()
    assert a.sequences == b.sequences
    assert isinstance(a.zone, Zone) == isinstance(b.zone, Zone)
    if isinstance(a.zone, Zone) and isinstance(b.zone, Zone):
        assert (a.zone.first, a.zone.last) == (b.zone.first, b.zone.last)
    assert sorted(map(str, a.data)) == sorted(map(str, b.data))


@both
@settings(max_examples=15)
@given(seeds)
def test_a_file_with_itself_is_itself_but_for_the_rule(combine: Combine, seed: int) -> None:
    file = expert_file(seed)
    twice = combine([file, replace(file, path=Path("copy.safetensors"))])
    for key in TENSORS:
        assert torch.equal(getattr(twice, key), getattr(file, key)), key
    assert torch.equal(twice.english_pattern["last"], file.english_pattern["last"])
    for key in ("tasks", "zone", "checkpoint", "data", "sequences", "shape"):
        assert getattr(twice, key) == getattr(file, key)


@both
@settings(max_examples=15)
@given(seeds)
def test_the_order_of_files_does_not_matter_nor_do_repeats(combine: Combine, seed: int) -> None:
    a, b = expert_file(seed, "a", "b", zone=Zone(0, 1, "auto", "")), expert_file(seed + 1, "b", "c")
    equal(combine([a, b]), combine([b, a]))
    equal(combine([a, b]), combine([a, b, a, b]))


@settings(max_examples=15)
@given(seeds)
def test_merging_in_steps_is_merging_at_once(seed: int) -> None:
    """The numbers of sequences carry the weights on. Not so for `intersect`, where a task that is dropped takes nothing along."""
    a, b, c = (expert_file(seed + n, *tasks) for n, tasks in enumerate(["ab", "bc", "ac"]))
    equal(merge([merge([a, b]), c]), merge([a, b, c]))
    equal(merge([a, merge([b, c])]), merge([a, b, c]))


@both
@settings(max_examples=15)
@given(seeds)
def test_delta_keeps_its_definition_and_frequencies_and_patterns_their_sums(combine: Combine, seed: int) -> None:
    made = combine([expert_file(seed, "a", "b"), expert_file(seed + 1, "b", "a", "c")])
    torch.testing.assert_close(made.delta, made.task_frequency - made.general_frequency)
    torch.testing.assert_close(made.task_frequency.sum(-1), torch.full((len(made.tasks), 3), 2.0))
    for name, pattern in zip(made.tasks, made.english_pattern["last"], strict=True):
        expected = 1.0 if made.sequences["english_correct"][name] else 0.0
        torch.testing.assert_close(pattern.sum(-1), torch.full((3,), expected))


@both
def test_files_of_different_anchors_are_refused_and_one_anchor_is_kept(combine: Combine) -> None:
    files = [expert_file(seed, "a", "b") for seed in (1, 2)]
    english, chinese = ([replace(file, anchor=anchor) for file in files] for anchor in ("en", "zh"))
    assert combine(chinese).anchor == "zh"
    assert combine([english[0], files[1]]).anchor is None, "an older file does not say whose pattern it holds"
    with pytest.raises(RamoeError, match=r"1\.safetensors 'en', 2\.safetensors 'zh'\. Give files profiled against one anchor"):
        combine([english[0], chinese[1]])


@settings(max_examples=25)
@given(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
def test_zones_are_covered_and_overlap_as_sets_of_layers(a: int, b: int, c: int, d: int) -> None:
    one, two = Zone(min(a, b), max(a, b), "auto", "one"), Zone(min(c, d), max(c, d), "0-2", "two")
    files = expert_file(1, zone=one), expert_file(2, zone=two)
    layers = [set(range(zone.first, zone.last + 1)) for zone in (one, two)]
    covering, shared = merge(files).zone, intersect(files).zone
    assert isinstance(covering, Zone)
    assert (covering.first, covering.last) == (min(layers[0] | layers[1]), max(layers[0] | layers[1]))
    assert "1.safetensors has" in covering.reason
    if layers[0] & layers[1]:
        assert isinstance(shared, Zone)
        assert set(range(shared.first, shared.last + 1)) == layers[0] & layers[1]
    else:
        assert isinstance(shared, NoZone)
        assert f"do not overlap: 1.safetensors has {one.first}-{one.last}" in shared.reason


def test_files_without_a_zone_are_told() -> None:
    with_zone, without, other = expert_file(1), expert_file(2, zone=NoZone("flat")), expert_file(3, zone=NoZone("rises"))
    assert merge([with_zone, replace(without, zone=with_zone.zone)]).zone == with_zone.zone
    covering = merge([with_zone, without]).zone
    assert isinstance(covering, Zone)
    assert (covering.first, covering.last) == (1, 2)
    assert "2.safetensors has none (flat)" in covering.reason
    for made in (intersect([with_zone, without]), merge([without, other]), intersect([without, other])):
        assert isinstance(made.zone, NoZone)
        assert "2.safetensors has none (flat)" in made.zone.reason
    assert merge([without, replace(other, zone=without.zone)]).zone == NoZone("flat")


def test_patterns_that_a_file_lacks_are_left_out() -> None:
    files = expert_file(1, "a", patterns=("prompt", "last", "response")), expert_file(2, "b", patterns=("last", "all", "prompt"))
    assert list(merge(files).english_pattern) == ["prompt", "last"]


def test_checkpoints_and_data_of_all_files_are_kept() -> None:
    a, b, c = (expert_file(n) for n in range(3))
    made = merge([a, replace(b, checkpoint="later"), replace(c, data=a.data)])
    assert made.checkpoint == "base + later"
    assert [entry["path"] for entry in made.data] == ["0.jsonl", "1.jsonl"]


@both
def test_other_models_are_refused_with_the_difference(combine: Combine) -> None:
    file = expert_file(1)
    with pytest.raises(RamoeError, match=r"1\.safetensors and 2\.safetensors: made from different models: topk is 2 and 1"):
        combine([file, replace(expert_file(2), shape=replace(SHAPE, topk=1))])
    with pytest.raises(RamoeError, match=r"layer_number is \[2, 4, 6\] and \[1, 2, 3\]"):
        combine([file, replace(expert_file(2), layer_number=torch.tensor([1, 2, 3]))])
    with pytest.raises(RamoeError, match="found 1 expert file, expected two or more"):
        combine([file])
    with pytest.raises(RamoeError, match=r"2\.safetensors: sequences lacks the number english_correct of task 'a'"):
        combine([file, replace(expert_file(2), sequences={"english_task": {"a": 1, "b": 1}, "general": 1})])


def test_an_intersection_without_common_tasks_is_refused() -> None:
    with pytest.raises(RamoeError, match=r"no task in common \(1\.safetensors has a; 2\.safetensors has b, c\)"):
        intersect([expert_file(1, "a"), expert_file(2, "b", "c")])


def test_a_rule_of_rules_survives_its_file_entry_and_a_broken_one_is_refused() -> None:
    a, b, c = (expert_file(n) for n in range(3))
    entry = intersect([merge([a, b]), c]).rule
    assert rule_from(entry).as_dict() == entry
    for broken in ({"name": "merge"}, {"name": "merge", "of": [{"file": "a"}]}, {"name": "merge", "of": ["a"]}):
        with pytest.raises(RamoeError, match=r"rule: found .*expected `of` with a file and a rule each"):
            rule_from(broken)


def ramoe(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_writes_a_file_that_is_read_and_shown_and_never_overwrites(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "new" / "c.safetensors"
    files = replace(expert_file(1), expert_mask=torch.ones(2, 3, 4, dtype=torch.bool)), replace(expert_file(2))
    chosen = torch.zeros(2, 3, 4, dtype=torch.bool)
    chosen[:, :2, 1] = True
    files[0].save(a)
    replace(files[1], expert_mask=chosen).save(b)
    done = ramoe("experts", "intersect", a, b, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"{out}: tasks a, b; 4 task experts; zone MoE layers 1 to 2" in done.output
    assert done.output.count("chooses no expert in 1 of 3 MoE layers (2)") == 2
    made = ExpertFile.load(out)
    equal(made, intersect([ExpertFile.load(a), ExpertFile.load(b)]))
    assert made.rule["of"] == [{"file": str(path), "rule": {"name": "tau", "tau": 0.3}} for path in (a, b)]
    shown = ramoe("inspect", out)
    assert shown.exit_code == 0, shown.output
    assert "intersect of" in shown.output
    before = out.read_bytes()
    again = ramoe("experts", "merge", a, b, "--out", out)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert out.read_bytes() == before
