"""The stages of several anchors: the routing of each further anchor, and for each example the anchor that it is pulled to.

A method with `alignment.anchors` reads the taxonomy and priors of a stage `anchors/LANGUAGES-TOKENS` in the place of the run's. Methods
with the same anchors and tokens share it.
"""

from pathlib import Path

from ramoe_megatron.artifacts.files import ANCHOR_FILES, files_by_tokens
from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.method_schema import Alignment
from ramoe_megatron.recipe.plan_context import Files, PlanContext
from ramoe_megatron.recipe.section import FlagValue
from ramoe_megatron.recipe.sources import generated_languages
from ramoe_megatron.recipe.stage import Stage

SPLIT = "train"
"""The split that fine-tunes draw from: of the others there need be no priors."""


def anchors_stages(plan: PlanContext) -> list[Stage]:
    """First the profiles of the further anchors, then the choices between them. Raises RamoeError for one that the data will not hold."""
    asked = [alignment for alignment in map(plan.recipe.alignment_of, plan.recipe.methods) if alignment.anchors]
    tokens: dict[str, dict[str, None]] = {}
    for alignment in asked:
        for language in alignment.anchors:
            tokens.setdefault(language, {})[alignment.tokens] = None
    _check_languages(plan, list(tokens))
    files = {language: _priors(plan, language, list(choices)) for language, choices in tokens.items()}
    stages = {folder: _choice(plan, alignment, folder, files) for alignment in asked for folder in [_folder(plan, alignment)]}
    return [*(_profile(plan, language, found) for language, found in files.items()), *stages.values()]


def labels_of(plan: PlanContext, alignment: Alignment) -> Files:
    """The taxonomy and, for the target example, the priors that a fine-tune aligns by."""
    if alignment.anchors:
        folder = _folder(plan, alignment)
        return {"taxonomy": [folder / "taxonomy.jsonl"], "priors": [folder / "priors.safetensors"]}
    priors: Files = {"priors": [plan.priors[alignment.tokens]]} if alignment.target == "example" else {}
    return {"taxonomy": [plan.out / "taxonomy.jsonl"], **priors}


def _check_languages(plan: PlanContext, anchors: list[str]) -> None:
    known = generated_languages(plan.recipe)
    absent = [language for language in anchors if known is not None and language not in known]
    if absent:
        held = ", ".join(known or [])
        raise RamoeError(f"alignment.anchors: {', '.join(absent)} will not be in the data, which will have {held}: name some of these")


def _folder(plan: PlanContext, alignment: Alignment) -> Path:
    return plan.out / "anchors" / f"{'+'.join(alignment.anchors)}-{alignment.tokens}"


def _priors(plan: PlanContext, language: str, tokens: list[str]) -> dict[str, Path]:
    return {choice: plan.out / "priors" / language / name for choice, name in files_by_tokens("priors", tokens).items()}


def _profile(plan: PlanContext, language: str, files: dict[str, Path]) -> Stage:
    """Priors alone, since neither general text nor taxonomy is given."""
    name = f"priors/{language}"
    options: dict[str, FlagValue] = {
        "anchor": language,
        "split": plan.recipe.profile.split,
        "tokens": [*files],
        "save-priors": True,
    }
    places = plan.offline(folder=name)
    return plan.job(name, "profile", plan.scoring(), options, {"data": plan.parallel}, list(files.values()), places, plan.base)


def _choice(plan: PlanContext, alignment: Alignment, folder: Path, files: dict[str, dict[str, Path]]) -> Stage:
    """`ramoe anchors`."""
    anchor = plan.recipe.data.anchor_language
    priors = {anchor: plan.priors[alignment.tokens], **{language: files[language][alignment.tokens] for language in alignment.anchors}}
    taxonomy = plan.out / "taxonomy.jsonl"
    named = [word for language, path in priors.items() for word in ("--priors", f"{language}={path}")]
    words = ["--taxonomy", str(taxonomy), "--anchor", anchor, "--split", SPLIT, *named, "--out", str(folder)]
    return Stage(
        name=f"anchors/{folder.name}",
        command=("ramoe_megatron.cli", "anchors", *words, "--replace"),  # its own files, when it was interrupted
        settings={"anchors": list(priors), "split": SPLIT},
        inputs=(taxonomy, taxonomy.with_suffix(".json"), *priors.values()),
        outputs=tuple(folder / name for name in ANCHOR_FILES),
        ranks=0,
    )
