"""A user's training script whose forward step does not call the model exactly once inside `routing_batch`."""


def forward_step(data_iterator, model):
    from functools import partial

    from megatron.training import get_args

    from ramoe_megatron.mcore.align.batch import routing_batch
    from ramoe_megatron.mcore.train.step import masked_loss, next_batch

    batch = next_batch(data_iterator)
    losses = batch["loss_mask"].new_zeros(())
    with routing_batch(model, batch):
        for _ in range(get_args().model_calls):
            losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(masked_loss, batch["loss_mask"])


def main() -> None:
    from functools import partial

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from ramoe_megatron.mcore import compat
    from ramoe_megatron.mcore.align.attach import attach
    from ramoe_megatron.mcore.arguments import RoutingAlignmentConfig, add_arguments
    from ramoe_megatron.mcore.train.datasets import dataset_provider

    def arguments(parser):
        add_arguments(parser).add_argument("--model-calls", type=int)
        return parser

    compat.skip_helper_compilation()
    args = parse_and_validate_args(extra_args_provider=arguments)
    config = gpt_config_from_args(args)
    config.pre_wrap_hooks.append(partial(attach, config=RoutingAlignmentConfig.from_args(args)))
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        dataset_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
