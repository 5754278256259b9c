"""Fine-tune (or train from scratch) with Megatron's own `pretrain()`, routing alignment beside its losses.

    torchrun --nproc-per-node N -m ramoe_megatron.jobs.finetune MEGATRON_FLAGS --ramoe-data FILE --ramoe-coeff X ...

Nothing is imported before it is needed: each rank's first checkpoint starts a process of Megatron's that imports this module again.
"""


def main() -> None:
    """Parse, build, train, save: all of it Megatron's."""
    from functools import partial

    from ramoe_megatron.mcore import compat
    from ramoe_megatron.mcore.align.attach import attach
    from ramoe_megatron.mcore.align.options import RoutingAlignmentConfig
    from ramoe_megatron.mcore.arguments import add_arguments
    from ramoe_megatron.mcore.checkpoint import explained_mismatch, starting_checkpoint, told_when_unfinished
    from ramoe_megatron.mcore.launch import is_rank_0, megatron_arguments, memory_peak

    with megatron_arguments(add_arguments, trains=True) as args:
        from megatron.training import pretrain
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        from ramoe_megatron.mcore.select.freeze import train_selected
        from ramoe_megatron.mcore.train.datasets import check_data, dataset_provider
        from ramoe_megatron.mcore.train.step import forward_step

        alignment = RoutingAlignmentConfig.from_args(args)
        check_data(args)
        model_config = compat.model_config_from_args(args)
        model_config.pre_wrap_hooks.append(partial(attach, config=alignment))
        train_selected(args, model_config)
        with explained_mismatch(starting_checkpoint(args)), told_when_unfinished(args):
            pretrain(
                pretrain_cfg_container_from_args(args, model_config),
                dataset_provider,
                compat.model_type(),
                forward_step,
            )
        if is_rank_0():
            print(f"ramoe: peak {memory_peak()}", flush=True)


if __name__ == "__main__":
    from ramoe_megatron.mcore.launch import run_job

    run_job(main)
