"""How an adapter changes each weight of its base, by the layers that PEFT makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from raytune_ft.config.methods import METHODS
from raytune_ft.errors import CheckpointError, ModelError, first_line
from raytune_ft.files import read_json
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune_ft.model.meta import Outline
from raytune_ft.model.methods.saved import unfoldable

PREFIX = "base_model.model."
_NAME = "default"
# Initialisations that subtract the adapter's initial delta from the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED = ("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_bdlora")


@dataclass(frozen=True)
class Delta:
    """What is added to one weight: keys of the adapter's file, and PEFT's scale.

    rows: W[out, in] + scale * B @ A; columns: W[in, out] + scale * (B @ A).T; experts: PEFT
    computes the delta; bias: b + scale * B's bias; layer: not a sum, PEFT's layer named `a`
    computes the whole weight. With a magnitude (DoRA), every output's row is then scaled to it.
    """

    kind: Literal["rows", "columns", "experts", "bias", "layer"]
    a: str
    b: str
    scale: float
    magnitude: str | None = None
    layer: Any = None


@dataclass(frozen=True)
class AdapterPlan:
    """`deltas` and `replaced` have the names of the model's weights as keys. `peft` is PEFT's model
    on the meta device. `replaced` holds keys of whole weights in the adapter's file, `shared` the
    keys of buffers that all layers use.
    """

    peft: Any
    config: Any
    deltas: Mapping[str, Delta]
    replaced: Mapping[str, str]
    shared: tuple[str, ...] = ()

    @property
    def touched(self) -> set[str]:
        """Names of the weights that the adapter changes."""
        return set(self.deltas) | set(self.replaced)


def read_adapter_config(adapter: Path) -> Any:
    """A PEFT adapter's configuration.

    Raises:
        CheckpointError: the folder holds no adapter, or its weights are pickles or missing.
        ModelError: an adapter of a kind that cannot be folded into weights.
    """
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{adapter} holds neither config.json nor {ADAPTER_WEIGHTS}"
            + (" (pickles are not loaded: they run code)" if pickled else "")
        )
    try:
        written = read_json(adapter / ADAPTER_CONFIG)
        kind = written.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} cannot be read: {error}") from error
    if own := unfoldable(adapter):
        raise ModelError(
            f"{own} of {adapter}",
            "works on activations, and cannot be folded into weights",
            "use it with its base, as docs/interventions.md says, or write --format adapter",
        )
    if kind not in _own_weights():
        raise _refused(adapter, f"peft_type={kind}", "has no delta that can be folded")
    for key in _REFUSED:
        if written.get(key):
            raise _refused(adapter, key, "cannot be folded")
    start = written.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ModelError(
            f"init_lora_weights={start} of {adapter}",
            "changed the base that the adapter was trained on",
            "save it with PEFT's path_initial_model_for_weight_conversion first",
        )
    try:
        return PeftConfig.from_pretrained(str(adapter))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} cannot be read: {error}") from error


def plan_adapter(outline: Outline, adapter: Path, found: Mapping[str, tuple[int, ...]]) -> Any:
    """Plan how the adapter changes a base on the meta device; `found` are the shapes in its file.

    Raises:
        CheckpointError: the file is not of this base.
        ModelError: see `read_adapter_config`.
    """
    config = read_adapter_config(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft: PeftModel = get_peft_model(outline.model, config)
    except (ValueError, RuntimeError, TypeError, AttributeError) as cause:
        reason = first_line(cause)
        raise CheckpointError(f"{adapter} is not an adapter of its base: {reason}") from cause
    peft.eval()
    _draw_indices(peft)
    parameters = dict(peft.named_parameters(remove_duplicate=False))
    own = {key_of(name): name for name in parameters if is_adapters(name)}
    shared = {key_of(name): tuple(buffer.shape) for name, buffer in shared_buffers(peft)}
    replaced = {key: base_name(key) for key in found if key not in own and key not in shared}
    replaced |= {key: base_name(key) for key, name in own.items() if not _is_tuners(name)}
    base = {base_name(n): tuple(p.shape) for n, p in parameters.items() if not is_adapters(n)}
    expected = {key: tuple(parameters[name].shape) for key, name in own.items()}
    expected |= {key: base[name] for key, name in replaced.items() if name in base}
    expected |= shared
    _require_same(adapter / ADAPTER_WEIGHTS, found, expected)
    deltas: dict[str, Delta] = {}
    for name, module in peft.named_modules():
        if isinstance(module, LoraLayer):
            deltas |= dict(_deltas(name, module, adapter))
        elif isinstance(module, BaseTunerLayer):
            deltas |= dict(_layer_deltas(name, module, adapter))
    names = {name: key for key, name in replaced.items()}
    return AdapterPlan(peft, config, deltas, names, tuple(shared))


def _draw_indices(peft: PeftModel) -> None:
    """Compute OFT's indices again: PEFT put them on the meta device with the base, where they
    would index nothing, without an error.
    """
    for module in peft.modules():
        if isinstance(module, OFTRotationModule):
            module.rows, module.cols = torch.triu_indices(module.block_size, module.block_size, 1)


def shared_buffers(peft: nn.Module) -> list[tuple[str, Any]]:
    """Buffers that an adapter draws once for all layers (VeRA)."""
    return [
        (name, buffer)
        for name, buffer in peft.named_buffers(remove_duplicate=False)
        if name.startswith("base_model.") and not name.startswith(PREFIX)
    ]


def key_of(name: str) -> str:
    """What PEFT calls a parameter of the adapter in its file."""
    name = name.replace(f".modules_to_save.{_NAME}.", ".")
    name = name.replace(f".lora_magnitude_vector.{_NAME}.weight", ".lora_magnitude_vector")
    return name.replace(f".{_NAME}", "")


def is_adapters(name: str) -> bool:
    """Whether a parameter of PEFT's model is the adapter's own."""
    return _is_tuners(name) or f".modules_to_save.{_NAME}." in name


def _is_tuners(name: str) -> bool:
    return any(f".{prefix}" in name for prefix in _own_weights().values())


def _own_weights() -> dict[str, str]:
    """For each kind of adapter that is folded, how PEFT begins the names of its own weights."""
    return {m.saved_as: m.own_weights for m in METHODS.values() if m.saved_as and m.own_weights}


def base_name(name: str) -> str:
    """What the base calls the weight behind a name in PEFT's model or file."""
    name = name.removeprefix(PREFIX)
    return name.replace(".base_layer", "").replace(".original_module", "")


