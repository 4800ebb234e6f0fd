"""The repeated blocks of a model, found in the model itself."""

from __future__ import annotations

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost repeated blocks by name, in order.

    They are the repeated modules among those that the model's classes list in `_no_split_modules`,
    where some also list embeddings that may be tied to the head. If these hold less than half as
    many parameters as the largest list of modules of one class, they are the modules of that list.
    """
    lists = _outermost(
        {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len({type(each) for each in module}) == 1
        }
    )
    largest = max(lists, key=lambda name: _size(lists[name]), default=None)
    named = _named_blocks(model)
    if largest is None or 2 * sum(map(_size, named.values())) >= _size(lists[largest]):
        return named
    return {f"{largest}.{name}": block for name, block in lists[largest].named_children()}


def _named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    classes: set[str] = set()
    for module in model.modules():
        classes |= set(getattr(module, "_no_split_modules", None) or ())
    return _outermost(
        {
            f"{outer}.{name}" if outer else name: module
            for outer, container in model.named_modules()
            if isinstance(container, _CONTAINERS)
            for name, module in container.named_children()
            if type(module).__name__ in classes
        }
    )


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that lie inside no other; in `modules` outer ones come first."""
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        parts = name.split(".")
        if not any(".".join(parts[:depth]) in found for depth in range(1, len(parts))):
            found[name] = module
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
