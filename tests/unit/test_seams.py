"""Every private name of another library that this package uses is there, and on docs/seams.md."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import raytune_ft

ROOT = Path(__file__).parents[2]
PACKAGE = Path(raytune_ft.__file__).parent
PAGE = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
BOUNDED = ("torch", "transformers", "peft", "optuna", "ray", "deepspeed")

# A name and the parameters that it must have, in this order.
LOADING = "transformers.core_model_loading"
SCALING = "ray.train.v2._internal.execution.scaling_policy"
COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
CALLBACK = "ray.train.v2._internal.execution.callback"
FAILURES = "ray.train.v2._internal.execution.failure_handling"
EXCEPTIONS = "ray.train.v2._internal.exceptions"
NAMES: dict[str, str] = {
    "transformers.PreTrainedModel._load_pretrained_model": (
        "model state_dict checkpoint_files load_config expected_keys"
    ),
    "torch.nn.Module.to": "",
    "peft.tuners.tuners_utils.BaseTunerLayer._get_base_layer_device_and_dtype": "self base_layer",
    "peft.tuners.lora.dora.gather_params_ctx": "param",
    "peft.tuners.lora.layer.gather_params_ctx": "param",
    "peft.utils.integrations.gather_params_ctx": "param",
    "torch.utils._python_dispatch.TorchDispatchMode.__torch_dispatch__": (
        "self func types args kwargs"
    ),
    "torch.utils._pytree.tree_map": "func tree",
    "torch.utils._pytree.tree_leaves": "tree",
    "torch._subclasses.fake_tensor.FakeTensorMode": "allow_non_fake_inputs",
    "torch._C._SetExcludeDispatchKeyGuard": "",
    "torch.Tensor._version": "",
    "torch.UntypedStorage._cdata": "",
    "torch._C.FunctionSchema": "",
    "torch.ops.aten._unsafe_view.default": "",
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": (
        "global_shape mesh placements"
    ),
    "torch.nn.Module._apply": "self fn",
    f"{LOADING}.WeightConverter": "source_patterns target_patterns operations",
    f"{LOADING}.WeightConverter.add_tensor": "self target_key source_key source_pattern future",
    f"{LOADING}.WeightConverter.convert": "self layer_name model config",
    f"{LOADING}.WeightRenaming": "source_patterns target_patterns",
    f"{LOADING}.dot_natural_key": "s",
    f"{LOADING}.rename_source_key": (
        "source_key weight_renamings weight_converters base_model_prefix meta_state_dict"
    ),
    f"{LOADING}.revert_weight_conversion": "model state_dict",
    "transformers.GenerationMixin._supports_default_dynamic_cache": "",
    "transformers.GenerationMixin._update_model_kwargs_for_generation": "self outputs model_kwargs",
    "transformers.GenerationMixin.prepare_inputs_for_generation": (
        "self input_ids next_sequence_length past_key_values attention_mask is_first_iteration"
    ),
    "transformers.dynamic_module_utils.custom_object_save": "obj folder config",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": (
        "module query key value attention_mask dropout scaling is_causal"
    ),
    "transformers.integrations.sdpa_attention.repeat_kv": "hidden_states n_rep",
    "transformers.utils.chat_template_utils._compile_jinja_template": "chat_template",
    "transformers.utils.chat_template_utils._plain_template_data": "value",
    "transformers.utils.chat_template_utils._alias_reasoning_fields": "chat",
    "transformers.integrations.moe.grouped_mm_experts_forward": (
        "self hidden_states top_k_index top_k_weights"
    ),
    "transformers.masking_utils.sdpa_mask": "batch_size q_length kv_length",
    "transformers.masking_utils.causal_mask_function": "batch_idx head_idx q_idx kv_idx",
    "torch.nn.attention.varlen._varlen_attn": "",
    "torch._C._distributed_c10d._dump_fr_trace_json": "",
    "torch.nn.attention.varlen.varlen_attn": (
        "query key value cu_seq_q cu_seq_k max_q max_k scale window_size enable_gqa"
    ),
    "transformers.PreTrainedConfig._attn_implementation": "",
    "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func": (
        "gate_logits num_experts top_k"
    ),
    "transformers.AutoModelForCausalLM._model_mapping": "",
    "transformers.AutoModelForMaskedLM._model_mapping": "",
    "transformers.AutoModelForSequenceClassification._model_mapping": "",
    "peft.tuners._buffer_dict.BufferDict": "buffers persistent",
    "peft.tuners.tuners_utils._check_lora_target_modules_mamba": "peft_config model target_name",
    "peft.tuners.tuners_utils.BaseTunerLayer._cast_input_dtype": "self x dtype",
    "peft.tuners.lora.ParamWrapper": "base_layer adapter_name parameter_name",
    "peft.tuners.oft.layer.OFTRotationModule": "r n_elements block_size in_features",
    "optuna.trial.Trial._suggest": "self name distribution",
    "optuna.samplers.CmaEsSampler._restore_optimizer": "self completed_trials",
    "optuna.samplers.CmaEsSampler._init_optimizer": "self trans direction",
    "optuna.samplers.CmaEsSampler._attr_key_generation": "",
    "ray._private.ray_constants.ENABLE_RAY_CLUSTER": "",
    "ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE": "",
    "ray._private.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR": "",
    "ray.core.generated.gcs_service_pb2.GetAllNodeInfoRequest": "",
    "ray.core.generated.gcs_service_pb2_grpc.NodeInfoGcsServiceStub": "channel",
    "ray._raylet.AuthenticationTokenLoader.has_token": "",
    "ray._raylet.AuthenticationTokenLoader.get_raw_token": "",
    "ray.job_submission.JobSubmissionClient._do_request": "self method endpoint",
    "ray.job_submission.JobSubmissionClient._raise_error": "self r",
    "ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS": "",
    "ray.experimental.internal_kv._internal_kv_get": "key",
    "ray.autoscaler._private.util.format_readonly_node_type": "node_id",
    "ray.autoscaler.v2.utils.is_autoscaler_v2": "fetch_from_server",
    f"{COORDINATOR}.get_or_create_autoscaling_coordinator": "",
    f"{COORDINATOR}._AutoscalingCoordinatorActor.request_resources": (
        "self requester_id resources expire_after_s priority label_selectors"
    ),
    "ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator"
    ".ResourceRequestPriority.HIGH": "",
    f"{COORDINATOR}._AutoscalingCoordinatorActor.cancel_request": "self requester_id",
    "ray._private.state.state.get_draining_nodes": "",
    "ray._private.state.state.available_resources_per_node": "",
    "ray._private.state.state.total_resources_per_node": "",
    "ray.train.torch.config._set_torch_distributed_env_vars": "",
    "ray.train.v2._internal.execution.context.get_train_context": "",
    "ray.train.v2._internal.callbacks.DatasetsCallback": "train_run_context datasets",
    "ray.train.v2._internal.callbacks.placement_group_callback.PlacementGroupCleanerCallback": "",
    f"{CALLBACK}.ControllerCallback.after_controller_start": "self train_run_context",
    f"{CALLBACK}.WorkerGroupCallback.before_init_train_context": "self workers",
    f"{CALLBACK}.WorkerGroupCallback.after_worker_group_start": "self worker_group",
    f"{CALLBACK}.WorkerGroupCallback.after_worker_group_shutdown": "self worker_group_context",
    f"{CALLBACK}.ReportCallback": "",
    f"{FAILURES}.DefaultFailurePolicy.make_decision": "self",
    f"{FAILURES}.FailureDecision": "",
    f"{SCALING}.ScalingPolicy.make_decision_for_non_running_worker_group": "self",
    f"{SCALING}.ElasticScalingPolicy._maybe_send_resource_request": "self",
    f"{SCALING}.ElasticScalingPolicy._get_resize_decision": "self num_workers",
    f"{SCALING}.FixedScalingPolicy": "scaling_config",
    f"{SCALING}.FixedScalingPolicy.after_controller_start": "self train_run_context",
    f"{SCALING}.FixedScalingPolicy._maybe_send_resource_request": "self",
    f"{SCALING}.NoopDecision": "",
    "ray.train.v2.api.config.ScalingConfig._resources_per_worker_not_none": "",
    f"{EXCEPTIONS}.UserExceptionWithTraceback": "exc",
    f"{EXCEPTIONS}.WorkerGroupStartupTimeoutError": "num_workers",
    f"{EXCEPTIONS}.WorkerHealthCheckFailedError": "message failure",
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.update_lp_params": "self",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.get_param_id": "self param",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._partition_all_parameters": "",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
    "._reassign_or_swap_out_partitioned_parameters": "",
    "deepspeed.runtime.engine.DeepSpeedEngine.set_gradient_accumulation_boundary": (
        "self is_boundary"
    ),
    "deepspeed.runtime.engine.DeepSpeedEngine.backward": "",
    "deepspeed.runtime.engine.DeepSpeedEngine.get_global_grad_norm": "self",
    "deepspeed.ops.__compatible_ops__": "",
}
# A class and names that must occur in its module, since they are set or passed there.
ATTRIBUTES: dict[str, str] = {
    "torch.nn.Module": "_parameters _buffers _modules",
    "transformers.modeling_utils.LoadStateDictConfig": "weight_mapping hf_quantizer dtype",
    "transformers.PreTrainedModel": "all_tied_weights_keys",
    "transformers.modeling_rope_utils.dynamic_rope_update": "max_seq_len_cached rope_type",
    f"{LOADING}.WeightConverter": "_weight_conversions",
    "transformers.utils.loading_report.LoadStateDictInfo": "conversion_errors",
    "optuna.trial.FrozenTrial": "_trial_id",
    f"{SCALING}.ElasticScalingPolicy": "_requester_id _autoscaling_coordinator",
    f"{EXCEPTIONS}.UserExceptionWithTraceback": "_base_exc",
    "ray.tune.schedulers.AsyncHyperBandScheduler": "_brackets _trial_info _rungs",
    "ray.tune.schedulers.MedianStoppingRule": "_on_insufficient_samples _stopped_trials",
    "deepspeed.runtime.engine.DeepSpeedEngine": "scale_wrt_gas",
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "round_robin_bit16_groups round_robin_bit16_offsets partition_size "
        "single_partition_of_fp32_groups"
    ),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat grad_position fp16_groups persistent_parameters"
    ),
}
# Of Python itself, and documented there.
PYTHON = {"_exit", "_current_frames", "_Hash"}


def _found(dotted: str) -> Any:
    """The object of that name; fails with the library's version where there is none."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    parts = dotted.split(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for depth in range(len(parts), 0, -1):
            try:
                value: Any = importlib.import_module(".".join(parts[:depth]))
            except ImportError:
                continue
            for name in parts[depth:]:
                if not hasattr(value, name):
                    pytest.fail(f"{_version(parts[0])} has no {dotted}: see docs/seams.md")
                value = getattr(value, name)
            return value
    pytest.fail(f"{_version(parts[0])} has no {dotted}: see docs/seams.md")