def _deltas(name: str, module: Any, adapter: Path) -> Iterable[tuple[str, Delta]]:
    variant = type(module.lora_variant.get(_NAME)).__name__
    if variant not in ("NoneType", "DoraLinearVariant", "DoraEmbeddingVariant"):
        raise _refused(adapter, variant, "cannot be folded")
    scale = float(module.scaling[_NAME])
    target = base_name(name)
    if isinstance(module, ParamWrapper):
        parameter = module.get_param()
        kind: Any = "rows" if parameter.ndim == 2 else "experts"
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        yield f"{target}.{module.parameter_name}", Delta(kind, *keys, scale, layer=module)
        return
    magnitude = f"{name}.lora_magnitude_vector" if variant != "NoneType" else None
    if isinstance(module, Embedding):
        keys = f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
        yield f"{target}.weight", Delta("columns", *keys, scale, magnitude)
        return
    if not isinstance(module, Linear):
        raise _refused(adapter, f"{type(module).__name__} of {target}", "cannot be folded")
    kind = "columns" if module.fan_in_fan_out else "rows"
    keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    yield f"{target}.weight", Delta(kind, *keys, scale, magnitude)
    if module.lora_bias.get(_NAME):
        if magnitude is not None:
            raise _refused(adapter, "lora_bias with use_dora", "cannot be folded")
        yield f"{target}.bias", Delta("bias", "", f"{name}.lora_B.bias", scale)


def _layer_deltas(name: str, module: Any, adapter: Path) -> Iterable[tuple[str, Delta]]:
    layer, target = module.get_base_layer(), base_name(name)
    if not isinstance(layer, nn.Linear | Conv1D):
        raise _refused(adapter, f"{type(layer).__name__} of {target}", "cannot be folded")
    yield f"{target}.weight", Delta("layer", name, "", 1.0, layer=module)
    if layer.bias is not None:  # which factors of an output scale too
        yield f"{target}.bias", Delta("layer", name, "", 1.0, layer=module)


def _require_same(
    file: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses an adapter of another model: PEFT only warns, and leaves missing weights at 0."""
    if odd := sorted(set(found) ^ set(expected)):
        raise CheckpointError(
            f"{file} is the adapter of another model: {len(odd)} weights differ, "
            f"among them {odd[0]}"
        )
    for name, shape in found.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"{file} is not an adapter of its base: {name} has the shape {list(shape)}, "
                f"and the base asks for {list(expected[name])}"
            )


def _refused(adapter: Path, what: str, rule: str) -> ModelError:
    return ModelError(
        f"{what} of {adapter}",
        rule,
        "write an adapter of LoRA (rsLoRA, DoRA), IA3, VeRA or OFT, or a whole model",
    )
