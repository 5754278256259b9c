"""`python -m ramoe_megatron.cli`: the `ramoe` command of this interpreter."""

from ramoe_megatron.cli import main

if __name__ == "__main__":
    main()
