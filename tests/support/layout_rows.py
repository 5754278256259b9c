"""The rows that the layout tests read, as tables: which run, on how many ranks, with which flags.

A row is a run of the finetune job on the small model. `SAME_AS` names the one-rank row whose gradients and
figures it must have. A row costs about one CPU second a rank. So a combination of two things has rows only if
both rows of its parts could pass and the combination still fail.
"""

from typing import NamedTuple

from small_run import ALONE, SAMPLES, STOCK, stock_losses

TP, PP = ("--tensor-model-parallel-size", "2", "--sequence-parallel"), ("--pipeline-model-parallel-size", "2")
CP = ("--context-parallel-size", "2")
EP, VPP = ("--expert-model-parallel-size", "2"), (*PP, "--num-virtual-stages-per-pipeline-rank", "2")
ALLGATHER = ("--moe-token-dispatcher-type", "allgather")
ETP1 = (
    "--expert-tensor-parallel-size",
    "1",
)  # without it the experts are split as the rest is: ETP 2 under TP 2
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
BLOCK = (*FULL[:3], "block", "--recompute-num-layers", "2")  # one of the two aligned layers
PER_TOKEN = ("--calculate-per-token-loss",)
PROFILE_TARGET = ("--ramoe-target", "profile")

WORLDS = {
    "sigmoid": ("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    "dense": ("--moe-layer-freq", "[0,1,1,1]", "--moe-shared-expert-intermediate-size", "32"),
    "half": ("--moe-layer-freq", "[0,0,1,1]"),
    # Megatron cannot save multi-token prediction on two stages with tied embeddings. Factor 0: no gradient of
    # its language-model loss
    "mtp": (
        "--mtp-num-layers",
        "1",
        "--mtp-loss-scaling-factor",
        "0",
        "--untie-embeddings-and-output-weights",
    ),
}
WORLDS["every"] = (*WORLDS["sigmoid"], "--mtp-num-layers", "1", "--untie-embeddings-and-output-weights")
"""Models other than the plain one. Each has a base checkpoint and a profile, but for those in
`PROFILE_OF`."""

PROFILE_OF = {"mtp": "", "every": "sigmoid"}
"""The world whose profile a model takes: one with the same MoE layers."""


class Row(NamedTuple):
    """One run."""

    flags: tuple[str, ...] = ()
    ranks: int = 1
    lm: int = 1  # factor on the language-model loss
    losses: tuple[str, ...] = STOCK
    world: str = ""
    aligned: bool = True
    steps: int = 1
    ci: str = ""  # a taxonomy of `PLACEMENTS`


def selective(*modules: str) -> tuple[str, ...]:
    return ("--recompute-granularity", "selective", "--recompute-modules", *modules)


KINDS = {
    "alone": Row(lm=0, losses=ALONE),  # the alignment's gradient and nothing else
    "alone-tokens": Row(PER_TOKEN, lm=0, losses=ALONE),
    "whole": Row(),  # beside the language-model loss, the load-balancing loss and the z-loss
    "whole-tokens": Row(PER_TOKEN),
    "bare-tokens": Row(PER_TOKEN, losses=ALONE),  # beside the language-model loss
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp": (2, ()),
    "tp": (2, TP),
    "etp1": (2, (*TP, *EP, *ETP1)),
    "ep": (2, EP),
    "ep-allgather": (2, (*EP, *ALLGATHER)),
    "pp": (2, PP),
    "vpp": (2, VPP),
    "tp-ep": (4, (*TP, *EP)),  # ETP 2
    "tp-ep-etp1": (4, (*TP, *EP, *ETP1)),
    "tp-pp": (4, (*TP, *PP)),
    "ep-pp": (4, (*EP, *PP, "--use-distributed-optimizer")),
}
MICRO_BATCHES = {size: ("--micro-batch-size", str(size)) for size in (1, 2, SAMPLES)}
RECOMPUTED: dict[str, tuple[int, tuple[str, ...]]] = {
    "full": (1, FULL),
    "block": (1, BLOCK),
    "moe": (1, selective("moe")),
    "core": (1, selective("core_attn")),
    "both": (1, selective("core_attn", "moe")),
    "dp-full": (2, FULL),
    "tp-full": (2, (*TP, *FULL)),
    "pp-full": (2, (*PP, *FULL)),
    "pp-moe": (2, (*PP, *selective("moe"))),
    "vpp-full": (2, (*VPP, *FULL)),
    "vpp-moe": (2, (*VPP, *selective("moe"))),
    "tp-pp-full": (4, (*TP, *PP, *FULL)),
}

ROWS: dict[str, Row] = {f"one-{kind}": row for kind, row in KINDS.items()}
SAME_AS: dict[str, str] = {}


def add(name: str, row: Row, same_as: str | None = None) -> None:
    assert name not in ROWS
    ROWS[name] = row
    if same_as:
        SAME_AS[name] = same_as


def add_kinds(name: str, ranks: int, flags: tuple[str, ...], *kinds: str) -> None:
    for kind in kinds:
        add(
            f"{name}-{kind}",
            KINDS[kind]._replace(flags=(*KINDS[kind].flags, *flags), ranks=ranks),
            f"one-{kind}",
        )


WITH_MEGATRONS_LOSSES = ("dp", "tp", "ep", "pp", "tp-ep", "ep-pp")
for layout, (ranks, flags) in LAYOUTS.items():
    add_kinds(layout, ranks, flags, "alone", "alone-tokens")
    if layout in WITH_MEGATRONS_LOSSES:
        add_kinds(layout, ranks, flags, "whole", "whole-tokens")
for size, flags in MICRO_BATCHES.items():
    # the language-model loss is an invariant of the micro-batch under per-token loss alone
    add_kinds(f"micro{size}", 1, flags, "alone", "alone-tokens", "bare-tokens")
add_kinds("dp-micro8", 2, ("--micro-batch-size", "8"), "alone", "alone-tokens")  # one micro-batch
add_kinds("vpp-micro1", 2, (*VPP, "--micro-batch-size", "1"), "alone")
for name, (ranks, flags) in RECOMPUTED.items():
    add_kinds(name, ranks, flags, "alone-tokens", *(["alone"] if name.endswith("full") and ranks < 4 else []))

# Megatron's cross-entropy without per-token loss is a mean of the context-parallel ranks' means: not there
# beside ours, see `OTHERS`.
add_kinds("cp", 2, CP, "alone", "alone-tokens", "whole-tokens")
add_kinds("cp-full", 2, (*CP, *FULL), "alone-tokens")
add_kinds("tp-cp", 4, (*TP, *CP), "alone", "alone-tokens")
add_kinds("cp-pp", 4, (*CP, *PP), "alone-tokens")

# Options of ours: another way to pool has another way through the pieces of a sequence.
OPTIONS = {
    "ci": ("--ramoe-normalize", "ci"),
    "ci-tokens": ("--ramoe-normalize", "ci", *PER_TOKEN),
    "all": ("--ramoe-examples", "all"),
    "profile": PROFILE_TARGET,
    "kl": (
        *PROFILE_TARGET,
        "--ramoe-divergence",
        "kl",
        "--ramoe-tokens",
        "prompt",
        "--ramoe-examples",
        "ci+cc",
    ),
    "js": (*PROFILE_TARGET, "--ramoe-divergence", "js", "--ramoe-tokens", "response"),
    "mass": (*PROFILE_TARGET, "--ramoe-divergence", "mass", "--ramoe-tokens", "all"),
    "token": (*PROFILE_TARGET, "--ramoe-pooling", "token", "--ramoe-tokens", "prompt"),
}
for option, flags in OPTIONS.items():
    add(f"one-{option}", Row(flags))
for option in ("ci", "ci-tokens", "kl", "js", "token"):
    for layout in ("dp", "tp"):
        add(f"{layout}-{option}", Row((*LAYOUTS[layout][1], *OPTIONS[option]), ranks=2), f"one-{option}")
for option in ("kl", "token"):  # several tokens of a sample, on both ranks
    flags = (*PER_TOKEN, *OPTIONS[option])
    add(f"one-{option}-tokens", Row(flags))
    add(f"cp-{option}-tokens", Row((*flags, *CP), ranks=2), f"one-{option}-tokens")

# Other models. The MTP router is no business of ours: its model has the gradients of the same one without it.
for world in ("sigmoid", "dense", "half", "mtp"):
    flags = WORLDS[world]
    zone = ("--ramoe-layers", "0-1") if world in ("half", "mtp") else ()
    for layout, more in {"one": (), **{name: LAYOUTS[name][1] for name in ("dp", "tp", "pp")}}.items():
        for kind in ("alone", "whole") if world in ("half", "mtp") else ("alone", "alone-tokens"):
            row = KINDS[kind]._replace(
                flags=(*KINDS[kind].flags, *flags, *zone, *more),
                world=world,
                ranks=1 if layout == "one" else 2,
            )
            reference = None if layout == "one" else f"{world}-one-{kind}"
            add(f"{world}-{layout}-{kind}", row._replace(steps=3 if kind == "whole" else 1), reference)
add(
    "mtp-absent",
    KINDS["alone"]._replace(
        flags=("--untie-embeddings-and-output-weights", "--ramoe-layers", "0-1"), world="mtp"
    ),
)
SAME_AS["mtp-one-alone"] = "mtp-absent"
for module in ("mlp", "shared_experts"):
    row = KINDS["alone"]._replace(flags=(*WORLDS["dense"], *selective(module)), world="dense")
    add(f"dense-{module}", row, "dense-one-alone")
add("last-stage-one", KINDS["whole"]._replace(flags=("--ramoe-layers", "2-2"), steps=3))
add(
    "last-stage-pp",
    KINDS["whole"]._replace(flags=("--ramoe-layers", "2-2", *PP), ranks=2, steps=3),
    "last-stage-one",
)

# Other losses, some of which change with the layout: what is ours is the difference between a run with and
# one without alignment.
MIXED = (
    "--moe-router-load-balancing-type",
    "aux_loss",
    "seq_aux_loss",
    "--moe-aux-loss-coeff",
    "0.01",
    "0.01",
)
STOCK_LOSSES = {
    "global_aux_loss": stock_losses("global_aux_loss"),
    "mixed": MIXED,
}
OTHERS: dict[str, Row] = {
    **{
        f"{kind}-{layout}{'-tokens' * per_token}": Row(
            LAYOUTS[layout][1] + PER_TOKEN * per_token, 2, 0, losses
        )
        for kind, losses in STOCK_LOSSES.items()
        for layout, per_token in (("dp", False), ("dp", True), ("tp", False))
    },
    **{f"lm-micro{size}": Row(flags, losses=ALONE) for size, flags in MICRO_BATCHES.items()},
    "lm-cp": Row(CP, 2, losses=ALONE),
}
for name, row in OTHERS.items():
    add(f"{name}-both", row)
    add(f"{name}-stock", row._replace(aligned=False))

# All of Megatron's own losses at the routers, the expert bias and multi-token prediction with its loss, over
# samples of uneven length. What Megatron takes over padding would change with the padding (`LONGER`), and
# with the ranks that share a sequence.
EVERY = (
    "--moe-router-load-balancing-type",
    "aux_loss",
    "seq_aux_loss",
    "global_aux_loss",
    "--moe-aux-loss-coeff",
    *["0.01"] * 3,
)
EVERY = (*EVERY, "--moe-z-loss-coeff", "0.001")
LONGER = ("--seq-length", "48")
# Megatron takes the losses of multi-token prediction by context-parallel rank, as its cross-entropy.
WITHOUT_MTP_LOSS = ("--mtp-loss-scaling-factor", "0")
EVERY_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "full": (1, FULL),
    **{layout: LAYOUTS[layout] for layout in ("dp", "tp", "pp")},
    "cp": (2, (*CP, *WITHOUT_MTP_LOSS)),
    "tp-cp": (4, (*TP, *CP, *WITHOUT_MTP_LOSS)),
}
PADDING_MATTERS = ("one", "dp", "tp", "cp", "tp-cp")  # where ranks or micro-batches share the padding
SAME_LOSSES: dict[str, str] = {}
"""Rows with `EVERY`, and the row whose router gradients, expert biases and figures of Megatron's each must
have."""


