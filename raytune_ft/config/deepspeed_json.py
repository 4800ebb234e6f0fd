"""A user's own DeepSpeed JSON: which of its keys are passed on, and which contradict the config.

A key is passed to DeepSpeed unchanged; or it repeats a key of the config and must have the same
value; or it would change what is computed and is refused. "auto", by which the integration of
Hugging Face asks for the trainer's value, is accepted everywhere.

The lists are ours because DeepSpeed refuses unknown keys in `zero_optimization` alone, and only in
a worker; a misspelt section would be ignored. tests/unit/config/test_deepspeed_json.py compares
them with DeepSpeed's own classes, so that a release with other keys is noticed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError
from raytune_ft.files import read_json

AUTO = "auto"
KEY = "parallel.deepspeed"
# Sections and keys that are passed on. They set sizes of buffers, and what is overlapped, printed
# or timed; some have no effect here and occur in many files.
PASSED = {
    "aio",
    "checkpoint",
    "comms_logger",
    "csv_monitor",
    "dataloader_drop_last",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
}
PASSED_ZERO = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "elastic_checkpoint",
    "ignore_unused_parameters",
    "leaf_module",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "overlap_comm",
    "parameter_alignment",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
}
PASSED_OFFLOAD = {"buffer_count", "buffer_size", "fast_init", "max_in_cpu", "pin_memory"}
# Keys that would change the numbers, and the values under which they do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "amp.enabled": (False,),
    "autotuning.enabled": (False,),
    "communication_data_type": ("fp32", None),
    "curriculum_learning.enabled": (False,),
    "data_efficiency.enabled": (False,),
    "data_types.grad_accum_dtype": ("fp32", None),
    "data_types.param_dtype": ("fp32", None),
    "eigenvalue.enabled": (False,),
    "elasticity.enabled": (False,),
    "fp16.enabled": (False,),
    "gradient_allreduce_op": ("mean",),
    "gradient_predivide_factor": (1,),
    "managed_gradient_accumulation": (True,),
    "optimizer": (None,),
    "optimizer.legacy_fusion": (False,),
    "optimizer.params.adam_w_mode": (True,),
    "optimizer.params.bias_correction": (True,),
    "optimizer.params.torch_adam": (True, False),
    "optimizer.type": ("AdamW", "Adam"),
    "prescale_gradients": (False,),
    "progressive_layer_drop.enabled": (False,),
    "quantize_training.enabled": (False,),
    "scheduler": (None,),
    "sparse_gradients": (False,),
    "zero_allow_untested_optimizer": (True, False),
    "zero_force_ds_cpu_optimizer": (False,),
    "zero_optimization.compute_grad_norm": (True,),
    "zero_optimization.cpu_offload": (False,),
    "zero_optimization.cpu_offload_param": (False,),
    "zero_optimization.legacy_stage1": (False,),
    "zero_optimization.offload_optimizer.pipeline_read": (False,),
    "zero_optimization.offload_optimizer.pipeline_write": (False,),
    "zero_optimization.offload_optimizer.ratio": (1,),
    "zero_optimization.offload_optimizer.super_offload": (False,),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.zero_quantized_gradients": (False,),
    "zero_optimization.zero_quantized_nontrainable_weights": (False,),
    "zero_optimization.zero_quantized_weights": (False,),
}
# Sections that a switch turns off as a whole.
SWITCHED = tuple(key.removesuffix(".enabled") for key in HARMLESS if key.endswith(".enabled"))


def passed_on(path: str) -> dict[str, Any]:
    """The part of the file that DeepSpeed gets; `check` has accepted the file."""
    written = _without_auto(_read(Path(path)))
    kept = {key: value for key, value in written.items() if key in PASSED}
    zero = {}
    for key, value in written.get("zero_optimization", {}).items():
        if key in PASSED_ZERO:
            zero[key] = value
        elif key in ("offload_optimizer", "offload_param") and value:
            zero[key] = {name: item for name, item in value.items() if name in PASSED_OFFLOAD}
    return kept | {"zero_optimization": zero}


def check(config: Config, path: str) -> None:
    """ConfigError, naming the key, where the file at `path` contradicts the config."""
    file = Path(path)
    ours = _ours(config)
    for key, value in _leaves(_without_auto(_read(file))):
        shown = f"{key}={_shown(value)} in {file.name}"
        # A schedule without parameters is the config's.
        if _is_passed(key) or key == "scheduler.type":
            continue
        if key in ours:
            _check_same(config, ours[key], value, shown, file.name)
        elif key in HARMLESS:
            if not any(_same(value, one) for one in HARMLESS[key]):
                fine = json.dumps(HARMLESS[key][0])
                raise ConfigError(
                    shown, "would change the numbers", f"write {fine}, or leave the key out"
                )
        elif key.startswith("scheduler."):
            raise ConfigError(
                shown, f"contradicts train.lr_schedule={config.train.lr_schedule}", _auto(file.name)
            )
        else:
            near = difflib.get_close_matches(key, [*_known(), *ours], 1, 0.8)
            raise ConfigError(
                shown,
                "is not a key that is passed to DeepSpeed",
                f"did you mean {near[0]}?" if near else "leave it out",
            )


@dataclass(frozen=True)
class _Same:
    """A key of the config, the JSON values that agree, and what to write for another value."""

    here: str
    accepted: tuple[Any, ...]
    write: Callable[[Any], str | None]


def _check_same(config: Config, ours: _Same, value: Any, shown: str, file: str) -> None:
    if config.search and ours.here in config.search.space:
        rule = f"contradicts search.space.{ours.here}, which varies it"
        raise ConfigError(shown, rule, _auto(file))
    if not any(_same(value, one) for one in ours.accepted):
        text = ours.write(value)
        remedy = f'write {text}, or "{AUTO}" in {file}' if text else _auto(file)
        raise ConfigError(shown, f"contradicts {ours.here}={_plain(config, ours.here)}", remedy)


def _ours(config: Config) -> dict[str, _Same]:
    """Keys of the JSON that repeat a key of the config."""
    train, parallel = config.train, config.parallel

    def number(here: str) -> _Same:
        accepted = (getattr(train, here.removeprefix("train.")),)
        return _Same(here, accepted, lambda value: f"{here}: {value}" if _number(value) else None)

    def device(chosen: bool, offload: str) -> _Same:
        values = {"cpu": f"parallel.offload: {offload}", "none": "parallel.offload: none"}
        return _Same("parallel.offload", ("cpu",) if chosen else ("none", None), values.get)

    def betas(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) != 2:
            return None
        return f"train.adam_beta1: {value[0]} and train.adam_beta2: {value[1]}"

    precision = _Same(
        "train.precision",
        (train.precision == "bfloat16",),
        {True: "train.precision: bfloat16", False: "train.precision: float32"}.get,
    )
    stages = {stage: f"parallel.zero_stage: {stage}" for stage in (1, 2, 3)}
    norm = number("train.max_grad_norm")
    tokens = _Same("train.micro_tokens", (), lambda _: None)
    section = _Same("parallel.offload", (None,), lambda _: None)
    return {
        "train_batch_size": number("train.batch_size"),
        "train_micro_batch_size_per_gpu": tokens,
        "gradient_accumulation_steps": tokens,
        "gradient_clipping": replace(norm, accepted=(train.max_grad_norm or 0,)),
        "optimizer.params.lr": number("train.lr"),
        "optimizer.params.betas": _Same(
            "train.adam_beta1", ([train.adam_beta1, train.adam_beta2],), betas
        ),
        "optimizer.params.eps": number("train.adam_epsilon"),
        "optimizer.params.weight_decay": number("train.weight_decay"),
        "bf16.enabled": precision,
        "bfloat16.enabled": precision,
        "torch_autocast.enabled": precision,
        "zero_optimization.stage": _Same("parallel.zero_stage", (parallel.zero_stage,), stages.get),
        "zero_optimization.offload_optimizer": section,
        "zero_optimization.offload_param": section,
        "zero_optimization.offload_optimizer.device": device(
            parallel.offload != "none", "optimizer"
        ),
        "zero_optimization.offload_param.device": device(parallel.offload == "all", "all"),
    }


def _known() -> list[str]:
    return [*PASSED, *HARMLESS, *(f"zero_optimization.{key}" for key in PASSED_ZERO)]


def _is_passed(key: str) -> bool:
    first, _, rest = key.partition(".")
    if first == "zero_optimization":
        section, _, name = rest.partition(".")
        if section in ("offload_optimizer", "offload_param"):
            return name in PASSED_OFFLOAD
        return section in PASSED_ZERO
    return first in PASSED


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except OSError as error:
        raise ConfigError(
            f"{KEY}={path}", f"cannot be read ({error.strerror})", "write an existing JSON file"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{KEY}={path}", f"is not JSON ({error})", "correct the file") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{KEY}={path}", "holds no JSON object", 'write one, such as {"zero_optimization": {}}'
        )
    return content


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item != AUTO
    }


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, without what a section's own switch turns off."""
    for name, item in value.items():
        key = f"{prefix}{name}"
        if isinstance(item, dict):
            if not (key in SWITCHED and item.get("enabled", False) is False):
                yield from _leaves(item, f"{key}.")
        else:
            yield key, item


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, str) and isinstance(b, str):
        return a.lower() == b.lower()
    return bool(a == b)


def _plain(config: Config, dotted: str) -> str:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return _shown(value)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _auto(file: str) -> str:
    return f'write "{AUTO}" in {file}, or leave the key out'
