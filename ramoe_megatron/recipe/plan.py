"""The plan of a recipe: its stages in order, each with its command, its inputs and its outputs.

The order is data, pretrain or convert, taxonomy, profile, evaluate/base, predict, finetune/METHOD-seedK,
evaluate/METHOD-seedK, results, report. With several anchors, priors/LANGUAGE and anchors/LANGUAGES-TOKENS
follow the profile. By this order, the accuracy of the base model and the prediction whether alignment can
help are known before anything is fine-tuned. Methods that steer at inference have an evaluation and no
fine-tuning run.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ramoe_megatron.artifacts.checkpoints import TRACKER
from ramoe_megatron.artifacts.files import ANCHOR_FILES, files_by_tokens
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.mcore.select.selective_options import READS_USAGE
from ramoe_megatron.recipe.megatron_flags import SCORING, relevant, render
from ramoe_megatron.recipe.methods import Method
from ramoe_megatron.recipe.schema import HUGGING_FACE, Recipe
from ramoe_megatron.recipe.sections import AlignmentSection, FlagValue, Scalar
from ramoe_megatron.recipe.stage import JOBS, Stage

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".model", ".tsv")
ANCHOR_SPLIT = "train"
"""The split that fine-tuning draws from. Only this split needs priors of further anchors."""
Files = dict[str, Sequence[str | Path]]


def make_plan(recipe: Recipe, out: Path, recipe_folder: Path) -> list[Stage]:
    """The recipe's stages in order.

    Raises:
        RamoeError: a file, folder or checkpoint that the recipe names is absent.
    """
    plan = PlanContext(recipe, out.resolve(), recipe_folder)
    generated = [data_stage(recipe, plan.out, recipe_folder)] if recipe.data.files is None else []
    making = [pretrain_stage(plan)] if recipe.pretrain is not None else convert_stages(plan)
    profiling = [taxonomy_stage(plan), profile_stage(plan), *anchors_stages(plan)]
    offline = [*profiling, evaluate_stage(plan, "base", None, plan.base), predict_stage(plan)]
    tunings = [finetune_stage(plan, method, seed) for method, seed in fine_tunings(plan)]
    evaluations = [evaluate_stage(plan, *run) for run in evaluated(plan)]
    return [
        *generated,
        *making,
        *offline,
        *tunings,
        *searches(plan),
        *evaluations,
        _results(plan),
        _report(plan),
    ]


class PlanContext:
    """A recipe and its run folder, as the functions below need them to make stages."""

    def __init__(self, recipe: Recipe, out: Path, recipe_folder: Path) -> None:
        self.recipe, self.out, self.recipe_folder = recipe, out, recipe_folder
        data, generated = recipe.data, out / "data"
        self.weights = generated / "weights.json"
        sources = {"parallel": data.files, "general": data.general, "pretrain": data.pretrain}
        keys = {"parallel": "data.files", "general": "data.general", "pretrain": "data.pretrain"}
        self.parallel, self.general, self.pretraining = (
            [self._source(one, keys[name]) for one in files]
            if files
            else [str(generated / f"{name}.jsonl")] * (data.files is None)
            for name, files in sources.items()
        )
        self.tokenizer, self.tokenizer_files = self._tokenizer(generated / "tokenizer.model")
        self.base = self._base()
        given = (
            find_path(recipe.profile.experts, recipe_folder, "profile.experts")
            if recipe.profile.experts
            else None
        )
        self.expert_files = _expert_files(recipe, out)
        self.experts = given or self.expert_files["all"]
        self.priors = _priors(recipe, out)

    def _source(self, name: str, key: str) -> str:
        return str(find_path(name, self.recipe_folder, key) or name)

    def _base(self) -> Path:
        if self.recipe.checkpoint is None or self.recipe.checkpoint.startswith(HUGGING_FACE):
            return self.checkpoint("base")
        folder = find_path(self.recipe.checkpoint, self.recipe_folder, "checkpoint")
        if folder is None or not (folder / TRACKER).is_file():
            raise RamoeError(
                f"checkpoint: {self.recipe.checkpoint} holds no {TRACKER}, "
                "so it is no Megatron checkpoint folder: give the folder that Megatron's --save wrote"
            )
        return folder

    def _tokenizer(self, generated: Path) -> tuple[dict[str, FlagValue], list[Path]]:
        if self.recipe.tokenizer is None:
            return {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": str(generated)}, [
                generated
            ]
        flags, files = dict(self.recipe.tokenizer), []
        for name in ("tokenizer-model", "vocab-file", "merge-file"):
            if isinstance(value := flags.get(name), str) and (
                path := find_path(value, self.recipe_folder, f"tokenizer.{name}")
            ):
                flags[name] = str(path)
                files.append(path)
        return flags, files

    def experts_of(self, alignment: AlignmentSection) -> Path:
        """The expert file that a method is aligned by."""
        return (
            self.experts if alignment.select_tokens == "all" else self.expert_files[alignment.select_tokens]
        )

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
        """A stage that runs a Megatron job.

        `places` (mostly folders) and the paths of `files` are inputs or outputs, but not settings.
        """
        merged = {**self.recipe.model, **flags, **self.tokenizer, **self.recipe.parallel}
        columns = [f"{field}={column}" for field, column in sorted(self.recipe.data.columns.items())]
        settings: dict[str, FlagValue] = {
            "anchor": self.recipe.data.anchor_language,
            "columns": [*columns] or None,
            **options,
        }
        paths: dict[str, list[Scalar]] = {
            f"ramoe-{key}": [str(path) for path in group] for key, group in files.items() if group
        }
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
            ranks=self.recipe.launch.ranks_of(name.partition("/")[0]),
            nodes=self.recipe.launch.nodes,
        )

    def scoring(self) -> dict[str, FlagValue]:
        return {name: value for name, value in self.recipe.train.items() if name in SCORING}

    def training(
        self, name: str, flags: Mapping[str, FlagValue], seed: int
    ) -> tuple[dict[str, FlagValue], dict[str, FlagValue]]:
        # Megatron saves at the end only when a save interval is set.
        interval = {"save-interval": flags.get("train-iters")} if "save-interval" not in flags else {}
        places: dict[str, FlagValue] = {
            "save": str(self.checkpoint(name)),
            "load": str(self.checkpoint(name)),
            "tensorboard-dir": str(self.curves(name)),
        }
        if "data-cache-path" not in {**self.recipe.model, **flags}:
            places["data-cache-path"] = str(self.out / "data-cache")  # all fine-tunes map the same tokens
        # A job near its time limit saves and goes back into the queue.
        handler: dict[str, FlagValue] = (
            {"exit-signal-handler": True} if self.recipe.launch.launcher == "slurm" else {}
        )
        return {**flags, **interval, **handler, "seed": seed}, places

    def languages(self) -> FlagValue:
        return [*self.recipe.data.languages] if self.recipe.data.languages else None

    def offline(self, checkpoint: Path | None = None, folder: str = ".") -> dict[str, FlagValue]:
        batch = self.recipe.launch.batch_tokens
        places: dict[str, FlagValue] = {
            "load": str(checkpoint or self.base),
            "ramoe-output": str(self.out / folder),
        }
        return {**places, "ramoe-batch-tokens": batch}

    def answer_tokens(self) -> int | None:
        return self.recipe.evaluate.max_new_tokens or self.recipe.taxonomy.max_new_tokens


def _priors(recipe: Recipe, out: Path) -> dict[str, Path]:
    """Token choice -> file of the priors pooled over it, for the choices of the methods and of the recipe."""
    needed = [a.tokens for a in map(recipe.alignment_of, recipe.methods) if a.target == "example"]
    if recipe.profile.save_priors is False:
        return {}
    tokens = list(
        dict.fromkeys([*([recipe.profile.tokens or "last"] if recipe.profile.save_priors else []), *needed])
    )
    return {choice: out / name for choice, name in files_by_tokens("priors", tokens).items()}


def _expert_files(recipe: Recipe, out: Path) -> dict[str, Path]:
    """Token choice -> expert file of that choice, for all tokens and the choices of the methods."""
    needed = [recipe.alignment_of(method).select_tokens for method in recipe.methods]
    return {
        choice: out / name
        for choice, name in files_by_tokens("experts", list(dict.fromkeys(["all", *needed]))).items()
    }


def weights_option(weights: Mapping[str, float]) -> FlagValue:
    return [f"{pattern}={weight:g}" for pattern, weight in weights.items()] or None


# ---- the data ----


def find_path(name: str, recipe_folder: Path, key: str) -> Path | None:
    """A path of a recipe, looked up in the recipe's folder and then in the working directory.

    Returns None for the name of a data set on the hub. Raises RamoeError when the path is absent and cannot
    be such a name.
    """
    for candidate in (recipe_folder / name, Path(name)):
        if candidate.exists():
            return candidate.resolve()
    if name.endswith(LOCAL_SUFFIXES) or name.startswith((".", "/", "~")) or "/" not in name:
        raise RamoeError(
            f"{key}: {name} exists neither in {recipe_folder.resolve()} nor in {Path.cwd()}: correct the path"
        )
    return None


def data_stage(recipe: Recipe, out: Path, recipe_folder: Path) -> Stage:
    """The stage that writes the generated data and their tokenizer to `out`/data.

    Raises RamoeError for a wrong setting of the embedded world, of SIB-200 or of a benchmark, and for an
    absent source.
    """
    data, out = recipe.data, out / "data"
    if data.benchmark is not None:
        return _benchmarks_stage(recipe, out, recipe_folder)
    job, config = (
        ("world", _world(recipe)) if data.world is not None else ("sib200", _sib200(recipe, recipe_folder))
    )
    told = {key: value for key, value in config.items() if key != "source"}
    return Stage(
        name="data",
        command=(
            f"{JOBS}.generate",
            job,
            "--config",
            json.dumps(config, ensure_ascii=False),
            "--out",
            str(out),
        ),
        settings={"job": job, "config": told},
        inputs=(Path(config["source"]),) if job == "sib200" else (),
        outputs=tuple(
            out / name for name in ("parallel.jsonl", "pretrain.jsonl", "general.jsonl", "tokenizer.model")
        ),
        traces=(out / "weights.json",),
        ranks=0,
    )


def _benchmarks_stage(recipe: Recipe, out: Path, recipe_folder: Path) -> Stage:
    from ramoe_megatron.data.benchmarks.declaration import declared
    from ramoe_megatron.data.benchmarks.engine import BenchmarkConfig
    from ramoe_megatron.data.benchmarks.published import Source

    anchor, entries, folders, hub = recipe.data.anchor_language, [], list[Path](), list[str]()
    for number, values in enumerate(recipe.data.benchmarks):
        key = "data" if isinstance(recipe.data.benchmark, str) else f"data.benchmark.{number}"
        entry = _config(key, BenchmarkConfig, {"seed": recipe.seed, **values})
        if not entry["source"]:
            raise RamoeError(
                f"{key}.source is missing: give the folder of the benchmark {entry['benchmark']}, or its "
                "name on the Hugging Face hub"
            )
        if not entry["languages"] or anchor in entry["languages"]:
            entry["anchor"] = entry["anchor"] or anchor
        path = find_path(entry["source"], recipe_folder, f"{key}.source")
        if path is None:
            hub.append(entry["source"])
        else:
            folders.append(path)
            entry["source"] = str(path)
        Source(entry["source"], entry["benchmark"], declared(entry["benchmark"]))
        entries.append(entry)
    config = {"benchmarks": entries, "general": not recipe.data.general, "anchor": anchor}
    told = [{key: value for key, value in entry.items() if key != "source"} for entry in entries]
    names = ["parallel.jsonl", *["general.jsonl"] * (not recipe.data.general), "benchmarks.json"]
    words = ("--config", json.dumps(config, ensure_ascii=False), "--out", str(out))
    return Stage(
        name="data",
        command=(f"{JOBS}.generate", "benchmarks", *words),
        settings={"job": "benchmarks", "config": {**config, "benchmarks": told}, "hub": hub},
        inputs=tuple(dict.fromkeys(folders)),
        outputs=tuple(out / name for name in names),
        ranks=0,
    )


def generated_languages(recipe: Recipe) -> list[str] | None:
    """The target languages of generated data; None when only the data themselves show them."""
    if recipe.data.world is not None:
        return [*_world(recipe)["target_shares"]]
    if recipe.data.benchmark is not None:
        return [*(recipe.data.languages or [])] or None
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
            f"in {Path.cwd()}: give the folder of the languages"
        )
    return _config("data.sib200", SibConfig, {**given, "source": str(source)})


def _config(key: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration of a data job, with defaults, from the keys that the recipe gives."""
    from ramoe_megatron.data.config import config_from_mapping

    try:
        return dataclasses.asdict(
            config_from_mapping(kind, {name.replace("-", "_"): value for name, value in values.items()})
        )
    except RamoeError as error:
        raise RamoeError(f"{key}: {error}") from None


