"""Training with nothing of ours but the data: what "off" must equal bit for bit.

Stock routers, and Megatron's own way to leave padding out of their losses: the model's `padding_mask`."""

from functools import partial


def forward_step(data_iterator, model):
    import torch

    from ramoe_megatron.mcore.train.step import masked_loss

    batch = next(data_iterator)
    padding_mask = torch.arange(batch["tokens"].shape[1])[None] >= batch["length"][:, None]
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        padding_mask=padding_mask,
    )
    return losses, partial(masked_loss, batch["loss_mask"])


def main() -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from ramoe_megatron.mcore import compat
    from ramoe_megatron.mcore.arguments import add_arguments
    from ramoe_megatron.mcore.train.datasets import dataset_provider

    compat.skip_helper_compilation()
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    config = compat.model_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        dataset_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
