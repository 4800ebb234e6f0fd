"""Methods in a model: how they are attached, trained, turned off and saved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from raytune_ft.config.methods import METHODS, MethodConfig
from raytune_ft.model.methods.base import Implementation, ParamGroup
from raytune_ft.model.methods.hooks import Read, attached
from raytune_ft.model.methods.pissa import PlainLora


def attach(base: nn.Module, method: MethodConfig) -> nn.Module:
    """The model with the method in it; only the weights of the method require a gradient.

    Raises:
        ModelError: the model cannot take the method.
    """
    return implementation(method).attach(base, method)


def param_groups(model: nn.Module, method: MethodConfig) -> dict[str, ParamGroup]:
    """By name, the trained weights whose optimizer settings differ from those of the run."""
    return implementation(method).groups(model, method)


def implementation(method: MethodConfig) -> Implementation:
    """The torch part of the method."""
    found: Implementation = METHODS[method.name].implementation()
    return found


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Keep PEFT from casting activations to float32, which autocast would cast back."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that the optimizer trains, by their names in the unwrapped model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_method(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which an adapted model computes what its base does.

    A model whose own weights train is left as it is: its base is the model before the first step.
    """
    found = attached(model)
    if found is not None:
        return found.disabled()
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def adapter_writer(
    model: nn.Module, saver: nn.Module | None = None
) -> Callable[[Read, Path], None] | None:
    """A function that writes the trained weights as an adapter; None for a whole model.

    `saver` may be a copy of the model on the meta device: PEFT takes all but the weights from it.
    """
    found = attached(model)
    if found is not None:
        return found.save
    if not isinstance(model, PeftModel):
        return None
    names, plain, shared = list(trained_parameters(model)), PlainLora(model), _shared_buffers(model)
    asked: Any = model if saver is None else saver
    written = asked.peft_config
    written.update({name: plain.config(each) for name, each in written.items()})

    def write(read: Read, directory: Path) -> None:
        # "auto" would ask the hub whether the embeddings were resized.
        asked.save_pretrained(
            str(directory),
            state_dict=plain.weights({name: read(name) for name in names}) | shared,
            save_embedding_layers=False,
        )

    return write


def _shared_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that all layers of an adapter share, such as VeRA's matrices."""
    return {
        name: buffer.cpu().clone()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name.startswith("base_model.") and not name.startswith("base_model.model.")
    }