# ---- the base model ----


def pretrain_stage(plan: PlanContext) -> Stage:
    flags, places = plan.training("base", plan.recipe.pretrain_flags(), plan.recipe.seed)
    options: dict[str, FlagValue] = {
        "split": "train",
        "weights": weights_option(plan.recipe.data.pretrain_weights),
    }
    traces = [plan.curves("base")]
    stage = plan.job(
        "pretrain", "finetune", flags, options, {"data": plan.pretraining}, [plan.base], places, traces=traces
    )
    if plan.recipe.data.pretrain_weights or not plan.recipe.data.generates:
        return stage
    return dataclasses.replace(stage, weights=plan.weights, inputs=(*stage.inputs, plan.weights))


def convert_stages(plan: PlanContext) -> list[Stage]:
    """The stage that converts the Hugging Face folder of `checkpoint`, if it names one."""
    name = plan.recipe.checkpoint or ""
    if not name.startswith(HUGGING_FACE):
        return []
    from ramoe_megatron.models.convert import digest_of
    from ramoe_megatron.models.safetensors_folder import SafetensorsFolder

    folder = name.removeprefix(HUGGING_FACE)
    stage = Stage(
        name="convert",
        command=("ramoe_megatron.cli", "convert", folder, "--out", str(plan.base)),
        settings={"job": "convert", "source": digest_of(SafetensorsFolder(Path(folder)))},
        outputs=(plan.base,),
        ranks=0,
    )
    return [stage]


