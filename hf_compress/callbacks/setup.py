"""Which setups of a Trainer compression callbacks can work in."""

from typing import Any

from transformers import PreTrainedModel, Trainer

from hf_compress.callbacks.access import plain_model
from hf_compress.callbacks.ranks import check_launched, check_parallelism, warn_of_lost_processes
from hf_compress.errors import TrainingError


def check_setup(trainer: Trainer) -> None:
    """Check that the Trainer runs the model in a way that compression callbacks can work with.

    Raises:
        TrainingError: For nn.DataParallel, DeepSpeed, FSDP version 1, tensor, context and sequence parallelism, a
            quantized model, trainable parameters that the optimizer does not have, or launched processes that the
            Trainer does not count.
    """
    if trainer.args.n_gpu > 1:
        raise TrainingError(
            f"one process drives {trainer.args.n_gpu} GPUs (nn.DataParallel), whose replicas would not share what the "
            "callbacks install. Start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if trainer.is_deepspeed_enabled:
        raise TrainingError("DeepSpeed hides gradients from callbacks. Use DDP or FSDP version 2.")
    if _fsdp_version(trainer) == 1:
        raise TrainingError("FSDP version 1 flattens parameters. Set fsdp_config={'version': 2}, or use DDP.")
    check_parallelism(trainer)
    check_launched(trainer.args)
    warn_of_lost_processes()
    given: Any = trainer.model
    model = plain_model(given)
    if getattr(model, "is_quantized", False):
        raise TrainingError(
            f"the {type(model).__name__} is quantized already (is_quantized is set); compress the floating-point model."
        )
    if trainer.optimizer is not None:  # there is none before training begins
        _check_optimizer(model, trainer.optimizer)


def _fsdp_version(trainer: Trainer) -> int | None:
    if trainer.is_fsdp_xla_enabled:
        return 1
    return trainer.accelerator.state.fsdp_plugin.fsdp_version if trainer.is_fsdp_enabled else None


def _check_optimizer(model: PreTrainedModel, optimizer: Any) -> None:
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    orphans = [name for name, parameter in trained if id(parameter) not in owned]
    if orphans:
        raise TrainingError(
            f"the optimizer lacks {len(orphans)} of the model's trainable parameters (first: {orphans[0]!r}), so they "
            "would never change. If the model changed since the last train(), set trainer.optimizer = "
            "trainer.lr_scheduler = None; if the optimizer is your own, give it all parameters or freeze these."
        )
