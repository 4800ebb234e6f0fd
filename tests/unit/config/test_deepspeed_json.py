"""Which keys of a user's DeepSpeed JSON are passed on, and what is said of the others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.deepspeed_json import HARMLESS, PASSED_OFFLOAD, PASSED_ZERO, passed_on
from raytune_ft.config.load import apply_overrides
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError

# What the documentation of Hugging Face shows for stage 3 with offload.
HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
OFFLOADED = {"parallel.offload": "all"}


def config(**changes: Any) -> Config:
    plain = Config.model_validate({"name": "a", "data": {"train": {"path": "train.jsonl"}}})
    values = {"parallel.strategy": "deepspeed", "parallel.deepspeed": "ds.json", **changes}
    return apply_overrides(plain, values)


def resolved(folder: Path, content: Any, **changes: Any) -> Config:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "ds.json").write_text(text)
    return resolve(config(**changes), folder)


def test_the_file_of_hugging_face_is_taken(tmp_path: Path) -> None:
    found = resolved(tmp_path, HUGGING_FACE, **OFFLOADED)
    assert found.parallel.deepspeed == str(tmp_path / "ds.json")
    assert passed_on(str(tmp_path / "ds.json")) == {
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "offload_optimizer": {"pin_memory": True},
            "offload_param": {"pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"zero_optimization": {"stage": 3, "offload_optimizer": None}},
        {"zero_optimization": {"offload_param": {"device": "none"}}},
        {"train_batch_size": 16, "gradient_clipping": 1.0, "bf16": {"enabled": True}},
        {"optimizer": {"type": "adamw", "params": {"lr": 2e-4, "betas": [0.9, 0.999]}}},
        {"amp": {"enabled": False, "opt_level": "O1"}, "fp16": {"enabled": False}},
        {"flops_profiler": {"enabled": True, "profile_step": 1}},
    ],
    ids=json.dumps,
)
def test_what_agrees_is_taken(tmp_path: Path, content: Any) -> None:
    resolved(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage=2 in ds.json contradicts parallel.zero_stage=3; "
            'write parallel.zero_stage: 2, or "auto" in ds.json',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device=cpu in ds.json contradicts "
            'parallel.offload=none; write parallel.offload: optimizer, or "auto" in ds.json',
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device=nvme in ds.json contradicts "
            'parallel.offload=none; write "auto" in ds.json, or leave the key out',
        ),
        (
            {"train_batch_size": 32},
            "train_batch_size=32 in ds.json contradicts train.batch_size=16; "
            'write train.batch_size: 32, or "auto" in ds.json',
        ),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu=1 in ds.json contradicts train.micro_tokens=auto; "
            'write "auto" in ds.json, or leave the key out',
        ),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps=4 in ds.json contradicts train.micro_tokens=auto; "
            'write "auto" in ds.json, or leave the key out',
        ),
        (
            {"gradient_clipping": 0.5},
            "gradient_clipping=0.5 in ds.json contradicts train.max_grad_norm=1.0; "
            'write train.max_grad_norm: 0.5, or "auto" in ds.json',
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            "optimizer.type=Lamb in ds.json would change the numbers; "
            'write "AdamW", or leave the key out',
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
            "optimizer.params.lr=0.1 in ds.json contradicts train.lr=0.0002; "
            'write train.lr: 0.1, or "auto" in ds.json',
        ),
        (
            {"optimizer": {"params": {"betas": [0.8, 0.9]}}},
            "optimizer.params.betas=[0.8, 0.9] in ds.json contradicts train.adam_beta1=0.9; "
            'write train.adam_beta1: 0.8 and train.adam_beta2: 0.9, or "auto" in ds.json',
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
            "scheduler.params.warmup_num_steps=10 in ds.json contradicts "
            'train.lr_schedule=cosine; write "auto" in ds.json, or leave the key out',
        ),
        (
            {"bf16": {"enabled": False}},
            "bf16.enabled=false in ds.json contradicts train.precision=bfloat16; "
            'write train.precision: float32, or "auto" in ds.json',
        ),
        (
            {"fp16": {"enabled": True}},
            "fp16.enabled=true in ds.json would change the numbers; "
            "write false, or leave the key out",
        ),
        (
            {"communication_data_type": "bf16"},
            "communication_data_type=bf16 in ds.json would change the numbers; "
            'write "fp32", or leave the key out',
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights=true in ds.json would change the numbers; "
            "write false, or leave the key out",
        ),
        (
            {"zero_optimisation": {"stage": 3}},
            "zero_optimisation.stage=3 in ds.json is not a key that is passed to DeepSpeed; "
            "did you mean zero_optimization.stage?",
        ),
        (
            {"compression_training": {"weight_quantization": 8}},
            "compression_training.weight_quantization=8 in ds.json is not a key that is passed to "
            "DeepSpeed; leave it out",
        ),
        (
            {"zero_optimization": 3},
            "zero_optimization=3 in ds.json is not a key that is passed to DeepSpeed; "
            "did you mean zero_optimization.stage?",
        ),
    ],
)
def test_a_contradiction_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolved(tmp_path, content)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "ds.json is not JSON (Expecting property name enclosed in double quotes: line 1"),
        ("[1]", "ds.json holds no JSON object; write one"),
        ("\xff", "ds.json is not JSON"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolved(tmp_path, text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(config(), tmp_path)
    assert str(refused.value) == (
        f"parallel.deepspeed={tmp_path}/ds.json cannot be read (No such file or directory); "
        "write an existing JSON file"
    )


def test_a_key_that_trials_vary(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"optimizer": {"params": {"lr": 0.0002}}}')
    space = {"train.lr": {"log_uniform": [1e-5, 1e-3]}}
    searching = config(search={"space": space})
    with pytest.raises(ConfigError, match=r"contradicts search.space.train.lr, which varies it"):
        resolve(searching, tmp_path)


# Keys of DeepSpeed's section that are refused, whatever their value: they change what is computed,
# or nothing here reads them.
REFUSED_ZERO = {
    "cpu_offload_use_pin_memory",
    "enable_sanity_checks",
    "override_module_apply",
    "pipeline_loading_checkpoint",
    "save_muon_momentum_buffer_in_memory",
    "zenflow",
}
REFUSED_OFFLOAD = {"cpuadam_cores_perc", "nvme_path"}


@pytest.mark.filterwarnings("ignore")
def test_every_key_of_deepspeed_is_classified() -> None:
    """DeepSpeed ignores unknown keys outside `zero_optimization`, so the lists must be ours."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def known(*models: Any) -> set[str]:
        return {
            field.alias or name for model in models for name, field in model.model_fields.items()
        }

    def harmless(section: str) -> set[str]:
        found = (key.removeprefix(f"{section}.") for key in HARMLESS if key.startswith(section))
        return {key for key in found if "." not in key}

    offload = "zero_optimization.offload_optimizer"
    ours = {"stage", "offload_optimizer", "offload_param"}
    zero = PASSED_ZERO | harmless("zero_optimization") | REFUSED_ZERO | ours
    assert zero == known(DeepSpeedZeroConfig)
    assert PASSED_OFFLOAD | harmless(offload) | REFUSED_OFFLOAD | {"device"} == known(
        offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        offload_config.DeepSpeedZeroOffloadParamConfig,
    )