def taxonomy_stage(plan: PlanContext) -> Stage:
    settings = plan.recipe.taxonomy
    options: dict[str, FlagValue] = {
        "split": ",".join(settings.splits),
        "languages": plan.languages(),
        "max-new-tokens": settings.max_new_tokens,
    }
    outputs = [plan.out / "taxonomy.jsonl", plan.out / "taxonomy.json"]
    return plan.job(
        "taxonomy",
        "taxonomy",
        plan.scoring(),
        options,
        {"data": plan.parallel},
        outputs,
        plan.offline(),
        plan.base,
    )


def profile_stage(plan: PlanContext) -> Stage:
    settings, usage = (
        plan.recipe.profile,
        any(plan.recipe.selection_of(method).train in READS_USAGE for method in plan.recipe.methods),
    )
    options: dict[str, FlagValue] = {
        "split": settings.split,
        "languages": plan.languages(),
        "select": settings.select,
        "layers": settings.layers,
        "tokens": [*plan.priors] or settings.tokens,
        "save-priors": bool(plan.priors),
        "save-usage": usage,
    }
    if plan.priors:
        options |= {} if settings.priors_for == "all" else {"priors-for": settings.priors_for}
        options |= {} if settings.priors_dtype == "float32" else {"priors-dtype": settings.priors_dtype}
    if len(plan.expert_files) > 1:
        options["select-tokens"] = [*plan.expert_files]
    files: Files = {"data": plan.parallel, "general": plan.general, "taxonomy": [plan.out / "taxonomy.jsonl"]}
    outputs = [
        *plan.expert_files.values(),
        plan.out / "divergence.csv",
        *plan.priors.values(),
        *([plan.out / "usage.safetensors"] * usage),
    ]
    traces = [plan.out / "divergence-by-task.csv"]  # earlier run folders lack it and stay up to date
    return plan.job(
        "profile", "profile", plan.scoring(), options, files, outputs, plan.offline(), plan.base, traces
    )


