"""What the layout tests measured, by parallel layout: printed at the end of a test run."""

import itertools

from layout_rows import ROWS, Row


class Measured:
    """The worst relative error of the router gradients of each row, over its layers."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}

    def note(self, name: str, error: float) -> None:
        self.errors[name] = max(error, self.errors.get(name, 0.0))

    def table(self) -> list[str]:
        """One line for each layout: rows compared, and the worst of them."""
        groups: dict[str, list[float]] = {}
        for name, error in self.errors.items():
            groups.setdefault(layout(ROWS[name]), []).append(error)
        width = max(map(len, groups), default=0)
        return [f"{label:<{width}}  {len(errors):>3} rows  {max(errors):.1e}" for label, errors in sorted(groups.items())]


def layout(row: Row) -> str:
    """Such as "TP 2 x CP 2, packed, recompute full"."""
    flags = dict(itertools.pairwise([*row.flags, ""]))
    sizes = {"TP": 1, "CP": 1, "PP": 1}
    for flag, short in (("tensor-model", "TP"), ("context", "CP"), ("pipeline-model", "PP")):
        sizes[short] = int(flags.get(f"--{flag}-parallel-size", 1))
    sizes["DP"] = row.ranks // (sizes["TP"] * sizes["CP"] * sizes["PP"])
    parts = [f"{short} {size}" for short, size in sizes.items() if size > 1]
    if "--num-virtual-stages-per-pipeline-rank" in flags:
        parts.append("VPP 2")
    if "--expert-model-parallel-size" in flags:
        parts.append("EP 2" + (", ETP 1" if "--expert-tensor-parallel-size" in flags else ""))
    label = " x ".join(parts) or "one rank"
    if "--use-distributed-optimizer" in flags:
        label += ", distributed optimizer"
    if flags.get("--moe-token-dispatcher-type"):
        label += f", {flags['--moe-token-dispatcher-type']}"
    if "--ramoe-pack" in flags:
        label += ", packed"
    if "--recompute-granularity" in flags:
        label += f", recompute {flags['--recompute-granularity']}"
    precision = next((name.removeprefix("--") for name in ("--bf16", "--fp16") if name in flags), "")
    return f"{label} ({precision})" if precision else label


measured = Measured()
