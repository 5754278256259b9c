"""The rows of packed samples: each run is compared with the padded one of the same samples.

Packs are filled in the order of the draws, so the first global batch of packs holds the first draws; how many, the tokenizer decides.
Importing this adds the rows to `layout_rows.ROWS`.
"""

import functools
from pathlib import Path

from data_rows import SmallTokenizer
from layout_rows import CP, FULL, KINDS, LAYOUTS, OPTIONS, PER_TOKEN, PP, TP, Row, add

from ramoe_megatron.data.packing import PackedDataset
from ramoe_megatron.data.parallel import load_examples

PACKS, ROOM = 4, 104
MULTIPLES = {"PACKED": 1, "PACKED_CP": 4}  # of what a sample's room is: context parallelism slices each
PACK = ("--ramoe-pack", "--micro-batch-size", "1", "--global-batch-size", str(PACKS))
PACK = (*PACK, "--seq-length", str(ROOM), "--max-position-embeddings", str(ROOM))

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
        add(SAME_PADDED[name], row._replace(flags=(*row.flags, "--micro-batch-size", "1", "--global-batch-size", room)))
    add(name, row._replace(flags=(*row.flags, *PACK, *flags), ranks=ranks))


PADDED: set[str] = set()
for kind in PACK_KINDS:
    add_packed(f"packed-{kind}", kind)
for layout, (ranks, flags) in PACK_LAYOUTS.items():
    for kind in ("alone", "alone-tokens"):
        add_packed(f"packed-{layout}-{kind}", kind, ranks, flags)
for layout in ("tp", "cp", "tp-cp"):
    for kind in ("kl", "token"):
        add_packed(f"packed-{layout}-{kind}", kind, *PACK_LAYOUTS[layout])


@functools.cache
def samples_of_first_packs(folder: Path, room: str) -> int:
    """Samples in the first global batch of packs."""
    examples = load_examples([str(folder / "parallel.jsonl")], split="train")
    tokenizer = SmallTokenizer((folder / "tokenizer.model").read_bytes())
    packs = PackedDataset(examples, tokenizer, ROOM, PACKS, 7, PACKS, multiple=MULTIPLES[room])
    return len(packs.order)