def _version(library: str) -> str:
    return f"{library} {importlib.import_module(library).__version__}"


@pytest.mark.parametrize("dotted", NAMES)
def test_the_name_is_there(dotted: str) -> None:
    value = _found(dotted)
    if wanted := NAMES[dotted].split():
        parameters = list(inspect.signature(inspect.unwrap(value)).parameters)
        kept = [name for name in parameters if name in wanted]
        assert kept == wanted, (
            f"{_version(dotted.split('.')[0])}: {dotted} takes ({', '.join(parameters)}), "
            f"and is passed ({', '.join(wanted)}): see docs/seams.md"
        )


@pytest.mark.parametrize("owner", ATTRIBUTES)
def test_the_attributes_are_set(owner: str) -> None:
    module = inspect.getmodule(_found(owner))
    assert module is not None
    text = inspect.getsource(module)
    for name in ATTRIBUTES[owner].split():
        assert re.search(rf"\b{name}\b", text), (
            f"{_version(owner.split('.')[0])}: {owner} has no {name}: see docs/seams.md"
        )


def _on_page(name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", PAGE) is not None


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def _own_names() -> set[str]:
    """Private names that this package defines: functions, classes, attributes, variables."""
    found = set()
    for _, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = node.value
                if isinstance(owner, ast.Name) and owner.id == "self":
                    found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


def test_every_private_import_is_on_the_page() -> None:
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                if not name.startswith(("raytune_ft", "__")) and any(
                    _private(part) for part in name.split(".")
                ):
                    module, _, last = name.rpartition(".")
                    assert _on_page(name) or (_on_page(module) and _on_page(last)), (
                        f"{path} imports {name}, which docs/seams.md does not list"
                    )


def test_every_private_attribute_is_on_the_page() -> None:
    own = _own_names()
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _private(node.attr):
                known = node.attr in own or node.attr in PYTHON
                assert known or _on_page(node.attr) or _on_page(ast.unparse(node)), (
                    f"{path}:{node.lineno} uses {ast.unparse(node)}, "
                    "which docs/seams.md does not list"
                )


def test_what_is_replaced_is_on_the_page() -> None:
    replaced = [
        argument.value
        for _, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "_replaced"
        for argument in node.args[1:2]
        if isinstance(argument, ast.Constant)
    ]
    assert len(replaced) >= 4
    assert all(_on_page(str(name)) for name in replaced), replaced


@pytest.mark.parametrize("library", BOUNDED)
def test_versions_are_bounded_and_the_tested_one_is_within(library: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {r.name: r for r in map(Requirement, project["dependencies"])}[library]
    assert any(each.operator == "<" for each in wanted.specifier), f"{library} has no upper bound"
    pinned = re.search(rf"^{library}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert pinned[1] in wanted.specifier


def test_the_groups_of_tests_reach_xdist(request: pytest.FixtureRequest) -> None:
    """`--dist loadgroup` writes a test's group behind its name; pytest 9.2 loses it in silence."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("not run by `make test`")
    assert request.node.nodeid.endswith(f"@{request.path}")
