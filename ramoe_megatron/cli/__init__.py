"""The `ramoe` command."""

from ramoe_megatron.cli.commands import main

__all__ = ["main"]