def add_every(
    name: str, same_as: str | None, ranks: int, flags: tuple[str, ...], aligned: bool = False
) -> None:
    row = Row(
        (*WORLDS["every"], *flags), ranks, lm=int(aligned), losses=EVERY, world="every", aligned=aligned
    )
    add(name, row)
    if same_as:
        SAME_LOSSES[name] = same_as


for tokens, per_token in (("", ()), ("-tokens", PER_TOKEN)):
    add_every(f"every-one-nomtp{tokens}", None, 1, (*per_token, *WITHOUT_MTP_LOSS))
    for layout, (ranks, flags) in EVERY_LAYOUTS.items():
        # global_aux_loss changes with data parallelism
        one = {"one": None, "dp": None, "cp": f"every-one-nomtp{tokens}", "tp-cp": f"every-one-nomtp{tokens}"}
        add_every(
            f"every-{layout}{tokens}", one.get(layout, f"every-one{tokens}"), ranks, (*flags, *per_token)
        )
        if layout in PADDING_MATTERS:
            longer = (*flags, *per_token, *LONGER)
            add_every(f"every-{layout}-longer{tokens}", f"every-{layout}{tokens}", ranks, longer)
    for layout in ("one", "tp"):
        same = None if layout == "one" else f"every-one-aligned{tokens}"
        add_every(
            f"every-{layout}-aligned{tokens}",
            same,
            EVERY_LAYOUTS[layout][0],
            (*EVERY_LAYOUTS[layout][1], *per_token),
            aligned=True,
        )
    flags = (*per_token, *LONGER)
    add_every(f"every-one-aligned-longer{tokens}", f"every-one-aligned{tokens}", 1, flags, aligned=True)