def predict_stage(plan: PlanContext) -> Stage:
    options: dict[str, FlagValue] = {
        "split": plan.recipe.evaluate.split,
        "languages": plan.languages(),
        "layers": plan.recipe.alignment.layers,
        "max-new-tokens": plan.answer_tokens(),
    }
    files: Files = {
        "data": plan.parallel,
        "taxonomy": [plan.out / "taxonomy.jsonl"],
        "experts": [plan.out / "experts.safetensors"],
        "divergence-file": [plan.out / "divergence.csv"],
    }
    outputs = [plan.out / "predict.json"]
    return plan.job("predict", "predict", plan.scoring(), options, files, outputs, plan.offline(), plan.base)


# ---- several anchors: each further anchor's routing, and the choice of an anchor for each example ----


def anchors_stages(plan: PlanContext) -> list[Stage]:
    """The profiles of the further anchors, then the choices between the anchors.

    Raises RamoeError for an anchor that the data will not contain.
    """
    asked = [
        alignment for alignment in map(plan.recipe.alignment_of, plan.recipe.methods) if alignment.anchors
    ]
    tokens: dict[str, dict[str, None]] = {}
    for alignment in asked:
        for language in alignment.anchors:
            tokens.setdefault(language, {})[alignment.tokens] = None
    _check_languages(plan, list(tokens))
    files = {language: _anchor_priors(plan, language, list(choices)) for language, choices in tokens.items()}
    stages = {
        folder: _choice(plan, alignment, folder, files)
        for alignment in asked
        for folder in [_anchor_folder(plan, alignment)]
    }
    return [*(_anchor_profile(plan, language, found) for language, found in files.items()), *stages.values()]


