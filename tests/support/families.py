"""A tiny random model of every class that transformers has for causal language models."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from raytune_ft.config.load import dump_yaml
from raytune_ft.errors import InputError
from raytune_ft.merge.export import export
from raytune_ft.plan.make import Asked, make_plan
from tests.support.models import VOCABULARY, save_character_tokenizer
from tests.support.runs import largest_difference, make_config, run

CLASSES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model type (`model_type` in config.json) to the class that the auto class loads."""

_LAYERS = 2
# The size of every field that sets one, whatever family has it.
_SIZES: dict[int, str] = {
    0: "num_nextn_predict_layers num_kv_shared_layers ple_layer_ids",
    1: (
        "n_group num_expert_group topk_group n_shared_experts moe_num_shared_experts "
        "num_shared_experts first_k_dense_replace num_dense_layers moe_layer_start_index "
        "mamba_n_groups mamba_ngroups n_groups bos_token_id eos_token_id pad_token_id eod_token_id "
        "sep_token_id cls_token_id mask_token_id decoder_start_token_id forced_eos_token_id "
        "interleave_moe_layer_step unk_index mask_index zero_expert_num num_mem_blocks"
    ),
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_key_heads "
        "encoder_layers decoder_layers n_layer n_layers num_layers num_hidden_layers "
        "num_encoder_layers num_decoder_layers num_blocks attn_layer_period no_rope_layer_interval "
        "layer_group_size global_attn_every_n_layers n_layers_per_attn_res_block "
        "num_layers_per_stack index_n_heads o_groups hc_mult hc_count heads_per_ngram "
        "cross_attn_k router_hidden_size index_topk_blocks gated_norm_rank"
    ),
    4: (
        "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
        "linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads time_step_rank "
        "mamba_dt_rank qk_rope_head_dim qk_nope_head_dim rotary_dim hc_lowrank laurel_rank "
        "adapter_rank n_mamba_heads index_block_size floor_scale split_ngram_parts"
    ),
    8: (
        "head_dim v_head_dim qk_head_dim swa_head_dim index_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim mamba_d_state state_size ssm_state_size d_rel "
        "kv_channels attention_head_dim query_pre_attn_scalar dim_head d_head attention_head_size "
        "kv_lora_rank q_lora_rank o_lora_rank hidden_size_per_layer_input chunk_size "
        "mamba_chunk_size block_size prompt_mid_dim prompt_length decoder_vocab_offset "
        "ffn_round_up_to_multiple_of block_multiple_of ple_embed_dim"
    ),
    12: (
        "sliding_window attention_window_size window_size local_attention keep_window_size "
        "attention_chunk_size sliding_window_size rel_extent local_attention_window_len"
    ),
    16: "mamba_head_dim mamba_d_head mamba_headdim",
    32: (
        "hidden_size d_model n_embd emb_dim embedding_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim embedding_dim lru_width dim_model_base "
        "attention_hidden_size pronunciation_embed_dim shape_embed_dim hidden_size_global"
    ),
    48: (
        "intermediate_size moe_intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim "
        "ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size shared_intermediate_size intermediate_size_mlp "
        "dense_intermediate_size moe_shared_expert_intermediate_size dim_ff dff d_inner "
        "feed_forward_size"
    ),
    64: "mamba_d_ssm index_topk",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length",
    97: "ngram_vocab_size_base encoder_hash_byte_group_vocab",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


_PLAIN = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
# What a config.json has to say so that it can be read.
_WRITTEN = {
    "gemma4_assistant": {"text_config": _PLAIN},
    "gemma4_unified_assistant": {"text_config": _PLAIN},
}


def _shrunk(kind: Any) -> Any:
    """The configuration of a class, and those in it, with tiny sizes."""
    before = kind()
    parts: dict[str, Any] = getattr(kind, "sub_configs", None) or {}
    written: dict[str, Any] = dict(_CHANGES.get(kind.model_type, {}))
    for switch in ("is_decoder", "causal"):
        if _of(before, switch) is False:
            written[switch] = True
    for field in dataclasses.fields(kind):
        name, value = field.name, _of(before, field.name)
        if name in written or (value is None and not name.endswith("_token_id")):
            continue
        if name in parts:
            written[name] = _shrunk(type(value)).to_dict()
        elif name in SIZES and value != 0 and not isinstance(value, list | bool | str):
            whole = name == "num_key_value_heads" and value == _of(before, "num_attention_heads")
            written[name] = SIZES["num_attention_heads"] if whole else SIZES[name]
        elif isinstance(value, list) and len(value) == _of(before, "num_hidden_layers"):
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else value
            written[name] = (kinds * _LAYERS)[:_LAYERS]
    return kind(**written)