for name, flags in (("every-twice", ()), ("every-evaluated", ("--eval-interval", "1", "--eval-iters", "2"))):
    add(name, Row((*WORLDS["every"], *flags), losses=EVERY, world="every", aligned=False, steps=2))

# Reduced precision, on samples of which no token's choice of experts is so close that rounding changes it.
SEED = ("--seed", "2")
PRECISIONS: dict[str, tuple[tuple[str, ...], float]] = {  # flags, loss scale
    "bfloat16": (("--bf16",), 1.0),
    "float16": (("--fp16", "--initial-loss-scale", "1024"), 1024.0),
    "float16-16": (("--fp16", "--loss-scale", "16"), 16.0),
}
for kind in ("alone", "alone-tokens"):
    add(f"float32-{kind}", KINDS[kind]._replace(flags=(*KINDS[kind].flags, *SEED)))
    for precision, (flags, _) in PRECISIONS.items():
        several = ("dp",) if kind == "alone-tokens" else ("tp",)
        for layout in ("one",) if precision == "float16-16" else ("one", *several):
            more = () if layout == "one" else LAYOUTS[layout][1]
            row = KINDS[kind]._replace(
                flags=(*KINDS[kind].flags, *SEED, *flags, *more), ranks=1 if layout == "one" else 2
            )
            add(f"{precision}-{layout}-{kind}", row)

