"""Models whose weights are on torch's meta device: shapes and dtypes without values.

    build_shapes    from the configuration alone, also with a method: what `plan` counts
    shapes_of       a copy of a model that is there
    outline         from the headers of the files, with their names: what a fold reads row by row
    build           what is trained, for a strategy that reads only its own parts of the weights

For the last two `from_pretrained` itself builds the model, so that names, buffers, ties and
refusals are its own; it is given shadows, which have a shape and no elements, for the tensors of
the files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft.tuners.lora.dora
import peft.tuners.lora.layer
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_ft.config.methods import LoraMethod, MethodConfig
from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError, first_line
from raytune_ft.model.file_weights import (
    FileWeights,
    NotInParts,
    Place,
    Source,
    find_sources,
    same_values,
)
from raytune_ft.model.heads import Head, draw_head, train_head
from raytune_ft.model.load import (
    Precision,
    apply_method,
    auto_class,
    build_frozen,
    build_model,
    dtype_of,
    freeze,
    frozen_dtype,
    load_base,
    load_model_config,
)
from raytune_ft.model.methods import attach, virtual
from raytune_ft.tensors.read import TensorFiles


@dataclass(frozen=True)
class Outline:
    """A model whose weights are on the meta device, and which tensors of its files they are.

    `sources` has the names of the model's weights and of the buffers that lie in the files; other
    buffers hold their values. `pattern` is a copy that stays unchanged when layers are put into
    `model`. `head` is the task head that it was built with.
    """

    model: Any
    pattern: Any
    sources: dict[str, Source]
    files: tuple[Path, ...] = ()
    head: Head | None = None


def outline(model: ModelConfig, head: Head | None) -> Outline:
    """The model as `from_pretrained` would build it; of its files only the headers are read.

    Raises:
        ModelError: see `load_base`; or its weights can only be read all together.
    """
    try:
        base, seen = _load_without_weights(partial(load_base, model, torch.float32, head))
    except NotInParts as reason:
        raise ModelError(
            f"model.path={model.path}",
            f"cannot be read tensor by tensor, because {reason}",
            "write a model that transformers reads from safetensors as it is",
        ) from reason
    base = shapes_of(base)  # drops the values of a head that the files lack
    return Outline(base, copy.deepcopy(base), seen.sources, tuple(seen.files), head)


class BaseFiles:
    """The weights of a pretrained model, read from its files one by one."""

    def __init__(self, model: ModelConfig, head: Head | None) -> None:
        """
        Raises:
            ModelError: see `outline`.
        """
        self._outline = outline(model, head)

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """A weight in its shape, by the name that the model has for it."""
        with TensorFiles(self._outline.files) as tensors:

            def read(name: str) -> Tensor:
                source = self._outline.sources[name]
                if source.converter is None:
                    return tensors.whole(source.tensors[0][1])
                return source.weights(self._outline.pattern, tensors.whole)[name]

            yield read


META = torch.device("meta")


@dataclass(frozen=True)
class Built:
    """A model and, where it was built without them, its weights."""

    model: nn.Module
    weights: FileWeights | None = None
    notes: tuple[str, ...] = ()


def build(
    model: ModelConfig,
    method: MethodConfig,
    precision: Precision,
    seed: int,
    in_parts: bool,
    head: Head | None = None,
) -> Built:
    """What `build_model` builds; `in_parts`: with the weights of its base on the meta device.

    New weights and buffers hold their values. Where that is not possible the model is built whole,
    and `notes` says why.

    Raises:
        ModelError: see `load_base`.
    """
    whole = partial(build_model, model, method, precision, seed, head)
    if not in_parts:
        return Built(whole())
    dress = partial(
        apply_method,
        method=method,
        precision=precision,
        seed=seed,
        frozen=frozen_dtype(model, method, precision),
    )
    load = partial(load_base, model, dtype_of(model, method, precision), head)
    return _in_parts_or(whole, load, dress)


def build_base(model: ModelConfig, precision: Precision, in_parts: bool) -> Built:
    """What `build_frozen` builds; `in_parts`: with its weights on the meta device."""
    whole = partial(build_frozen, model, precision)
    if not in_parts:
        return Built(whole())
    dress = partial(freeze, precision=precision)
    load = partial(load_base, model, dtype_of(model, LoraMethod(), precision))
    return _in_parts_or(whole, load, dress)


def build_measured(
    model: ModelConfig, dtype: torch.dtype, in_parts: bool, head: Head | None
) -> Built:
    """What `load_base` loads; `in_parts`: with its weights on the meta device."""
    load = partial(load_base, model, dtype, head)
    return _in_parts_or(load, load, lambda base: base) if in_parts else Built(load())


Dress = Callable[[nn.Module], nn.Module]
"""Turns a base into the model that is trained."""


def _in_parts_or(
    whole: Callable[[], nn.Module], load: Callable[[], nn.Module], dress: Dress
) -> Built:
    try:
        return _build_in_parts(load, dress)
    except NotInParts as reason:
        note = f"every worker reads the whole model, because {reason}"
        return Built(whole(), notes=(note,))


def _build_in_parts(load: Callable[[], nn.Module], dress: Dress) -> Built:
    base, seen = _load_without_weights(load)
    pattern = copy.deepcopy(base)
    loaded = {
        id(parameter): Place(seen.sources[name], name, parameter.dtype)
        for name, parameter in seen.parameters.items()
        if name in seen.sources
    }
    with TensorFiles(seen.files) as tensors:

        def whole(parameter: nn.Parameter) -> Tensor:
            return loaded[id(parameter)].whole(pattern, tensors)

        try:
            with _beside_absent_weights(whole):
                built = dress(base)
        except (RuntimeError, NotImplementedError, KeyError) as error:
            raise NotInParts(f"the method needs them ({error})") from error
    places = {n: loaded[id(p)] for n, p in built.named_parameters() if id(p) in loaded}
    for name, parameter in built.named_parameters():
        if parameter.is_meta != (name in places):
            raise NotInParts(f"{name} is in none of its files")
    return Built(built, FileWeights(seen.files, places, pattern))


def _load_without_weights(load: Callable[[], nn.Module]) -> tuple[nn.Module, Seen]:
    """What `load` gives, its buffers there and the weights of its files on the meta device.

    Raises:
        NotInParts: the weights cannot be read tensor by tensor.
    """
    with shadows() as seen:
        base = load()
    if not seen.files:
        raise NotInParts("transformers reads its files in a way of its own")
    now = dict(base.named_parameters(remove_duplicate=False))
    for name, parameter in seen.parameters.items():
        if now[name] is not parameter:  # it has got a value that is not the file's
            seen.sources.pop(name, None)
    with TensorFiles(seen.files) as tensors:
        fill_buffers(base, seen.sources, tensors)
    return base, seen


def build_shapes(
    model: ModelConfig,
    method: MethodConfig | None = None,
    head: Head | None = None,
    **options: Any,
) -> nn.Module:
    """The model as its configuration describes it, every tensor on the meta device.

    With a `method` it is what is trained: weights that the method adds are there, and
    `requires_grad` says which weights are trained. `options` go to `from_config`.

    Raises:
        ModelError: the model cannot be read or built, or cannot take the method.
    """
    config = load_model_config(model, head)
    with META:
        base = _from_config(model, config, head, **options)
        if head is not None:
            draw_head(base, [], head.seed)
        if method is not None:
            base = attach(base, method)
            train_head(base)
    return base


def _from_config(model: ModelConfig, config: Any, head: Head | None, **options: Any) -> nn.Module:
    """Raises ModelError, whatever a class of transformers raises about its configuration."""
    try:
        found: nn.Module = auto_class(head).from_config(
            copy.deepcopy(config), trust_remote_code=model.trust_remote_code, **options
        )
    except Exception as error:
        if options:  # it may support eager attention alone
            return _from_config(model, config, head)
        raise ModelError(
            f"model.path={model.path}",
            f"is a {config.model_type} model, which transformers cannot build here "
            f"({first_line(error)})",
            "write a model that AutoModelForCausalLM loads",
        ) from error
    kind = type(found.config)
    if not hasattr(config, "auto_map") and kind not in auto_class(head)._model_mapping:
        raise ModelError(
            f"model.path={model.path}",
            f"is a {config.model_type} model, whose text part transformers cannot load again",
            "write a model that AutoModelForCausalLM loads",
        )
    return found


def shapes_of(base: nn.Module) -> nn.Module:
    """A copy of a model whose weights are on the meta device."""
    absent: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device=META), requires_grad=False)
        for p in base.parameters()
    }
    return copy.deepcopy(base, absent)


def apply_beside_shapes(
    shapes: nn.Module, method: MethodConfig, precision: Precision, seed: int
) -> nn.Module:
    """What `apply_method` makes of a copy of `shapes`, which comes from `shapes_of`.

    New weights hold the values that `apply_method` draws from `seed`. For methods that do not read
    the weights of their base.
    """

    def whole(parameter: nn.Parameter) -> Tensor:
        raise AssertionError("the method reads the weights of its base")

    with _beside_absent_weights(whole):
        return apply_method(shapes_of(shapes), method, precision, seed)


@dataclass
class Seen:
    """What `shadows` recorded of a `from_pretrained`; `parameters` keeps their ids valid."""

    files: list[Path] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class _Shadow:
    """A tensor of a file without elements, with the two operations that transformers uses."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def __getitem__(self, _: Any) -> _Shadow:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