def labels_of(plan: PlanContext, alignment: AlignmentSection) -> Files:
    """The files that label the examples of a fine-tuning run: the taxonomy and, for target example, the
    priors."""
    if alignment.anchors:
        folder = _anchor_folder(plan, alignment)
        return {"taxonomy": [folder / "taxonomy.jsonl"], "priors": [folder / "priors.safetensors"]}
    priors: Files = {"priors": [plan.priors[alignment.tokens]]} if alignment.target == "example" else {}
    return {"taxonomy": [plan.out / "taxonomy.jsonl"], **priors}


def _check_languages(plan: PlanContext, anchors: list[str]) -> None:
    known = generated_languages(plan.recipe)
    absent = [language for language in anchors if known is not None and language not in known]
    if absent:
        held = ", ".join(known or [])
        raise RamoeError(
            f"alignment.anchors: the data will not contain {', '.join(absent)}, only {held}: "
            "name some of these"
        )


def _anchor_folder(plan: PlanContext, alignment: AlignmentSection) -> Path:
    return plan.out / "anchors" / f"{'+'.join(alignment.anchors)}-{alignment.tokens}"


def _anchor_priors(plan: PlanContext, language: str, tokens: list[str]) -> dict[str, Path]:
    return {
        choice: plan.out / "priors" / language / name
        for choice, name in files_by_tokens("priors", tokens).items()
    }


def _anchor_profile(plan: PlanContext, language: str, files: dict[str, Path]) -> Stage:
    """The stage that writes only priors, because it gets neither general text nor a taxonomy."""
    name = f"priors/{language}"
    options: dict[str, FlagValue] = {
        "anchor": language,
        "split": plan.recipe.profile.split,
        "tokens": [*files],
        "save-priors": True,
    }
    places = plan.offline(folder=name)
    return plan.job(
        name,
        "profile",
        plan.scoring(),
        options,
        {"data": plan.parallel},
        list(files.values()),
        places,
        plan.base,
    )


