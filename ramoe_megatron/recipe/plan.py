"""From a recipe to its ordered stages: which command, what it reads, what it writes.

Order: data, pretrain, taxonomy, profile, evaluate/base, predict, finetune/METHOD-seedK, evaluate/METHOD-seedK,
results, report: what the base model can do, and whether alignment has anything to gain, is known before anything is
fine-tuned.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.digests import CHECKPOINT_MARK
from ramoe_megatron.recipe.flags import SCORING, relevant, render
from ramoe_megatron.recipe.schema import Method, Recipe
from ramoe_megatron.recipe.section import FlagValue, Scalar
from ramoe_megatron.recipe.sources import data_stage, find_path
from ramoe_megatron.recipe.stage import JOBS, Stage

Files = dict[str, Sequence[str | Path]]


def make_plan(recipe: Recipe, out: Path, recipe_folder: Path) -> list[Stage]:
    """The recipe's stages in order. Raises RamoeError when a file, folder or checkpoint that it names is absent."""
    return _Plan(recipe, out.resolve(), recipe_folder).stages()


class _Plan:
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
        self.fine_tunings = [(method, seed) for seed in recipe.seeds for method in recipe.methods]

    def stages(self) -> list[Stage]:
        generated = [data_stage(self.recipe, self.out, self.recipe_folder)] if self.recipe.data.files is None else []
        pretraining = [self._pretrain()] if self.recipe.pretrain is not None else []
        offline = [self._taxonomy(), self._profile(), self._evaluate("base", None, self.base), self._predict()]
        tunings = [self._finetune(method, seed) for method, seed in self.fine_tunings]
        evaluations = [
            self._evaluate(method.name, seed, self._checkpoint(f"{method.name}-seed{seed}")) for method, seed in self.fine_tunings
        ]
        return [*generated, *pretraining, *offline, *tunings, *evaluations, self._results(), self._report()]

    def _source(self, name: str, key: str) -> str:
        return str(find_path(name, self.recipe_folder, key) or name)

    def _base(self) -> Path:
        if self.recipe.checkpoint is None:
            return self._checkpoint("base")
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

    def _checkpoint(self, name: str) -> Path:
        return self.out / "checkpoints" / name

    def _curves(self, name: str) -> Path:
        return self.out / "tensorboard" / name

    def _job(
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

    def _scoring(self) -> dict[str, FlagValue]:
        return {name: value for name, value in self.recipe.train.items() if name in SCORING}

    def _training(self, name: str, flags: Mapping[str, FlagValue], seed: int) -> tuple[dict[str, FlagValue], dict[str, FlagValue]]:
        # Megatron saves at the end only when an interval is set.
        interval = {"save-interval": flags.get("train-iters")} if "save-interval" not in flags else {}
        places: dict[str, FlagValue] = {
            "save": str(self._checkpoint(name)),
            "load": str(self._checkpoint(name)),
            "tensorboard-dir": str(self._curves(name)),
        }
        # A job near its time limit saves and goes back into the queue.
        handler: dict[str, FlagValue] = {"exit-signal-handler": True} if self.recipe.launch.launcher == "slurm" else {}
        return {**flags, **interval, **handler, "seed": seed}, places

    def _pretrain(self) -> Stage:
        flags, places = self._training("base", self.recipe.pretrain_flags(), self.recipe.seed)
        options: dict[str, FlagValue] = {"split": "train", "weights": _weights(self.recipe.data.pretrain_weights)}
        traces = [self._curves("base")]
        stage = self._job("pretrain", "finetune", flags, options, {"data": self.pretraining}, [self.base], places, traces=traces)
        if self.recipe.data.pretrain_weights or self.recipe.data.files is not None:
            return stage
        return dataclasses.replace(stage, weights=self.weights, inputs=(*stage.inputs, self.weights))

    def _taxonomy(self) -> Stage:
        settings = self.recipe.taxonomy
        options: dict[str, FlagValue] = {
            "split": ",".join(settings.splits),
            "languages": self._languages(),
            "max-new-tokens": settings.max_new_tokens,
        }
        outputs = [self.out / "taxonomy.jsonl", self.out / "taxonomy.json"]
        return self._job(
            "taxonomy",
            "taxonomy",
            self._scoring(),
            options,
            {"data": self.parallel},
            outputs,
            self._offline(),
            self.base,
        )

    def _languages(self) -> FlagValue:
        return [*self.recipe.data.languages] if self.recipe.data.languages else None

    def _offline(self, checkpoint: Path | None = None, folder: str = ".") -> dict[str, FlagValue]:
        batch = self.recipe.launch.batch_tokens
        places: dict[str, FlagValue] = {"load": str(checkpoint or self.base), "ramoe-output": str(self.out / folder)}
        return {**places, "ramoe-batch-tokens": batch}

    def _wants_priors(self) -> bool:
        if self.recipe.profile.save_priors is not None:
            return self.recipe.profile.save_priors
        return any(a.target == "example" and a.coeff for a in map(self.recipe.alignment_of, self.recipe.methods))

    def _profile(self) -> Stage:
        settings, priors = self.recipe.profile, self._wants_priors()
        options: dict[str, FlagValue] = {
            "split": settings.split,
            "languages": self._languages(),
            "select": settings.select,
            "layers": settings.layers,
            "tokens": settings.tokens,
            "save-priors": priors,
        }
        files: Files = {"data": self.parallel, "general": self.general, "taxonomy": [self.out / "taxonomy.jsonl"]}
        outputs = [
            self.out / "experts.safetensors",
            self.out / "divergence.csv",
            *([self.out / "priors.safetensors"] * priors),
        ]
        return self._job("profile", "profile", self._scoring(), options, files, outputs, self._offline(), self.base)

    def _predict(self) -> Stage:
        options: dict[str, FlagValue] = {
            "split": self.recipe.evaluate.split,
            "languages": self._languages(),
            "layers": self.recipe.alignment.layers,
            "max-new-tokens": self._answer_tokens(),
        }
        files: Files = {
            "data": self.parallel,
            "taxonomy": [self.out / "taxonomy.jsonl"],
            "experts": [self.out / "experts.safetensors"],
            "divergence-file": [self.out / "divergence.csv"],
        }
        outputs = [self.out / "predict.json"]
        return self._job("predict", "predict", self._scoring(), options, files, outputs, self._offline(), self.base)

    def _finetune(self, method: Method, seed: int) -> Stage:
        name, alignment = f"{method.name}-seed{seed}", self.recipe.alignment_of(method)
        flags, places = self._training(name, self.recipe.train_of(method), seed)
        files: Files = {"data": self.parallel}
        options: dict[str, FlagValue] = {
            "split": "train",
            "languages": self._languages(),
            "weights": _weights(self.recipe.data.weights),
        }
        if alignment.coeff:  # without a coefficient the run is plain fine-tuning, whatever else stands under alignment
            files |= {"experts": [self.out / "experts.safetensors"], "taxonomy": [self.out / "taxonomy.jsonl"]}
            files |= {"priors": [self.out / "priors.safetensors"]} if alignment.target == "example" else {}
            options |= alignment.model_dump(by_alias=True) | {"shuffle-targets": seed if alignment.shuffle_targets else None}
        return self._job(
            f"finetune/{name}",
            "finetune",
            flags,
            options,
            files,
            [self._checkpoint(name)],
            {**places, "pretrained-checkpoint": str(self.base)},
            self.base,
            [self._curves(name)],
        )

    def _answer_tokens(self) -> int:
        return self.recipe.evaluate.max_new_tokens or self.recipe.taxonomy.max_new_tokens

    def _evaluate(self, method: str, seed: int | None, checkpoint: Path) -> Stage:
        name = "base" if seed is None else f"{method}-seed{seed}"
        options: dict[str, FlagValue] = {
            "split": self.recipe.evaluate.split,
            "languages": self._languages(),
            "method": method,
            "seed": seed,
            "max-new-tokens": self._answer_tokens(),
        }
        files: Files = {"data": self.parallel, "experts": [self.out / "experts.safetensors"]}
        outputs = [self.out / "evaluations" / f"{name}{suffix}" for suffix in (".json", ".jsonl")]
        places = self._offline(checkpoint, "evaluations")
        return self._job(f"evaluate/{name}", "evaluate", self._scoring(), options, files, outputs, places, checkpoint)

    def _evaluations(self) -> list[Path]:
        names = ["base", *(f"{method.name}-seed{seed}" for method, seed in self.fine_tunings)]
        return [self.out / "evaluations" / f"{name}{suffix}" for name in names for suffix in (".json", ".jsonl")]

    def _results(self) -> Stage:
        return Stage(
            name="results",
            command=("ramoe_megatron.recipe.results", str(self.out)),
            settings={"recipe": self.recipe.name, "methods": [method.name for method in self.recipe.methods]},
            inputs=(*self._evaluations(), self.out / "taxonomy.json"),
            outputs=(self.out / "results.json",),
            ranks=0,
        )

    def _report(self) -> Stage:
        read = ("results.json", "taxonomy.json", "experts.safetensors", "divergence.csv", "predict.json", "recipe.yaml")
        return Stage(
            name="report",
            command=(f"{JOBS}.report", "--run", str(self.out)),
            settings={},
            inputs=tuple(self.out / name for name in read),
            outputs=(self.out / "report.html",),
            traces=(self.out / "plots",),
            ranks=0,
        )


def _weights(weights: Mapping[str, float]) -> FlagValue:
    return [f"{pattern}={weight:g}" for pattern, weight in weights.items()] or None
