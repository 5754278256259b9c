"""The rows of packed samples: each run is compared with the padded one of the same samples.

Packs are filled in the order of the draws, so the first global batch of packs holds the first draws; how
many, the tokenizer decides. Importing this adds the rows to `layout_rows.ROWS`.
"""

import functools
from pathlib import Path

from data_rows import SmallTokenizer
from layout_rows import (
    CP,
    EVERY_LAYOUTS,
    FULL,
    KINDS,
    LAYOUTS,
    OPTIONS,
    PER_TOKEN,
    PP,
    SAME_LOSSES,
    TP,
    Row,
    add,
    add_every,
)
from small_run import stock_losses

from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.parallel import load_examples

PACKS, ROOM = 4, 104
MULTIPLES = {"PACKED": 1, "PACKED_CP": 4}  # of what a sample's room is: context parallelism slices each
ONE_PACK = {"PACKED_ONE": 1, "PACKED_ONE_CP": 4}


def pack(packs: int) -> tuple[str, ...]:
    flags = ("--ramoe-pack", "--micro-batch-size", "1", "--global-batch-size", str(packs))
    return (*flags, "--seq-length", str(ROOM), "--max-position-embeddings", str(ROOM))


PACK = pack(PACKS)

PACK_KINDS: dict[str, Row] = {kind: KINDS[kind] for kind in ("alone", "alone-tokens", "bare-tokens")}
for option in ("ci", "kl", "js", "mass", "token"):
    PACK_KINDS[option] = KINDS["alone"]._replace(flags=OPTIONS[option])
PACK_KINDS["ci-tokens"] = KINDS["alone"]._replace(flags=(*OPTIONS["ci"], *PER_TOKEN))
PACK_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    **{layout: LAYOUTS[layout] for layout in ("dp", "tp", "ep", "pp", "vpp", "tp-pp")},
    "cp": (2, CP),
    "tp-cp": (4, (*TP, *CP)),
    "full": (1, FULL),
    "pp-full": (2, (*PP, *FULL)),
    "cp-full": (2, (*CP, *FULL)),
}
SAME_PADDED: dict[str, str] = {}


def add_packed(name: str, kind: str, ranks: int = 1, flags: tuple[str, ...] = ()) -> None:
    """A packed row of a kind in a layout, to be the same as the padded one on one rank."""
    room = "PACKED_CP" if set(CP) <= set(flags) else "PACKED"
    SAME_PADDED[name] = f"padded-{kind}" if room == "PACKED" else f"padded-cp-{kind}"
    row = PACK_KINDS[kind]
    if SAME_PADDED[name] not in PADDED:
        PADDED.add(SAME_PADDED[name])
        add(
            SAME_PADDED[name],
            row._replace(flags=(*row.flags, "--micro-batch-size", "1", "--global-batch-size", room)),
        )
    add(name, row._replace(flags=(*row.flags, *PACK, *flags), ranks=ranks))


PADDED: set[str] = set()
for kind in PACK_KINDS:
    add_packed(f"packed-{kind}", kind)
for layout, (ranks, flags) in PACK_LAYOUTS.items():
    for kind in ("alone", "alone-tokens") if layout in ("dp", "tp", "pp", "cp") else ("alone-tokens",):
        add_packed(f"packed-{layout}-{kind}", kind, ranks, flags)
for layout in ("tp", "cp", "tp-cp"):
    for kind in ("kl", "token"):
        add_packed(f"packed-{layout}-{kind}", kind, *PACK_LAYOUTS[layout])


# Megatron's own losses at the routers. seq_aux_loss is of each sample, so packs are the padded samples, one
# by one. Per token the z-loss is a sum over tokens. The others are of a micro-batch: there a pack is the
# padded micro-batch of its samples.
for tokens, per_token in (("", ()), ("-tokens", PER_TOKEN)):
    losses = stock_losses("seq_aux_loss")[: 6 if per_token else 4]
    padded = ("--micro-batch-size", "1", "--global-batch-size", "PACKED")
    add(f"padded-seq{tokens}", Row((*per_token, *padded), lm=0, losses=losses, aligned=False))
    for layout in ("one", "dp", "tp", "pp"):
        ranks, flags = EVERY_LAYOUTS[layout]
        add(
            f"packed-seq-{layout}{tokens}",
            Row((*per_token, *PACK, *flags), ranks, lm=0, losses=losses, aligned=False),
        )
        SAME_LOSSES[f"packed-seq-{layout}{tokens}"] = f"padded-seq{tokens}"
    for layout in ("one", "tp", "pp", "cp"):
        ranks, flags = EVERY_LAYOUTS[layout]
        room, like = ("PACKED_ONE_CP", f"-cp{tokens}") if layout == "cp" else ("PACKED_ONE", tokens)
        if layout in ("one", "cp"):
            size = ("--micro-batch-size", room, "--global-batch-size", room)
            add_every(
                f"padded-every{like}", None, 1, (*per_token, *size, *(flags[2:] if layout == "cp" else ()))
            )
        add_every(
            f"packed-every-{layout}{tokens}", f"padded-every{like}", ranks, (*per_token, *pack(1), *flags)
        )


@functools.cache
def samples_of_first_packs(folder: Path, room: str) -> int:
    """Samples in the first global batch of packs."""
    examples = load_examples([str(folder / "parallel.jsonl")], split="train")
    tokenizer = SmallTokenizer((folder / "tokenizer.model").read_bytes())
    packs = PACKS if room in MULTIPLES else 1
    return len(
        PackedDataset(examples, tokenizer, ROOM, packs, 7, packs, multiple=(MULTIPLES | ONE_PACK)[room]).order
    )
