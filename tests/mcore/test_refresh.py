"""Laws of the taxonomy refresh: files of a resumed run, rejected taxonomies, and length limits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_rows import SmallTokenizer, example
from router_chunk import Chunk, batch

from ramoe_megatron.artifacts.files import save_document
from ramoe_megatron.artifacts.records import write_taxonomy
from ramoe_megatron.data.parallel import Example
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.train.refresh import (
    FOLDER,
    TaxonomyRefresh,
    refuse_other_anchors,
    refuse_refresh,
    refuse_unanswerable,
)
from ramoe_megatron.method.categories import TaxonomyRow

TOKENIZER = SmallTokenizer()
IDS = ("q1", "q2", "q3")
VIEWS = [example(id_) for id_ in IDS]
TARGETS = [example(id_, "es") for id_ in IDS]


@pytest.fixture
def refresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run on one rank that starts or goes on at an iteration: its refresh."""

    def started(
        iteration: int, load: Path | None = None, save: Path | None = None, interval: int = 2, rank: int = 0,
        positions: int = 48,
        targets: list[Example] = TARGETS, views: list[Example] = VIEWS,
    ) -> TaxonomyRefresh:  # fmt: skip
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        config = RoutingAlignmentConfig(coeff=1.0, experts="e", taxonomy="t", refresh_interval=interval)
        labels = SimpleNamespace(
            config=config,
            category=np.array(["ii"] * len(targets)),
            may_align=np.ones(len(targets), dtype=bool),
        )
        paths = {"load": load and str(load), "save": save and str(save)}
        args = SimpleNamespace(
            iteration=iteration, train_iters=10, max_position_embeddings=positions, **paths
        )
        return TaxonomyRefresh([torch.nn.Linear(1, 1)], labels, targets, views, args)

    return started


def scored(folder: Path, iteration: int, id_: str, target: bool = False, english: bool = True) -> None:
    write_taxonomy(
        folder / FOLDER / f"{iteration:07d}.jsonl",
        [TaxonomyRow(id_, "currency", "es", "train", english, target)],
    )


def test_categories_go_from_run_to_run_through_their_folders(refresh: Any, tmp_path: Path) -> None:
    """A goes on as B and B as C, each in a folder of its own, and each scores one example more."""
    a, b, c = (tmp_path / name for name in "abc")
    scored(a, 2, "q1")
    scored(a, 4, "q2")  # after the checkpoint that B goes on from: not B's
    assert refresh(3, a, b).category == ["ci", "ii", "ii"]
    scored(b, 4, "q3", target=True)
    assert refresh(5, b, c).category == refresh(5, c).category == ["ci", "ii", "cc"]
    assert [sorted(path.name for path in (x / FOLDER).iterdir()) for x in (b, c)] == [
        ["0000002.jsonl", "0000004.jsonl"]
    ] * 2


def test_what_an_earlier_attempt_left_in_the_new_folder_gives_way(refresh: Any, tmp_path: Path) -> None:
    scored(tmp_path / "a", 2, "q1")
    scored(tmp_path / "b", 2, "q2", target=True)
    assert (
        refresh(3, tmp_path / "a", tmp_path / "b").category
        == refresh(3, tmp_path / "b").category
        == ["ci", "ii", "ii"]
    )


