"""A user's own DeepSpeed JSON: which of its keys are passed on, and which contradict the config.

A key is one of three kinds. It reaches DeepSpeed as it is; or it says what the config says too and
must say the same; or it would change what is computed and is refused. "auto", which is how the
integration of Hugging Face asks for the trainer's value, is accepted wherever a value is.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError

AUTO = "auto"
KEY = "parallel.deepspeed"
# Sections and keys that reach DeepSpeed. They set sizes of buffers, what is overlapped, printed
# or timed; some mean nothing here and come with many files.
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
# Values that change nothing, of keys that otherwise would. "*" stands for any key of a section.
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
    "prescale_gradients": (False,),
    "progressive_layer_drop.enabled": (False,),
    "quantize_training.enabled": (False,),
    "sparse_gradients": (False,),
    "zero_allow_untested_optimizer": (True, False),
    "zero_force_ds_cpu_optimizer": (False,),
    "zero_optimization.compute_grad_norm": (True,),
    "zero_optimization.cpu_offload": (False,),
    "zero_optimization.cpu_offload_params": (False,),
    "zero_optimization.legacy_stage1": (False,),
    "zero_optimization.mics_shard_size": (-1,),
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
    """What reaches DeepSpeed of the file, which `check` has accepted."""
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
    searched = config.search.space if config.search else {}
    for key, value in _leaves(_without_auto(_read(file))):
        if _is_passed(key):
            continue
        if key in ours:
            here, accepted, instead = ours[key]
            if here in searched:
                said = f"contradicts search.space.{here}, which varies it"
                raise ConfigError(f"{key}={_shown(value)} in {file.name}", said, _remedy(None))
            if not any(_same(value, one) for one in accepted):
                said = f"contradicts {here}={_plain(config, here)}"
                raise ConfigError(f"{key}={_shown(value)} in {file.name}", said, _remedy(instead))
        elif key in HARMLESS:
            if not any(_same(value, one) for one in HARMLESS[key]):
                said = "contradicts this package, where the layout does not change the numbers"
                fine = HARMLESS[key][0]
                raise ConfigError(f"{key}={_shown(value)} in {file.name}", said, _remedy(fine))
        else:
            _refuse_unknown(key, value, file.name, [*PASSED, *HARMLESS, *ours])


def _ours(config: Config) -> dict[str, tuple[str, tuple[Any, ...], Any]]:
    """Keys that say what a key of the config says: that key, values that agree, one to write."""
    train, parallel = config.train, config.parallel
    bfloat16 = train.precision == "bfloat16"
    host = ("cpu",)
    device = (None, "none")
    optimizer = host if parallel.offload != "none" else device
    weights = host if parallel.offload == "all" else device
    betas = [train.adam_beta1, train.adam_beta2]
    norm = train.max_grad_norm or 0
    found: dict[str, tuple[str, tuple[Any, ...], Any]] = {
        "train_batch_size": ("train.batch_size", (train.batch_size,), train.batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_tokens", (), None),
        "gradient_accumulation_steps": ("train.micro_tokens", (), None),
        "gradient_clipping": ("train.max_grad_norm", (norm,), norm),
        "optimizer.params.lr": ("train.lr", (train.lr,), train.lr),
        "optimizer.params.betas": ("train.adam_beta1", (betas,), betas),
        "optimizer.params.eps": ("train.adam_epsilon", (train.adam_epsilon,), train.adam_epsilon),
        "optimizer.params.weight_decay": (
            "train.weight_decay",
            (train.weight_decay,),
            train.weight_decay,
        ),
        "bf16.enabled": ("train.precision", (bfloat16,), bfloat16),
        "bfloat16.enabled": ("train.precision", (bfloat16,), bfloat16),
        "torch_autocast.enabled": ("train.precision", (bfloat16,), bfloat16),
        "zero_optimization.stage": (
            "parallel.zero_stage",
            (parallel.zero_stage,),
            parallel.zero_stage,
        ),
        "zero_optimization.offload_optimizer": ("parallel.offload", (None,), None),
        "zero_optimization.offload_param": ("parallel.offload", (None,), None),
        "zero_optimization.offload_optimizer.device": (
            "parallel.offload",
            optimizer,
            optimizer[-1],
        ),
        "zero_optimization.offload_param.device": ("parallel.offload", weights, weights[-1]),
    }
    return found


def _is_passed(key: str) -> bool:
    first, _, rest = key.partition(".")
    if first == "zero_optimization":
        section, _, name = rest.partition(".")
        if section in ("offload_optimizer", "offload_param") and name in PASSED_OFFLOAD:
            return True
        return section in PASSED_ZERO or not rest
    # AdamW under another of its names, and a schedule of which nothing but "auto" is written.
    return first in PASSED or key in ("optimizer", "scheduler")


def _refuse_unknown(key: str, value: Any, name: str, known: list[str]) -> None:
    shown = f"{key}={_shown(value)} in {name}"
    if key == "optimizer.type":
        if str(value).lower() not in ("adam", "adamw"):
            raise ConfigError(
                shown, "contradicts this package, which trains with AdamW", _remedy("AdamW")
            )
        return
    if key == "scheduler.type":
        return
    if key.startswith("scheduler."):
        raise ConfigError(shown, "contradicts train.lr_schedule", _remedy(None))
    near = difflib.get_close_matches(
        key, [*known, *(f"zero_optimization.{k}" for k in PASSED_ZERO)], 1, 0.8
    )
    raise ConfigError(
        shown,
        "is no key that this package hands to DeepSpeed",
        f"did you mean {near[0]}?" if near and near[0] != key else "leave it out",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{KEY}={path}", f"cannot be read ({error.strerror})", "write an existing JSON file"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{KEY}={path}", f"is not JSON ({error})", "mend it") from None
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
    return bool(a == b)


def _plain(config: Config, dotted: str) -> str:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return _shown(value)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _remedy(instead: Any) -> str:
    shown = f"{json.dumps(instead)}, " if instead is not None else ""
    return f'write {shown}"auto", or leave the key out'