# Where the ci samples fall. Two data-parallel ranks take turns of a micro-batch of 4: rank 0 has the draws
# 0-3 and 8-11 of a step.
PLACEMENTS: dict[str, tuple[int, ...]] = {  # draws that are ci, where their language is a target
    "uneven": (0, 1, 2, 3, 4, 8, 9, 10, 11),
    "one-rank": (0, 1, 2, 3, 8, 9, 10, 11),
    "one-micro": (0, 1, 2, 3),
    "single": (2,),
    "none": tuple(range(3 * SAMPLES, 4 * SAMPLES)),  # not in the first three steps
}
PLACED = {"one": (), "micro1": ("--micro-batch-size", "1"), "dp": (), "pp": PP}
for place in PLACEMENTS:
    for layout, flags in PLACED.items():
        for kind in ("alone",) if layout == "pp" else ("alone", "alone-tokens"):
            same_as = None if layout == "one" else f"{place}-one-{kind}"
            ranks = 2 if layout in ("dp", "pp") else 1
            steps = 3 if place == "none" else 1
            # no target is zero there: what is not aligned counts for nothing by its weight alone
            target = PROFILE_TARGET if place == "none" else ()
            row = KINDS[kind]._replace(
                flags=(*KINDS[kind].flags, *flags, *target), ranks=ranks, ci=place, steps=steps
            )
            add(f"{place}-{layout}-{kind}", row, same_as)
for layout in ("one", "dp", "pp"):
    for name, row in (("none", Row(PROFILE_TARGET, ci="none")), ("plain", Row(aligned=False))):
        row = row._replace(flags=(*row.flags, *PLACED[layout]), ranks=1 if layout == "one" else 2, steps=3)
        add(f"{name}-{layout}-whole", row)

LONG = 10
OFF = ("--ramoe-coeff", "0")
EVALUATED = ("--eval-interval", "3", "--eval-iters", "2")
for layout in ("one", "tp"):
    # With a padding mask, Megatron's own z-loss is another on two ranks that share a sequence
    # (`real_tokens`).
    losses = STOCK if layout == "one" else STOCK[:4]
    long = Row(() if layout == "one" else TP, 1 if layout == "one" else 2, losses=losses, steps=LONG)
    add(f"off-{layout}", long._replace(aligned=False))
    add(f"zero-{layout}", long._replace(flags=(*long.flags, *OFF)))
    add(f"through-{layout}", long)
    add(f"evaluated-{layout}", long._replace(flags=(*long.flags, *EVALUATED)))
add("through-distributed", Row(("--use-distributed-optimizer",), 2, steps=LONG))
