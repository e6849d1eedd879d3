"""What is on a model while nothing trains it: left by a finished run because it has to stay, or by an interruption."""

from torch import nn

from hf_compress.instruments.attach import attachment_of


def instrumented_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that something is attached to, in the order of the model."""
    found = ((name, attachment_of(module)) for name, module in model.named_modules())
    return [name for name, attachment in found if attachment is not None and not attachment.is_empty()]


def make_gates_final(model: nn.Module) -> None:
    """Say that the gates that are on the model are the result of a run, and not what an interruption left."""
    for module in model.modules():
        attachment = attachment_of(module)
        if attachment is not None:
            attachment.final_gates = attachment.gates()


def modules_with_final_gates(model: nn.Module) -> list[str]:
    """Return the names of the modules that have gates of a finished run."""
    found = ((name, attachment_of(module)) for name, module in model.named_modules())
    return [name for name, each in found if each is not None and any(g in each.gates() for g in each.final_gates)]