def _choice(
    plan: PlanContext, alignment: AlignmentSection, folder: Path, files: dict[str, dict[str, Path]]
) -> Stage:
    """The stage that runs `ramoe anchors`."""
    anchor = plan.recipe.data.anchor_language
    priors = {
        anchor: plan.priors[alignment.tokens],
        **{language: files[language][alignment.tokens] for language in alignment.anchors},
    }
    taxonomy = plan.out / "taxonomy.jsonl"
    named = [word for language, path in priors.items() for word in ("--priors", f"{language}={path}")]
    words = [
        "--taxonomy",
        str(taxonomy),
        "--anchor",
        anchor,
        "--split",
        ANCHOR_SPLIT,
        *named,
        "--out",
        str(folder),
    ]
    return Stage(
        name=f"anchors/{folder.name}",
        # --replace: an interrupted run may have left files.
        command=("ramoe_megatron.cli", "anchors", *words, "--replace"),
        settings={"anchors": list(priors), "split": ANCHOR_SPLIT},
        inputs=(taxonomy, taxonomy.with_suffix(".json"), *priors.values()),
        outputs=tuple(folder / name for name in ANCHOR_FILES),
        ranks=0,
    )


# ---- the methods ----


def fine_tunings(plan: PlanContext) -> list[tuple[Method, int]]:
    """Method and seed of each fine-tuning run, ordered by seed."""
    return [
        (method, seed) for seed in plan.recipe.seeds for method in plan.recipe.methods if not method.steered
    ]


def evaluated(plan: PlanContext) -> list[tuple[str, int | None, Path, Method | None]]:
    """Name, seed, checkpoint and, for steering, method of each evaluation except the base model's."""
    found: list[tuple[str, int | None, Path, Method | None]] = [
        (method.name, seed, plan.checkpoint(f"{method.name}-seed{seed}"), None)
        for method, seed in fine_tunings(plan)
    ]
    for method in plan.recipe.methods:
        if method.steered and method.on is None:
            found.append((method.name, None, plan.base, method))
        elif method.steered:
            found += [
                (method.name, seed, plan.checkpoint(f"{method.on}-seed{seed}"), method)
                for seed in plan.recipe.seeds
            ]
    return found


def finetune_stage(plan: PlanContext, method: Method, seed: int) -> Stage:
    name, alignment = f"{method.name}-seed{seed}", plan.recipe.alignment_of(method, seed)
    flags, places = plan.training(name, plan.recipe.train_of(method), seed)
    files: Files = {"data": plan.parallel}
    languages, weights = _mixture(plan, method)
    options: dict[str, FlagValue] = {
        "split": "train",
        "languages": languages,
        "weights": weights_option(weights),
    }
    if method.ids_per_task is not None:  # else no option, so that earlier run folders stay up to date
        options["ids-per-task"] = method.ids_per_task
    selection = plan.recipe.selection_of(method)
    if method.aligns:
        files |= {"experts": [plan.experts_of(alignment)], **labels_of(plan, alignment)}
        files |= (
            {"layer-weights": [plan.out / "divergence.csv"]}
            if alignment.layer_weights == "divergence"
            else {}
        )
        options |= alignment.model_dump(by_alias=True, exclude={"anchors", "select", "select_tokens"})
        options["layer-weights"] = None  # the flag's value is the curve's file
    if selection.train != "all":
        options |= selection.model_dump(by_alias=True)
        files |= {"usage": [plan.out / "usage.safetensors"]} if selection.train in READS_USAGE else {}
        files |= {"experts": [plan.experts_of(alignment)]} if selection.train == "task-experts" else {}
    options |= {"select": alignment.select} if alignment.select else {}
    return plan.job(
        f"finetune/{name}",
        "finetune",
        flags,
        options,
        files,
        [plan.checkpoint(name)],
        {**places, "pretrained-checkpoint": str(plan.base)},
        plan.base,
        [plan.curves(name)],
    )


def _mixture(plan: PlanContext, method: Method) -> tuple[FlagValue, Mapping[str, float]]:
    """Languages and sampling weights of a fine-tune, with the share of the anchor that the method replays."""
    languages, weights = plan.languages(), plan.recipe.data.weights or {"*": 1.0}
    if not method.replay:
        return languages, plan.recipe.data.weights
    anchor, total = plan.recipe.data.anchor_language, sum(weights.values())
    others = {pattern: (1 - method.replay) * weight / (total or 1) for pattern, weight in weights.items()}
    read: FlagValue = [anchor, *(name for name in plan.recipe.data.languages or [] if name != anchor)]
    return read if languages else None, {f"*/{anchor}": method.replay, **others}