@contextmanager
def shadows() -> Iterator[Seen]:
    """Inside, `from_pretrained` loads shadows in place of tensors.

    Raises:
        NotInParts: the weights cannot be read tensor by tensor; see its text.
    """
    seen = Seen()
    original = PreTrainedModel._load_pretrained_model

    def load(
        model: Any, state: Any, files: list[str] | None, settings: Any, expected: Any = None
    ) -> Any:
        if not files or not all(file.endswith(".safetensors") for file in files):
            raise NotInParts("its weights are not in safetensors files")
        if settings.hf_quantizer is not None:
            raise NotInParts("it is quantised")
        seen.files = [Path(file) for file in files]
        try:
            with TensorFiles(seen.files) as tensors:
                seen.sources = find_sources(model, tensors, settings.weight_mapping or [])
                again = _tied_twice(model, seen.sources, tensors, settings.dtype)
                stand_ins = {
                    name: _Shadow(shape, tensors.dtype(name))
                    for name, shape in tensors.shapes.items()
                    if name not in again
                }
        except ModelError as error:
            raise OSError(f"{error.value} {error.rule}") from error
        result = original(model, stand_ins, None, settings, expected)
        if result[0].conversion_errors:
            raise NotInParts("its weights are converted by their values")
        seen.parameters = dict(model.named_parameters(remove_duplicate=False))
        return result

    with _replaced(PreTrainedModel, "_load_pretrained_model", staticmethod(load)):
        yield seen


