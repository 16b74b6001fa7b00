"""What no stage of training can take, said before it starts: models whose weights are not what they seem, or not there.

check_model(model)       weights that another mechanism computes, that have no values yet, or none that train
check_mode(model)        a step in eval mode
"""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from codeword.errors import MismatchError, PlanError

# What torch's older wrappers leave among the parameters in place of NAME -> the call that takes the wrapper off.
_WRAPPED = (
    (("_g", "_v"), "weight norm", "torch.nn.utils.remove_weight_norm({module}, {leaf!r})"),
    (("_orig", "_u"), "spectral norm", "torch.nn.utils.remove_spectral_norm({module}, {leaf!r})"),
    (("_orig", "_mask"), "torch.nn.utils.prune", "torch.nn.utils.prune.remove({module}, {leaf!r})"),
)


def check_model(model: nn.Module) -> None:
    """Refuses what a stage would train without effect.

    Raises MismatchError if it is no module; if a weight is computed from others at each forward pass (weight norm,
    spectral norm, any parametrization), so that what is written into it is lost; has no values yet; or none trains.
    """
    if not isinstance(model, nn.Module):
        raise MismatchError(
            f"training needs a torch.nn.Module, got a {type(model).__name__}; load the weights into one"
        )
    for name, module in model.named_modules():
        _check_wrappers(name, module, model)
        for leaf, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter):
                raise MismatchError(f"{_joined(name, leaf)!r} has no shape yet; run the model once on an input first")
            if parameter.is_meta:
                raise MismatchError(f"{_joined(name, leaf)!r} is on the meta device; load the weights first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        count = sum(1 for _ in model.parameters())
        raise MismatchError(
            f"none of the {count} parameters of this {type(model).__name__} trains; "
            "set requires_grad on those that shall: model.requires_grad_(True)"
        )


def check_mode(model: nn.Module) -> None:
    """Raises PlanError if the model is in eval mode, where dropout and running statistics are not those of training."""
    if not model.training:
        raise PlanError(
            f"this {type(model).__name__} is in eval mode at a training step; call model.train() before the loop "
            "(norms that must stay as they are: set those modules alone to eval() after it)"
        )


def _check_wrappers(name: str, module: nn.Module, model: nn.Module) -> None:
    """Raises MismatchError if a weight of this very module is made from other parameters."""
    place = f"model.{name}" if name else "model"
    owner = f"{name or type(model).__name__} ({type(module).__name__})"
    # The container that holds the originals of a parametrized module is no layer of its own.
    if is_parametrized(module):
        leaf, _ = next(module.get_submodule("parametrizations").named_children())
        raise MismatchError(
            f"{leaf!r} of {owner} is parametrized: what is trained is not what runs. Fold it in first: "
            f"torch.nn.utils.parametrize.remove_parametrizations({place}, {leaf!r})"
        )
    held = {leaf for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    for (trained, beside), what, way_out in _WRAPPED:
        for leaf in sorted(leaf.removesuffix(trained) for leaf in held if leaf.endswith(trained)):
            if leaf not in held and leaf + beside in held and hasattr(module, leaf):
                raise MismatchError(
                    f"{leaf!r} of {owner} is made from {leaf + trained!r} by {what}: what is trained is not what "
                    f"runs. Fold it in first: {way_out.format(module=place, leaf=leaf)}"
                )


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