def _of(config: Any, name: str) -> Any:
    """An attribute; None where there is none, the default where layers have one each."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return type(config).__dataclass_fields__[name].default


def save_tiny_family(model_type: str, directory: Path, seed: int = 0) -> Path:
    """A model whose every weight differs from its initial value, and a character tokenizer."""
    config = _shrunk(CONFIG_MAPPING[model_type])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(directory)
    save_character_tokenizer(directory)
    return directory


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a family: `reason` says why it was refused, or why rows are not packed."""

    family: str
    methods: tuple[str, ...]
    packs: bool
    reason: str

    @property
    def line(self) -> str:
        """Its line in the table of docs/models.md."""
        does = ["yes" if method in self.methods else "refused" for method in METHODS]
        packing = "-" if not self.methods else "yes" if self.packs else "no"
        promoted = "yes" if self.methods else "-"
        cells = [f"`{self.family}`", CLASSES[self.family], *does, packing, promoted, self.reason]
        return f"| {' | '.join(cells)} |\n"


METHODS = ("lora", "full")
HEADER = (
    "| model type | class | LoRA | full | packing | promote, export | why |\n" + "|---" * 7 + "|\n"
)
_LAYOUTS: dict[str, dict[str, Any]] = {
    "together": {"data.packing": "auto", "train.micro_tokens": 96},
    "apart": {"data.packing": False, "train.micro_tokens": 1},
}
_RUN = {
    "train.max_examples": 12,
    "train.batch_size": 4,
    "train.eval_every_examples": 12,
    "train.adam_epsilon": 1e-5,
    "checkpoint.every_examples": 100,
}
DIFFERENCE = 1e-5
"""Of losses and weights between layouts, in float32; ten times as much between logits."""
_TOKENS = [(torch.arange(n) * 7 + n) % (VOCABULARY - 2) + 2 for n in (5, 17, 33)]


def try_family(family: str, root: Path, methods: Sequence[str] = METHODS) -> Outcome:
    """Plan, train in two layouts, export and load with transformers alone, by each method.

    Anything but a whole success or a refusal by `plan` raises.
    """
    base = root / family
    try:
        save_tiny_family(family, base)
        loads = json.loads((base / "config.json").read_text())["model_type"] in CLASSES
    except Exception:  # noqa: BLE001 - of any class of transformers
        loads = False
    if not loads:
        save_without_weights(family, base)
    notes: tuple[str, ...] = ()
    reasons: dict[str, str] = {}
    for method in methods:
        try:
            notes = _try_method(base, root, method)
        except InputError as refusal:
            reasons[method] = re.sub(r"^is an? \S+ model, (which )?", "", refusal.rule)
    reason = next(iter(reasons.values()), "") or "".join(notes).rpartition("because ")[2]
    does = tuple(method for method in methods if method not in reasons)
    return Outcome(family, does, not notes, re.sub(r" \(logits .*\)", "", reason))


def save_without_weights(family: str, directory: Path) -> Path:
    """What `plan` reads of a model."""
    directory.mkdir(exist_ok=True)
    config = {"model_type": family} | _WRITTEN.get(family, {})
    (directory / "config.json").write_text(json.dumps(config))
    save_character_tokenizer(directory)
    return directory


def _try_method(base: Path, root: Path, method: str) -> tuple[str, ...]:
    """Why rows are not packed. Raises InputError only if it is `plan` that refuses."""
    rows = root / "rows.jsonl"
    changes = {"method": {"name": method}, "storage": str(root / "runs"), **_RUN}
    configs = {name: make_config(base, rows, changes | layout) for name, layout in _LAYOUTS.items()}
    file = root / "config.yaml"
    file.write_text(dump_yaml(configs["together"]))
    make_plan(file, [], lambda line: None, Asked(accelerator="H100"))
    work = root / f"{base.name}-{method}"
    try:
        results = [run(config, work / name) for name, config in configs.items()]
        assert [result.status for result in results] == ["completed"] * 2, results
        difference = max(largest_difference(*(work / name for name in configs)))
        assert difference < DIFFERENCE, f"layouts differ by {difference:.0e}"
        checkpoint = next((work / "together/checkpoints").glob("step-*3"))
        export(checkpoint, work / "exported", base=str(base))
        found = _logits(AutoModelForCausalLM.from_pretrained(work / "exported"))
        expected = _logits(_trained(base, checkpoint))
        untouched = _logits(AutoModelForCausalLM.from_pretrained(base))
        torch.testing.assert_close(found, expected, rtol=0, atol=10 * DIFFERENCE)
        assert (found - untouched).abs().max() > 1e-3
    except InputError as late:
        raise AssertionError(f"refused only after plan: {late}") from late
    return tuple(note for note in results[0].notes if " because " in note)


def _trained(base: Path, checkpoint: Path) -> Any:
    """A checkpoint by transformers and PEFT alone. PEFT's own loading loses the weights of layers
    that transformers renames in files, so they are put into PEFT's model by name.
    """
    if not (checkpoint / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(checkpoint)
    config = PeftConfig.from_pretrained(checkpoint)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    saved = load_file(checkpoint / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = saved.pop(name.replace(".default", ""))
    assert not saved
    return model


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    model.eval()
    rows = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in _TOKENS]
    return torch.cat(rows)
