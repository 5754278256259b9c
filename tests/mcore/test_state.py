"""Laws of a coefficient in units of parity over runs that resume each other."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.align import state
from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
from ramoe_megatron.mcore.align.state import FILE, Coefficient

CONFIG = RoutingAlignmentConfig(
    coeff=0.5, experts="experts.safetensors", taxonomy="taxonomy.jsonl", coeff_unit="lm-loss"
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that starts at an iteration, on one rank: its coefficient."""

    def started(
        iteration: int, load: Path | None = None, save: Path | None = None, rank: int = 0
    ) -> Coefficient:
        paths = {"load": load and str(load), "save": save and str(save)}
        args = SimpleNamespace(curr_iteration=iteration, train_iters=10, **paths)
        monkeypatch.setattr(state, "_training_args", lambda: args)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        return Coefficient(CONFIG)

    return started


def test_the_unit_goes_from_run_to_run_through_their_folders(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run loads what the one before it saved, in a folder of its own; the last one saves nothing."""
    first = run(0, save=tmp_path / "a")
    assert first.now() == 0
    first.measure(torch.tensor(6.0), torch.tensor(0.25))
    assert first.now() == 0.5 * 24
    capsys.readouterr()
    for iteration, load, save in ((4, "a", "b"), (6, "b", "c"), (8, "c", "c"), (8, "c", None)):
        later = run(iteration, load=tmp_path / load, save=save and tmp_path / save)
        assert later.now() == 0.5 * 24
        assert not later.measures
    assert capsys.readouterr().out == ""
    assert len({(tmp_path / folder / FILE).read_text() for folder in "abc"}) == 1


def test_a_resumed_run_leaves_what_its_folder_has(run: Any, tmp_path: Path) -> None:
    for folder, parity in (("a", 2.0), ("b", 3.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / FILE).write_text(json.dumps({"parity": parity}))
    assert run(4, load=tmp_path / "a", save=tmp_path / "b").now() == 1.0
    assert json.loads((tmp_path / "b" / FILE).read_text()) == {"parity": 3.0}


def test_one_rank_alone_writes_and_tells(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).write_text(json.dumps({"parity": 2.0}))
    assert run(4, load=tmp_path, save=tmp_path / "b", rank=1).now() == 1.0
    assert not (tmp_path / "b").exists()
    run(4, load=tmp_path / "none", rank=1).now()
    assert capsys.readouterr().out == ""


def test_a_resumed_run_without_the_unit_tells_once_that_it_measures(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = run(4, load=tmp_path, save=tmp_path / "b")
    assert [later.now(), later.now()] == [0, 0]
    assert later.measures
    (line,) = capsys.readouterr().out.splitlines()
    assert str(tmp_path / FILE) in line
    assert "measured again" in line
    run(0, load=tmp_path).now()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["{}", '{"parity": "x"}', "[1]"])
def test_a_damaged_unit_is_told_and_not_passed_on(run: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RamoeError, match=FILE):
        run(4, load=tmp_path, save=tmp_path / "b").now()
    assert not (tmp_path / "b").exists()