def test_files_of_another_interval_are_told_and_not_taken_over(
    refresh: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(tmp_path / "a", 2, "q1")
    scored(tmp_path / "a", 3, "q2")
    assert refresh(5, tmp_path / "a", tmp_path / "b", interval=3).category == ["ii", "ci", "ii"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "0000002.jsonl: not used" in line
    assert "--ramoe-refresh-interval 3" in line
    assert [path.name for path in (tmp_path / "b" / FOLDER).iterdir()] == ["0000003.jsonl"]
    assert refresh(5, tmp_path / "a", interval=1).category == ["ci", "ci", "ii"]
    assert capsys.readouterr().out == ""


def test_one_rank_alone_keeps_and_tells(
    refresh: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(tmp_path / "a", 2, "q1")
    scored(tmp_path / "a", 3, "q2")
    assert refresh(5, tmp_path / "a", tmp_path / "b", rank=1).category == ["ci", "ii", "ii"]
    assert not (tmp_path / "b").exists()
    assert capsys.readouterr().out == ""


def test_a_run_from_the_start_takes_over_nothing(refresh: Any, tmp_path: Path) -> None:
    scored(tmp_path, 2, "q1")
    assert refresh(0, tmp_path, tmp_path).category == ["ii"] * 3


def test_examples_of_other_data_are_named(refresh: Any, tmp_path: Path) -> None:
    scored(tmp_path, 2, "q9")
    with pytest.raises(RamoeError, match=r"0000002.jsonl: q9 \(es\) is not a training example"):
        refresh(3, tmp_path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def document(path: Path, kind: str, **body: Any) -> None:
    save_document(path, kind, {"checkpoint": "base@1", "data": [], "package_version": "0", **body})


@pytest.mark.parametrize("anchors", [["en", "es"], ["es"]])
def test_a_taxonomy_of_other_anchors_is_refused(tmp_path: Path, anchors: list[str]) -> None:
    path = tmp_path / "taxonomy.jsonl"
    refuse_other_anchors(str(path), "en")  # nothing tells
    document(tmp_path / "taxonomy.json", "ramoe-taxonomy", anchor=anchors[0], anchors=anchors, pairs=[])
    with pytest.raises(RamoeError) as error:
        refuse_other_anchors(str(path), "en")
    for word in (
        "--ramoe-refresh-interval",
        "--ramoe-anchor",
        str(path.with_suffix(".json")),
        ", ".join(map(repr, anchors)),
    ):
        assert word in str(error.value)


def test_a_taxonomy_of_the_anchor_alone_is_let_through(tmp_path: Path) -> None:
    # as `ramoe taxonomy` writes it
    document(tmp_path / "taxonomy.json", "ramoe-taxonomy", anchor="en", pairs=[])
    refuse_other_anchors(str(tmp_path / "taxonomy.jsonl"), "en")


@pytest.mark.parametrize(
    ("flag", "setting"),
    [
        ("--overlap-param-gather", {"overlap_param_gather": True}),
        ("--moe-input-jitter-eps 0.01", {"moe_input_jitter_eps": 0.01}),
        ("--ramoe-pack", {"ramoe_pack": True}),
        ("--context-parallel-size 2", {"context_parallel_size": 2}),
    ],
)
def test_settings_under_which_scoring_would_disturb_training_are_refused(
    flag: str, setting: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {
        "overlap_param_gather": False,
        "moe_input_jitter_eps": None,
        "ramoe_pack": False,
    }
    settings |= {"context_parallel_size": 1}
    refuse_refresh(SimpleNamespace(**settings))
    with pytest.raises(RamoeError, match=rf"--ramoe-refresh-interval does not work with {flag}: remove"):
        refuse_refresh(SimpleNamespace(**settings | setting))


def test_where_nothing_refreshes_the_flag_is_refused() -> None:
    """A data set or a loop of one's own, with a batch that is complete."""
    Chunk().run(batch([2, 3, 4], [1, 0, 1]))
    with pytest.raises(
        RamoeError, match=r"--ramoe-refresh-interval: nothing scores .* ramoe_megatron.dataset_provider"
    ):
        Chunk(refresh_interval=2, examples="ci", taxonomy="t").run(batch([2, 3, 4], [1, 0, 1]))


def length(text: str) -> int:
    return len(TOKENIZER.tokenize(text))


def refuse_answers(made: TaxonomyRefresh) -> None:
    refuse_unanswerable(made.labels, made.examples, made.views, TOKENIZER, made.args.max_position_embeddings)


def test_a_long_answer_of_one_example_takes_no_room_from_another(refresh: Any) -> None:
    """A long prompt has a short answer, and a long answer a short prompt: each fits, their sum does not."""
    prompt, answer = "What is the currency of AT ? " * 3, "one two three four five six seven eight nine ten"
    targets = [example("q1", "es", prompt=prompt), example("q2", "es", prompt="one", response=answer)]
    limit = max(length(prompt) + length("EUR"), length("one") + length(answer))
    assert length(prompt) + length(answer) > limit
    fits = refresh(0, targets=targets, positions=limit)
    refuse_answers(fits)
    for choices in (None, ("EUR", answer)):
        longer = [example("q1", "es", prompt=prompt, choices=choices)]
        with pytest.raises(
            RamoeError,
            match=rf"--ramoe-refresh-interval .* 1 of 2 .* --max-position-embeddings {length(prompt)}",
        ):
            refuse_answers(refresh(0, targets=longer, positions=length(prompt)))


def test_a_view_that_is_too_long_counts_and_what_is_never_scored_does_not(refresh: Any) -> None:
    long = "What is the currency of AT ? " * 3
    limit = length("What is one ?") + length("EUR")
    with pytest.raises(RamoeError, match="1 of 6"):
        refuse_answers(refresh(0, views=[example("q1", prompt=long), *VIEWS[1:]], positions=limit))
    views = [*VIEWS, example("q9", prompt=long)]
    refuse_answers(
        refresh(0, views=views, targets=[*TARGETS, example("q8", "es", prompt=long)], positions=limit)
    )