def _tied_twice(
    model: Any, sources: dict[str, Source], tensors: TensorFiles, dtype: torch.dtype
) -> set[str]:
    """Tensors of the files to leave out, because they repeat the weight that they are tied to.

    As in `from_pretrained`, weights with different values in the files are not tied.
    """
    repeated = set()
    for target, origin in list((model.all_tied_weights_keys or {}).items()):
        if target in sources and origin in sources:
            both = [sources[target], sources[origin]]
            if any(source.converter is not None for source in both):
                raise NotInParts(f"{target} is tied and converted")
            one, other = (source.tensors[0][1] for source in both)
            if same_values(tensors, one, other, dtype):
                repeated |= {name for _, name in sources.pop(target).tensors}
            else:
                model.all_tied_weights_keys.pop(target)
    return repeated


@torch.no_grad()
def fill_buffers(base: nn.Module, sources: dict[str, Source], tensors: TensorFiles) -> None:
    """Read the buffers that lie in the files; every process holds them whole.

    Raises:
        NotInParts: one without a value is in none of the files.
    """
    for path, module in base.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            key = f"{path}.{name}" if path else name
            if buffer.is_meta:
                if key not in sources:
                    raise NotInParts(f"{key} is in none of its files")
                value = Place(sources[key], key, buffer.dtype).whole(base, tensors)
                module._buffers[name] = value.clone()


@contextmanager
def _beside_absent_weights(whole: Callable[[nn.Parameter], Tensor]) -> Iterator[None]:
    """Inside, PEFT builds its layers for real around weights on the meta device.

    PEFT moves new weights to the device of their base; here they stay on the CPU. Where it computes
    them from a base weight, it announces that to DeepSpeed, and here gets the weight for that long.
    """
    original, move = BaseTunerLayer._get_base_layer_device_and_dtype, nn.Module.to

    def to(self: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        if arguments and arguments[0] == META:
            return move(self, **options) if options else self
        return move(self, *arguments, **options)

    def device_and_dtype(self: BaseTunerLayer, layer: nn.Module) -> Any:
        device, dtype = original(self, layer)
        return torch.device("cpu") if device == META else device, dtype

    @contextmanager
    def gathered(wanted: Iterable[nn.Parameter] | nn.Parameter) -> Iterator[None]:
        parameters = [wanted] if isinstance(wanted, nn.Parameter) else list(wanted)
        absent = [(p, nn.Parameter(whole(p), p.requires_grad)) for p in parameters if p.is_meta]
        for parameter, value in absent:
            torch.utils.swap_tensors(parameter, value)
        try:
            yield
        finally:
            for parameter, value in absent:
                torch.utils.swap_tensors(parameter, value)

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(_replaced(BaseTunerLayer, "_get_base_layer_device_and_dtype", device_and_dtype))
        enter(_replaced(nn.Module, "to", to))
        for module in (peft.tuners.lora.dora, peft.tuners.lora.layer, virtual):
            enter(_replaced(module, "gather_params_ctx", gathered))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces what a library does not let one configure; docs/seams.md lists every use."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
