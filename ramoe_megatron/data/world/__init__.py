"""The embedded world: multilingual words and facts from CLDR, so that demo and tests need no download."""

from ramoe_megatron.data.world.build import ANCHOR, WorldConfig, WorldStats, build_world
from ramoe_megatron.data.world.facts import TASKS

__all__ = ["ANCHOR", "TASKS", "WorldConfig", "WorldStats", "build_world"]
