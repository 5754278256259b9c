"""Where a recipe's data come from: the paths it names, and the stage that generates data."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.stage import JOBS, Stage

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".model", ".tsv")


def find_path(name: str, recipe_folder: Path, key: str) -> Path | None:
    """A path in a recipe: relative to the recipe's folder, or else to the working directory; None for a hub name.

    Raises RamoeError when it is absent and can be no hub name.
    """
    for candidate in (recipe_folder / name, Path(name)):
        if candidate.exists():
            return candidate.resolve()
    if name.endswith(LOCAL_SUFFIXES) or name.startswith((".", "/", "~")) or "/" not in name:
        raise RamoeError(f"{key}: {name} exists neither in {recipe_folder.resolve()} nor in {Path.cwd()}: correct the path")
    return None


def data_stage(recipe: Recipe, out: Path, recipe_folder: Path) -> Stage:
    """The stage that writes the generated data and their tokenizer to `out`/data.

    Raises RamoeError for a wrong setting of the embedded world or of SIB-200, or an absent source folder.
    """
    data, out = recipe.data, out / "data"
    job, config = ("world", _world(recipe)) if data.world is not None else ("sib200", _sib200(recipe, recipe_folder))
    told = {key: value for key, value in config.items() if key != "source"}
    return Stage(
        name="data",
        command=(f"{JOBS}.{job}", "--config", json.dumps(config, ensure_ascii=False), "--out", str(out)),
        settings={"job": job, "config": told},
        inputs=(Path(config["source"]),) if job == "sib200" else (),
        outputs=tuple(out / name for name in ("parallel.jsonl", "pretrain.jsonl", "general.jsonl", "tokenizer.model")),
        traces=(out / "weights.json",),
        ranks=0,
    )


def generated_languages(recipe: Recipe) -> list[str] | None:
    """The target languages that generated data will hold; None where that shows in the data alone."""
    if recipe.data.world is not None:
        return [*_world(recipe)["target_shares"]]
    return [*(recipe.data.sib200 or {}).get("languages", [])] or None


def _world(recipe: Recipe) -> dict[str, Any]:
    from ramoe_megatron.data.world import WorldConfig

    return _config("data.world", WorldConfig, {"seed": recipe.seed, **(recipe.data.world or {})})


def _sib200(recipe: Recipe, recipe_folder: Path) -> dict[str, Any]:
    from ramoe_megatron.data.benchmarks.sib200 import SibConfig

    given = recipe.data.sib200 or {}
    source = find_path(given["source"], recipe_folder, "data.sib200.source")
    if source is None or not source.is_dir():
        raise RamoeError(
            f"data.sib200.source: {given['source']} is a folder neither in {recipe_folder.resolve()} nor "
            f"in {Path.cwd()}: "
            "give the folder of the languages"
        )
    return _config("data.sib200", SibConfig, {**given, "source": str(source)})


def _config(key: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration of a data job, defaults included, from the keys that the recipe gives."""
    from ramoe_megatron.data.config import config_from_mapping

    try:
        return dataclasses.asdict(config_from_mapping(kind, {name.replace("-", "_"): value for name, value in values.items()}))
    except RamoeError as error:
        raise RamoeError(f"{key}: {error}") from None
