"""What every stage of a plan is made of: the recipe's sources, its flags, and the places in the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.method.files import files_by_tokens
from ramoe_megatron.recipe.digests import CHECKPOINT_MARK
from ramoe_megatron.recipe.flags import SCORING, relevant, render
from ramoe_megatron.recipe.method_schema import Alignment
from ramoe_megatron.recipe.schema import Recipe
from ramoe_megatron.recipe.section import FlagValue, Scalar
from ramoe_megatron.recipe.sources import find_path
from ramoe_megatron.recipe.stage import JOBS, Stage

Files = dict[str, Sequence[str | Path]]


class PlanContext:
    """A recipe and its run folder, as the makers of stages see them."""

    def __init__(self, recipe: Recipe, out: Path, recipe_folder: Path) -> None:
        self.recipe, self.out, self.recipe_folder = recipe, out, recipe_folder
        data, generated = recipe.data, out / "data"
        self.weights = generated / "weights.json"
        if data.files is not None:
            self.parallel = [self._source(name, "data.files") for name in data.files]
            self.general = [self._source(name, "data.general") for name in data.general or []]
            self.pretraining = [self._source(name, "data.pretrain") for name in data.pretrain or []]
        else:
            self.parallel, self.general, self.pretraining = (
                [str(generated / f"{name}.jsonl")] for name in ("parallel", "general", "pretrain")
            )
        self.tokenizer, self.tokenizer_files = self._tokenizer(generated / "tokenizer.model")
        self.base = self._base()
        given = find_path(recipe.profile.experts, recipe_folder, "profile.experts") if recipe.profile.experts else None
        self.expert_files = _expert_files(recipe, out)
        self.experts = given or self.expert_files["all"]
        self.priors = _priors(recipe, out)

    def _source(self, name: str, key: str) -> str:
        return str(find_path(name, self.recipe_folder, key) or name)

    def _base(self) -> Path:
        if self.recipe.checkpoint is None:
            return self.checkpoint("base")
        folder = find_path(self.recipe.checkpoint, self.recipe_folder, "checkpoint")
        if folder is None or not (folder / CHECKPOINT_MARK).is_file():
            raise RamoeError(
                f"checkpoint: {self.recipe.checkpoint} holds no {CHECKPOINT_MARK}, so it is no Megatron checkpoint "
                f"folder: "
                "give the folder that Megatron's --save wrote"
            )
        return folder

    def _tokenizer(self, generated: Path) -> tuple[dict[str, FlagValue], list[Path]]:
        if self.recipe.tokenizer is None:
            return {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": str(generated)}, [generated]
        flags, files = dict(self.recipe.tokenizer), []
        for name in ("tokenizer-model", "vocab-file", "merge-file"):
            if isinstance(value := flags.get(name), str) and (path := find_path(value, self.recipe_folder, f"tokenizer.{name}")):
                flags[name] = str(path)
                files.append(path)
        return flags, files

    def experts_of(self, alignment: Alignment) -> Path:
        """The expert file that a method aligns by."""
        return self.experts if alignment.select_tokens == "all" else self.expert_files[alignment.select_tokens]

    def checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / name

    def curves(self, name: str) -> Path:
        return self.out / "tensorboard" / name

    def job(
        self,
        name: str,
        job: str,
        flags: Mapping[str, FlagValue],
        options: Mapping[str, FlagValue],
        files: Files,
        outputs: Sequence[Path],
        places: Mapping[str, FlagValue],
        checkpoint: Path | None = None,
        traces: Sequence[Path] = (),
    ) -> Stage:
        """A Megatron job. `places` (folders, mostly) and the paths of `files` are no settings."""
        merged = {**self.recipe.model, **flags, **self.tokenizer, **self.recipe.parallel}
        columns = [f"{field}={column}" for field, column in sorted(self.recipe.data.columns.items())]
        settings: dict[str, FlagValue] = {
            "anchor": self.recipe.data.anchor_language,
            "columns": [*columns] or None,
            **options,
        }
        paths: dict[str, list[Scalar]] = {f"ramoe-{key}": [str(path) for path in group] for key, group in files.items() if group}
        words = [
            *render(merged),
            *render(places),
            *render(paths),
            *render({f"ramoe-{key}": value for key, value in settings.items()}),
        ]
        named = [str(source) for group in files.values() for source in group]
        own = [str(path) for path in self.tokenizer_files]
        told = {key: value for key, value in merged.items() if value not in own}
        hub = [source for source in named if not Path(source).is_absolute()]
        inputs = [*(Path(source) for source in named if Path(source).is_absolute()), *self.tokenizer_files]
        return Stage(
            name=name,
            command=(f"{JOBS}.{job}", *words),
            settings={"job": job, "flags": relevant(told), "options": settings, "hub": hub},
            inputs=tuple(dict.fromkeys([*inputs, *([checkpoint] if checkpoint else [])])),
            outputs=tuple(outputs),
            traces=tuple(traces),
            ranks=self.recipe.launch.ranks_per_node,
            nodes=self.recipe.launch.nodes,
        )

    def scoring(self) -> dict[str, FlagValue]:
        return {name: value for name, value in self.recipe.train.items() if name in SCORING}

    def training(self, name: str, flags: Mapping[str, FlagValue], seed: int) -> tuple[dict[str, FlagValue], dict[str, FlagValue]]:
        # Megatron saves at the end only when an interval is set.
        interval = {"save-interval": flags.get("train-iters")} if "save-interval" not in flags else {}
        places: dict[str, FlagValue] = {
            "save": str(self.checkpoint(name)),
            "load": str(self.checkpoint(name)),
            "tensorboard-dir": str(self.curves(name)),
        }
        # A job near its time limit saves and goes back into the queue.
        handler: dict[str, FlagValue] = {"exit-signal-handler": True} if self.recipe.launch.launcher == "slurm" else {}
        return {**flags, **interval, **handler, "seed": seed}, places

    def languages(self) -> FlagValue:
        return [*self.recipe.data.languages] if self.recipe.data.languages else None

    def offline(self, checkpoint: Path | None = None, folder: str = ".") -> dict[str, FlagValue]:
        batch = self.recipe.launch.batch_tokens
        places: dict[str, FlagValue] = {"load": str(checkpoint or self.base), "ramoe-output": str(self.out / folder)}
        return {**places, "ramoe-batch-tokens": batch}

    def answer_tokens(self) -> int | None:
        return self.recipe.evaluate.max_new_tokens or self.recipe.taxonomy.max_new_tokens


def _priors(recipe: Recipe, out: Path) -> dict[str, Path]:
    """By token choice, the file of the priors that pool it: those that the methods need, or that the recipe asks for."""
    needed = [a.tokens for a in map(recipe.alignment_of, recipe.methods) if a.target == "example"]
    if recipe.profile.save_priors is False:
        return {}
    tokens = list(dict.fromkeys([*([recipe.profile.tokens or "last"] if recipe.profile.save_priors else []), *needed]))
    return {choice: out / name for choice, name in files_by_tokens("priors", tokens).items()}


def _expert_files(recipe: Recipe, out: Path) -> dict[str, Path]:
    """By token choice, the expert file of that choice: of all tokens, and those that the methods need."""
    needed = [recipe.alignment_of(method).select_tokens for method in recipe.methods]
    return {choice: out / name for choice, name in files_by_tokens("experts", list(dict.fromkeys(["all", *needed]))).items()}


def weights_option(weights: Mapping[str, float]) -> FlagValue:
    return [f"{pattern}={weight:g}" for pattern, weight in weights.items()] or None