def searches(plan: PlanContext) -> list[Stage]:
    """One search for each checkpoint that a method with a search steers."""
    return [
        steer_stage(plan, method, seed, checkpoint)
        for _, seed, checkpoint, method in evaluated(plan)
        if method is not None and plan.recipe.steering_of(method).search
    ]


def _run_name(method: str, seed: int | None) -> str:
    return method if seed is None else f"{method}-seed{seed}"


def steer_stage(plan: PlanContext, method: Method, seed: int | None, checkpoint: Path) -> Stage:
    name = _run_name(method.name, seed)
    steering, folder = plan.recipe.steering_of(method), f"steering/{name}"
    options: dict[str, FlagValue] = {
        "split": "validation",
        "languages": plan.languages(),
        "kinds": [steering.steer],
        "zones": [*(steering.zones or [steering.steer_layers])],
        "max-new-tokens": plan.answer_tokens(),
    }
    files: Files = {"data": plan.parallel, "experts": [plan.experts]}
    outputs = [plan.out / folder / "steering.json"]
    places = plan.offline(checkpoint, folder)
    return plan.job(f"steer/{name}", "steer", plan.scoring(), options, files, outputs, places, checkpoint)


def evaluate_stage(
    plan: PlanContext, method: str, seed: int | None, checkpoint: Path, steered: Method | None = None
) -> Stage:
    name = _run_name(method, seed)
    options: dict[str, FlagValue] = {
        "split": plan.recipe.evaluate.split,
        "languages": plan.languages(),
        "method": method,
        "seed": seed,
        "max-new-tokens": plan.answer_tokens(),
    }
    # coeff-zero has to end with the same weights as sft.
    if any("coeff-zero" in other.presets for other in plan.recipe.methods):
        options["weights-digest"] = method == "sft" or "coeff-zero" in plan.recipe.presets_of(method)
    files: Files = {"data": plan.parallel, "experts": [plan.experts]}
    if steered is not None:
        steering = plan.recipe.steering_of(steered)
        if steering.search:
            files |= {"steering": [plan.out / "steering" / name / "steering.json"]}
        else:
            options |= steering.model_dump(by_alias=True, include={"steer", "steer_layers", "steer_tau"})
            options |= {"steer-strength": steering.steer_strength} if steering.steer == "soft" else {}
    outputs = [plan.out / "evaluations" / f"{name}{suffix}" for suffix in (".json", ".jsonl")]
    places = plan.offline(checkpoint, "evaluations")
    return plan.job(
        f"evaluate/{name}", "evaluate", plan.scoring(), options, files, outputs, places, checkpoint
    )


# ---- the results ----


def _evaluations(plan: PlanContext) -> list[Path]:
    names = ["base", *(name if seed is None else f"{name}-seed{seed}" for name, seed, *_ in evaluated(plan))]
    return [plan.out / "evaluations" / f"{name}{suffix}" for name in names for suffix in (".json", ".jsonl")]


def _results(plan: PlanContext) -> Stage:
    return Stage(
        name="results",
        command=("ramoe_megatron.report.write", "results", "--run", str(plan.out)),
        settings={"recipe": plan.recipe.name, "methods": [method.name for method in plan.recipe.methods]},
        inputs=(*_evaluations(plan), plan.out / "taxonomy.json", plan.out / "divergence.csv"),
        outputs=(plan.out / "results.json",),
        ranks=0,
    )


def _report(plan: PlanContext) -> Stage:
    read = (
        "results.json",
        "taxonomy.json",
        "experts.safetensors",
        "divergence.csv",
        "predict.json",
        "recipe.yaml",
    )
    return Stage(
        name="report",
        command=("ramoe_megatron.report.write", "report", "--run", str(plan.out)),
        settings={},
        inputs=tuple(plan.out / name for name in read),
        outputs=(plan.out / "report.html",),
        traces=(plan.out / "plots",),
        ranks=0,
    )
