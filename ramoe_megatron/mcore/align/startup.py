"""The startup messages of a run: losses at the routers, coefficients, aligned layers and samples.

A coefficient that is inherited from another command line is easy to overlook, so the messages name everything
that acts on the routers.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ramoe_megatron.data.codes import groups_of
from ramoe_megatron.method.categories import CATEGORIES
from ramoe_megatron.method.layers import span

if TYPE_CHECKING:
    from ramoe_megatron.data.parallel import Example
    from ramoe_megatron.mcore.align.resolve import ResolvedAlignment

SHOWN = 6
"""The number of tasks, or task-language pairs, that are listed one a line."""
TOKENS = {
    "prompt": "the prompt's tokens",
    "response": "the response's tokens",
    "all": "all tokens",
    "last": "the last prompt token",
}
TARGETS = {
    "profile": "its task's English pattern",
    "example": "its own English view",
    "paired": "its own English view at the current weights",
}


def alignment_block(alignment: "ResolvedAlignment", layer_numbers: Sequence[int], model_config: Any) -> str:
    """The losses at the routers and the aligned layers, as aligned columns.

    Args:
        alignment: the alignment with its files.
        layer_numbers: Megatron's layer number (1-based) of each MoE layer of the whole model.
        model_config: Megatron's `TransformerConfig`.
    """
    config, layers = alignment.config, alignment.layers
    target = TARGETS[str(config.target)]
    if config.shuffle_targets is not None:
        target = f"another example's English view (shuffled, seed {config.shuffle_targets})"
    pulled = "English view" if config.reverse else "sample"
    if config.reverse:
        target = "its target-language view (reversed: a control)"
    pooled = f"{TOKENS[config.tokens]}, " + (
        "pooled" if config.pooling == "sequence" else "each token separately"
    )
    divisor = "all samples" if config.normalize == "samples" else "the aligned samples"
    if model_config.calculate_per_token_loss:
        divisor = divisor.replace("samples", "samples, weighted by loss tokens")
    numbers = [layer_numbers[layer] for layer in layers]
    rows = [
        ("coefficient", f"{_coefficient(config)} x mean over {divisor}, of the global batch"),
        ("divergence", f"{config.divergence} of each {pulled} from {target} (target {config.target})"),
        ("tokens", pooled),
        ("examples", config.examples),
        (
            "layers",
            f"MoE layers {numbers_in_words(layers)} of 0-{len(layer_numbers) - 1} (Megatron's "
            f"{numbers_in_words(numbers)})",
        ),
        *(
            [("layer weights", " ".join(f"{weight:.2f}" for weight in alignment.layer_weight.values()))]
            if config.layer_weights
            else []
        ),
        *_expert_rows(alignment),
        ("load balancing", "; ".join(_balance(*pair) for pair in balancing(model_config)) or "none"),
        (
            "z-loss",
            "none"
            if model_config.moe_z_loss_coeff is None
            else f"coefficient {model_config.moe_z_loss_coeff:g}",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join(
        ["ramoe: routing alignment is on", *lines, *(f"  note: {text}" for text in _notes(model_config))]
    )


def _coefficient(config: Any) -> str:
    """The coefficient and how it changes."""
    text = f"{config.coeff:g}"
    if config.coeff_unit != "absolute":
        text += " (1 is parity with the LM loss at the start)"
    if config.coeff_warmup_iters:
        text += f", after a warm-up of {config.coeff_warmup_iters} iterations"
    return text if config.coeff_decay == "constant" else f"{text}, falling along a cosine to the end,"


def balancing(model_config: Any) -> list[tuple[str, float]]:
    """Each load-balancing type and its coefficient, as Megatron pairs them.

    Types without a loss keep the coefficient that the configuration gives them.
    """
    kinds, coefficients = model_config.moe_router_load_balancing_type, model_config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        return [] if kinds == "none" else [(kinds, float(coefficients))]
    return [(kind, float(coeff)) for kind, coeff in zip(kinds, coefficients, strict=False) if kind != "none"]


def _balance(kind: str, coeff: float) -> str:
    return f"{kind}, coefficient {coeff:g}" if kind.endswith("aux_loss") else kind


def samples_block(
    examples: Sequence["Example"],
    category: Sequence[str] | np.ndarray,
    aligned: np.ndarray,
    order: np.ndarray,
    anchor: str,
) -> str:
    """A table of the training examples by task, language and category, and the aligned share of the draws.

    Args:
        examples: the training examples.
        category: cc, ci, ic or ii for each example; "" without a category (the anchor language, or no
            taxonomy).
        aligned: whether each example is aligned. bool
        order: the index of the example of each draw.
        anchor: the reference language.
    """
    kinds = np.asarray(category)
    groups: dict[tuple[str, str], Counter[str]] = {}
    for group, places in groups_of(examples):
        counts = {kind: int((kinds[places] == kind).sum()) for kind in CATEGORIES}
        groups[group] = Counter(counts | {"all": len(places), "aligned": int(aligned[places].sum())})
    columns = ["all", *(CATEGORIES if (kinds != "").any() else ()), "aligned"]
    pairs = {
        f"{task} / {language}": counts
        for (task, language), counts in sorted(groups.items())
        if language != anchor
    }
    if len(pairs) > SHOWN:
        pairs = _by_language(groups, anchor)
    pairs["total"] = sum(groups.values(), Counter())
    tasks, width = {task for task, _ in groups}, max(len(name) for name in pairs)
    english = sum(counts["all"] for (_, language), counts in groups.items() if language == anchor)
    share = float(aligned[order].mean()) if len(order) else 0.0
    return "\n".join(
        [
            f"ramoe: {len(examples)} training examples of {len(tasks)} tasks ({english} in {anchor}), "
            f"{len(order)} draws, {share:.1%} of them aligned",
            f"  {'':<{width}}" + "".join(f"  {column:>7}" for column in columns),
            *(
                f"  {name:<{width}}" + "".join(f"  {counts[column]:>7}" for column in columns)
                for name, counts in pairs.items()
            ),
            *(
                ["  note: no training example is aligned, so the alignment loss is 0 throughout"]
                if not aligned.any()
                else []
            ),
        ]
    )


def _by_language(groups: dict[tuple[str, str], Counter[str]], anchor: str) -> dict[str, Counter[str]]:
    languages = sorted({language for _, language in groups if language != anchor})
    kept = languages if len(languages) <= SHOWN else languages[: SHOWN - 1]
    found = {
        name: sum((counts for (_, language), counts in groups.items() if language == name), Counter())
        for name in kept
    }
    rest = set(languages) - set(kept)
    if rest:
        found[f"{len(rest)} more"] = sum(
            (counts for (_, language), counts in groups.items() if language in rest), Counter()
        )
    return found


def _expert_rows(alignment: "ResolvedAlignment") -> list[tuple[str, str]]:
    """Rows with the number of task experts in each aligned layer, one row a task."""
    mask_GLE = alignment.experts.expert_mask.bool()
    zone_GZ = mask_GLE[:, list(alignment.layers)].sum(dim=-1).tolist()
    experts = mask_GLE.shape[-1]
    kind = (
        "experts a layer"
        if alignment.config.random_experts is None
        else "experts a layer, drawn at random (a control)"
    )
    rows = []
    for task, counts in list(zip(alignment.experts.tasks, zone_GZ, strict=True))[:SHOWN]:
        empty = [layer for layer, count in zip(alignment.layers, counts, strict=True) if count == 0]
        spread = count_range(counts) + f" of {experts} {kind}"
        rows.append(
            (f"task {task}", spread + (f"; none in MoE layers {numbers_in_words(empty)}" if empty else ""))
        )
    if len(zone_GZ) > SHOWN:
        others = [count for counts in zone_GZ[SHOWN:] for count in counts]
        rows.append((f"{len(zone_GZ) - SHOWN} more tasks", f"{count_range(others)} of {experts} {kind}"))
    return rows


def count_range(counts: Sequence[int]) -> str:
    """`4`, or `0-4` where the counts differ."""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low}-{high}"


def numbers_in_words(values: Sequence[int]) -> str:
    """Layer numbers as ranges, such as `1-3, 5`."""
    return span(values, most=8)


def _notes(model_config: Any) -> Iterable[str]:
    """Notes on settings whose effect a user may not expect."""
    pairs = balancing(model_config)
    acting = [kind for kind, coeff in pairs if kind.endswith("aux_loss") and coeff > 0]
    idle = [kind for kind, coeff in pairs if kind.endswith("aux_loss") and coeff == 0]
    if not pairs:
        yield "load balancing is none: nothing keeps the experts evenly used while routing is aligned"
    if idle:
        yield f"load balancing {', '.join(idle)} has coefficient 0 (--moe-aux-loss-coeff) and does nothing"
    if "global_aux_loss" in acting:
        yield (
            "Megatron divides global_aux_loss by the number of data-parallel ranks: on 2 ranks it acts "
            "half as strongly as its coefficient says"
        )
    losses = [*acting, *(["z-loss"] if model_config.moe_z_loss_coeff else [])]
    if losses and model_config.calculate_per_token_loss:
        yield (
            f"Megatron multiplies {', '.join(losses)} by all real tokens under "
            "--calculate-per-token-loss but divides by the loss tokens: "
            "with masked prompts the effect is stronger than the coefficient says "
            "(4 times, when prompts are 75 % of the tokens); the alignment loss is not affected"
        )
    if "quantile_balancing" in [kind for kind, _ in pairs]:
        yield (
            "quantile_balancing counts padding, since Megatron gives it no mask; --ramoe-pack leaves "
            "little padding"
        )
    if model_config.moe_expert_capacity_factor is not None:
        yield (
            "--moe-expert-capacity-factor counts padding, which changes the tokens that are dropped; "
            "--ramoe-pack leaves little padding"
        )
    if model_config.mtp_use_repeated_layer and (model_config.mtp_num_layers or 0) > 1:
        yield (
            "--mtp-use-repeated-layer: Megatron's own losses count the last rows of each sample, "
            "which have no next token to predict"
        )
    if model_config.moe_router_enable_expert_bias:
        yield "the expert bias changes which experts are chosen, but not the scores that are aligned"
