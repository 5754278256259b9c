"""What a recipe may say of its data: where the examples come from, which are drawn, and which language is the anchor."""

from typing import Any, Self

from pydantic import NonNegativeFloat, model_validator

from ramoe_megatron.recipe.section import Names, Section


class Data(Section):
    """Where the examples come from: exactly one of `world`, `sib200` and `files`."""

    world: dict[str, Any] | None = None
    """Settings of the embedded world (the fields of `ramoe_megatron.data.world.WorldConfig`); `{}` takes them all as
    they are."""
    sib200: dict[str, Any] | None = None
    """SIB-200 (the fields of `ramoe_megatron.data.benchmarks.sib200.SibConfig`): `source` is the folder of the languages."""
    files: Names | None = None
    """Parallel JSONL: files, folders, or a hub name."""
    general: Names | None = None
    """General English text for the expert profile (needed with `files`; the generated data bring their own)."""
    pretrain: Names | None = None
    """What the base model is trained on (with `files` and `pretrain`; the generated data bring their own)."""
    columns: dict[str, str] = {}
    """Field of the parallel format -> the files' own column."""
    weights: dict[str, NonNegativeFloat] = {}
    """Pattern TASK/LANGUAGE -> share of the fine-tuning samples; without it, seeded epochs over all examples."""
    pretrain_weights: dict[str, NonNegativeFloat] = {}
    """The same for the base model's training; without it, those that the generated data bring along."""
    anchor: str | None = None
    """The language whose routing is the target; "en" when left out ("eng_Latn" for SIB-200)."""
    languages: Names | None = None
    """Target languages; all that the data hold when left out."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("world", "sib200", "files") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of world, sib200 and files; found {', '.join(given) or 'none of them'}")
        if self.files is not None and not self.general:
            raise ValueError("files needs general: English text that the task experts are told apart from")
        if self.files is None and (self.general or self.pretrain):
            raise ValueError(f"general and pretrain belong to files; {given[0]} brings its own")
        if self.sib200 is not None and not isinstance(self.sib200.get("source"), str):
            raise ValueError("sib200 needs source: the folder of the languages, as downloaded")
        return self

    @property
    def anchor_language(self) -> str:
        """The anchor, resolved."""
        return self.anchor or str((self.sib200 or {}).get("anchor") or ("en" if self.sib200 is None else "eng_Latn"))
