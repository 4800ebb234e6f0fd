"""Every wrong input ends with its exit code and one `error:` line, and leaves nothing behind.

The line names the key and what to write instead; a table holds the words that it must contain, not
the sentence. `pytest -s -k bad_inputs` prints every command with its line, to be read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raytune_ft.app import Backend
from raytune_ft.cli import run_command
from raytune_ft.config.load import load_config
from raytune_ft.config.resolve import resolve
from raytune_ft.errors import ClusterError
from raytune_ft.ray_backend.cluster import require_capacity
from raytune_ft.rundir import open_run

ROOT = Path(__file__).parents[2]
TINY = ROOT / "raytune_ft" / "model" / "tiny"
ROWS = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
QUICKSTART = "jobs/quickstart.yaml"
LABELLED = (
    "train.objective=classification data.test=null "
    "'data.train={path: short.jsonl, format: classification, text: instruction, label: response}'"
)
DEEPSPEED = "parallel.strategy=deepspeed parallel.deepspeed"

pytestmark = pytest.mark.e2e

# A command and the words of its line. `train ...` stands for `raytune-ft train
# jobs/quickstart.yaml ...`, and `sweep ...` for the same with `sweep`; others are written out.
Case = tuple[str, ...]
COMMAND_LINE: list[Case] = [
    ("raytune-ft trian x.yaml", "trian", "train", "raytune-ft --help"),
    ("raytune-ft train", "CONFIG", "raytune-ft train --help"),
    ("raytune-ft evaluate runs/first/promoted/model", "--config", "raytune-ft evaluate --help"),
    ("train train.lr", "train.lr", "section.key=value"),
    ("train --resume=maybe", "--resume", "maybe", "auto"),
    ("train --wait-lock 3", "--wait-lock='3'", "90s", "3m", "2h"),
    ("raytune-ft promote runs/first --again --resume auto", "--again", "--resume"),
]
FILES: list[Case] = [
    ("raytune-ft train nowhere.yaml", "nowhere.yaml", "No such file", "config file"),
    ("raytune-ft train twice.yaml", "twice.yaml line 2", "'name'", "delete"),
    ("raytune-ft train open.yaml", "open.yaml", "YAML"),
    ("raytune-ft train list.yaml", "list.yaml", "mapping"),
    ("raytune-ft train void.yaml", "void.yaml", "mapping"),
    ("raytune-ft train binary.yaml", "binary.yaml", "UTF-8"),
]
CONFIG: list[Case] = [
    ("train train.batchsize=4", "train.batchsize", "train.batch_size"),
    ("train train.learning_rate=1e-4", "train.learning_rate", "train.lr"),
    ("train train.lr=fast", "train.lr=fast", "number", "0.0002"),
    ("train train.batch_size=1.5", "train.batch_size=1.5", "whole number", "16"),
    ("train train.precision=float16", "train.precision=float16", "float32", "bfloat16"),
    ("train method.name=lorra", "method.name=lorra", "lora"),
    (
        "train train.batch_size=4 parallel.workers=8",
        "train.batch_size=4",
        "parallel.workers=8",
        "at least 8",
    ),
    ("train parallel.placement=pack", "parallel.placement=pack", "PACK"),
    (
        "train 'parallel.label_selector={zone: in()}'",
        "parallel.label_selector={zone: in()}",
        "in(spot, on-demand)",
    ),
    (
        "train 'parallel.label_selector={zone: 3}'",
        "parallel.label_selector.zone=3",
        "is not a text",
    ),
    (
        "train parallel.strategy=single parallel.workers=2",
        "parallel.strategy=single",
        "parallel.workers=2",
        "ddp",
        "parallel.workers: 1",
    ),
    (
        f"train {DEEPSPEED}=jobs/deepspeed_zero3.json parallel.zero_stage=2",
        "zero_optimization.stage=3",
        "deepspeed_zero3.json",
        "parallel.zero_stage: 3",
        '"auto"',
    ),
    (
        "train parallel.wait_for_nodes=soon",
        "parallel.wait_for_nodes=soon",
        "is not a duration",
        "90s",
    ),
    (f"train {DEEPSPEED}=ds.json", "parallel.deepspeed=", "ds.json", "No such file"),
    ("train storage=/proc/runs", "/proc/runs", "storage", "write"),
    ("train storage=empty.jsonl", "empty.jsonl", "File exists", "storage"),
    ("train storage=gs://bucket/runs", "storage=gs://", "s3://", "directory"),
]
SEARCH: list[Case] = [
    ("sweep search=null", QUICKSTART, "search section", "raytune-ft train"),
    ("sweep search.space.train.lrr.choice=[1.0]", "search.space.train.lrr", "train.lr?"),
    (
        "sweep search.space.train.batch_size.choice=[8,0]",
        "train.batch_size=0",
        "whole number",
    ),
    (
        "sweep search.space.method.rank.uniform=[4,8]",
        "search.space.method.rank",
        "whole number",
        "int_uniform",
    ),
    (
        "sweep search.space.data.max_length.choice=[64,128]",
        "search.space.data.max_length",
        "data.max_length",
    ),
    (
        "sweep search.metric=eval_exact_match search.mode=min",
        "search.mode=min",
        "eval_exact_match",
        "search.mode: max",
    ),
    (
        "sweep search.sampler=grid",
        "search.space.train.lr",
        "log_uniform",
        "search.sampler=grid",
        "choice",
        "sampler: tpe",
    ),
    (
        "sweep 'search.constraints=[train.lr > 1]'",
        "search.constraints",
        "train.lr > 1",
        "search.space",
        "constraint",
    ),
    (
        "sweep search.budget.examples=1000",
        "search.budget.examples=1000",
        "at least 2764",
        "train.max_examples",
    ),
    (
        "sweep search.scheduler.grace_examples=100000",
        "search.scheduler.grace_examples=100000",
        "at most 921",
        "scheduler: null",
    ),
    (
        "sweep search.storage=postgresql://me:hunter2@host/db",
        "search.storage",
        "password",
        "${ENV_NAME}",
        "export ENV_NAME",
    ),
    (
        "sweep 'search.storage=postgresql://me:${DB_PASSWORD}@host/db'",
        "search.storage",
        "${DB_PASSWORD}",
        "export DB_PASSWORD=",
    ),
    (
        "sweep search.storage=postgresql://me@127.0.0.1:1/db",
        "search.storage=postgresql://me@127.0.0.1:1/db",
        "Connection refused",
    ),
    (
        "sweep search.execution=packed search.space.method.name.choice=[lora,full] "
        "search.space.method.rank=null",
        "search.execution=packed",
        "method.name=full",
    ),
    (
        "sweep search.execution=packed parallel.workers=2 parallel.strategy=deepspeed",
        "search.execution=packed",
        "parallel.strategy=deepspeed",
    ),
    ("sweep search.metric=eval_accuracy", "search.metric=eval_accuracy", "sft", "eval_loss"),
    (
        "sweep 'search.metric=[eval_loss, \"eval_loss:general\"]'",
        "search.metric=eval_loss:general",
        "sft",
        "eval_token_accuracy",
    ),
]
MODELS = {
    "encoder": {"model_type": "bert"},
    "permuted": {"model_type": "xlnet"},
    "uneven": {"model_type": "mamba2", "num_heads": 3},
}
MODEL_AND_DATA: list[Case] = [
    ("train model.path=./encoder", "/encoder", '"is_decoder": true'),
    ("raytune-ft plan jobs/quickstart.yaml model.path=./permuted", "xlnet", "docs/models.md"),
    ("train model.path=./uneven", "/uneven", "config.json", "num_heads"),
    ("train model.path=/nowhere/model", "model.path=/nowhere/model", "hub id", "builtin:tiny"),
    ("train model.path=builtin:huge", "model.path=builtin:huge", "builtin:tiny"),
    ("train model.path=pointer", "pointer/model.safetensors", "Git LFS", "git lfs pull"),
    ("train model.path=newer", "newer/tokenizer.json", "update tokenizers"),
    ("train model.path=small", "data.max_length=128", "16 positions", "at most 16"),
    ("train method.targets=[q_prj]", "method.targets=q_prj", "all-linear", "q_proj"),
    (
        "train data.train.path=jobs/data/tiny_instructions/trian.jsonl",
        "data.train.path=",
        "trian.jsonl",
        "tiny_instructions/train.jsonl",
    ),
    ("train data.train.path=empty.jsonl", "data.train.path=", "empty.jsonl", "row"),
    (
        "train data.train.path=empty.jsonl data.train.format=auto",
        "data.train.format=auto",
        "empty.jsonl",
        "a source that has one",
    ),
    (
        "train data.train.path=short.jsonl data.max_length=4",
        "data.train.path=short.jsonl",
        "no_label_token 60",
        "write data.max_length=",
        "data.max_bad_fraction=0.01",
    ),
    (
        "train data.train.path=bad.jsonl",
        "data.train.path=bad.jsonl",
        "2 unusable",
        "40",
        "empty 1, wrong_type 1",
        "bad.jsonl:4",
        "'response'",
        "data.max_bad_fraction=0.01",
    ),
    (
        "train data.train.prompt=question",
        "data.train.prompt=question",
        "train.jsonl",
        "instruction, response",
    ),
    (
        "train data.max_length=8 data.too_long=error",
        "data.train",
        "train.jsonl:1",
        "15 tokens",
        "data.max_length=15",
        "truncate",
        "drop",
    ),
]
METHODS: list[Case] = [
    ("train 'method={name: freeze, train: [q_prj]}'", "method.train=q_prj", "q_proj"),
    ("train 'method={name: freeze, last: 9}'", "method.last=9", "4 blocks", "at most 4"),
    (
        "train 'method={name: freeze, last: 0, head: false}'",
        "method.name=freeze",
        "method.freeze",
        "method.train",
    ),
    (
        "train 'method={name: loreft, layers: [0, 7]}'",
        "method.layers=[0, 7]",
        "block 7",
        "all",
        "0 to 3",
    ),
    ("train 'method={name: loreft, rank: 4096}'", "method.rank=4096", "128", "at most 128"),
    (
        "train 'method={name: prompt, tokens: 5000}'",
        "method.tokens=5000",
        "22 tokens",
        "at most 1002",
        "data.max_length",
    ),
    (
        "train 'method={name: prefix, hidden: 8}'",
        "method.hidden=8",
        "method.projection: true",
    ),
    ("train 'method.rank_pattern={q_prj: 4}'", "method.rank_pattern.q_prj", "q_proj"),
    (
        "train method.init=pissa method.rank=4096",
        "method.rank=4096",
        "q_proj",
        "at most 128",
        "method.init: default",
    ),
    (
        "sweep search.space.method.name.choice=[lora,prefix] promote.merge=greedy_soup",
        "promote.merge=greedy_soup",
        "method.name=prefix",
        "promote.merge: best",
    ),
    (
        "sweep search.space.method.name.choice=[lora,prompt] "
        "search.space.method.tokens.choice=[5,5000]",
        "method.tokens=5000",
        "22 tokens",
        "at most 1002",
        "data.max_length",
    ),
]
OBJECTIVES_AND_SOURCES: list[Case] = [
    ("train train.objective=kd", "train.objective=kd", "train.kd: {teacher:"),
    (
        "train train.objective=kd 'train.kd={teacher: /nowhere/model}'",
        "train.kd.teacher=/nowhere/model",
        "hub id",
    ),
    (
        "train train.objective=kd "
        "'train.kd={teacher: builtin:tiny, cache: disk, cache_limit_gib: 0.001}'",
        "train.kd.cache=disk",
        "0.0168 GiB",
        "train.kd.cache_limit_gib: 0.017",
        "train.kd.cache: memory",
    ),
    (
        "train train.objective=clm",
        "data.train.format=prompt_completion",
        "train.objective=clm",
        "format: text",
        "sft",
    ),
    (
        "train train.rationale_weight=2",
        "train.rationale_weight=2.0",
        "sft",
        "train.objective: rationale",
    ),
    (
        f"train {LABELLED} data.labels=[red]",
        "data.problem=single_label",
        "data.labels",
        "2 to 1,000",
    ),
    (
        f"train {LABELLED} data.labels=[red,blue]",
        "data.train",
        "short.jsonl:1",
        "'black'",
        "data.labels",
        "red, blue",
    ),
    (
        f"train {LABELLED} data.problem=regression",
        "data.train.path=short.jsonl",
        "35 unusable",
        "60",
        "bad_label 35",
        "'black'",
        "data.max_bad_fraction",
    ),
    (
        "train train.objective=classification data.validation=0.5 data.test=null "
        "'data.train={path: classes.jsonl, format: classification}' "
        "'train.class_weights={mauve: 2.0}'",
        "train.class_weights.mauve",
        "data.train",
        "down, up",
    ),
    (
        "train 'data.train={path: monologue.jsonl, format: messages}' data.test=null",
        "data.train.path=monologue.jsonl",
        "no_trained_turn 1",
        "assistant",
        "data.max_bad_fraction",
    ),
    (
        "train 'data.train={path: chats.jsonl, format: auto, chat_template: broken.jinja}' "
        "data.test=null",
        "data.train.path=chats.jsonl",
        "template 8",
        "no such thing",
        "chat_template",
    ),
    (
        "train 'data.train={path: chats.jsonl, format: auto, chat_template: silent.jinja}' "
        "data.test=null",
        "data.train.path=chats.jsonl",
        "unwritten_turn 8",
        "turn 2",
        "chat_template",
    ),
    (
        "train 'data.train={path: chats.jsonl, format: auto, chat_template: none.jinja}' "
        "data.test=null",
        "chat_template=",
        "none.jinja",
        "chatml",
    ),
    (
        "train 'data.train={path: speakers.jsonl, format: sharegpt}' data.test=null",
        "data.train.path=speakers.jsonl",
        "unknown_speaker 8",
        "'narrator'",
        "human",
    ),
    (
        "train 'data.train={path: classes.jsonl, format: auto, text: x}' data.test=null",
        "data.train.format=auto",
        "text or label",
        "format",
    ),
    (
        "train 'data.train={path: chats.jsonl, format: auto, chat_template: chatml}' "
        "'data.test={path: chats.jsonl, format: auto, chat_template: zephyr}'",
        "chat_template",
        "chatml or zephyr",
        "same",
    ),
    (
        "train 'data.train=[{path: short.jsonl, prompt: instruction, completion: response, "
        "weight: 0}]'",
        "data.train",
        "weight=0",
        "above 0",
    ),
    (
        "train data.train.example_weight=instruction",
        "data.train.path=train.jsonl",
        "bad_weight 1,536",
        "train.jsonl:1",
        "number",
        "data.max_bad_fraction",
    ),
    (
        "train 'data.curriculum={by: lenght}'",
        "data.curriculum.by=lenght",
        "length",
        "column",
        "base_loss",
    ),
]
DPO = "raytune-ft train jobs/dpo.yaml search=null"
PREFERENCES: list[Case] = [
    (
        "train train.objective=dpo",
        "data.train.format=prompt_completion",
        "train.objective=dpo",
        "write format: preference",
        "sft",
    ),
    (f"{DPO} train.objective=sft", "data.train.format=preference", "sft", "dpo"),
    (f"{DPO} train.dpo.beta=0", "train.dpo.beta=0", "above 0"),
    (f"{DPO} train.dpo.loss_type=sigmiod", "train.dpo.loss_type=sigmiod", "sigmoid"),
    (
        f"{DPO} train.dpo.loss_type=robust train.dpo.label_smoothing=0.5",
        "train.dpo.label_smoothing=0.5",
        "below 0.5",
    ),
    (
        f"{DPO} train.dpo.loss_type=exo_pair",
        "train.dpo.label_smoothing=0",
        "exo_pair",
        "0.001",
    ),
    (f"{DPO} train.dpo.label_smoothing=0.1", "label_smoothing=0.1", "sigmoid", "robust"),
    (
        f"{DPO} train.dpo.loss_type=[sigmoid,sft] train.dpo.loss_weights=[1.0]",
        "train.dpo.loss_weights=[1.0]",
        "1 number",
        "2 losses",
        "write 2",
    ),
    (f"{DPO} train.orpo.beta=0.5", "train.orpo=", "train.objective=orpo", "this is dpo"),
    (f"{DPO} train.label_smoothing=0.1", "train.label_smoothing=0.1", "dpo", "write 0"),
    (
        "raytune-ft sweep jobs/dpo.yaml search.metric=eval_loss",
        "search.metric=eval_loss",
        "a different scale for each train.dpo.beta",
        "eval_reward_accuracy",
    ),
    (
        "raytune-ft sweep jobs/dpo.yaml search.metric=eval_loss "
        "search.space.train.dpo.beta=null search.space.train.objective.choice=[dpo,orpo]",
        "search.metric=eval_loss",
        "a different scale for each train.objective",
        "eval_reward_margin",
    ),
    (
        "raytune-ft sweep jobs/dpo.yaml search.space.train.dpo.reference.choice=[a,b]",
        "search.space.train.dpo.reference",
        "not be comparable",
        "train.dpo.reference once",
    ),
    (f"{DPO} train.dpo.reference=./wider", "train.dpo.reference=", "vocabulary", "model.path"),
    (f"{DPO} train.dpo.reference=/nowhere/model", "train.dpo.reference=/nowhere/model", "hub id"),
    (
        f"{DPO} data.train.path=equal.jsonl",
        "data.train.path=equal.jsonl",
        "same_answers 4",
        "'chosen' is 'rejected'",
        "data.max_bad_fraction=0.01",
    ),
    (
        "raytune-ft train jobs/reward.yaml data.train.margin=by",
        "data.train.margin=by",
        "prompt, chosen, rejected",
    ),
    (f"{DPO} data.train.margin=by", "data.train.margin=by", "dpo", "train.objective: reward"),
    (
        f"{DPO} train.dpo.loss_type=apo_zero train.dpo.f_divergence_type=forward_kl",
        "train.dpo.f_divergence_type=forward_kl",
        "apo_zero",
    ),
    (
        "raytune-ft sweep jobs/dpo.yaml search.space.train.precision.choice=[float32,bfloat16]",
        "search.space.train.precision",
        "the reference",
    ),
    (
        "raytune-ft sweep jobs/dpo.yaml search.metric=eval_kl "
        "search.space.train.objective.choice=[dpo,orpo]",
        "search.metric=eval_kl",
        "dpo or orpo",
        "eval_reward_accuracy",
    ),
    (
        f"{DPO} train.objective=kto data.test=null data.train.path=good.jsonl "
        "data.train.format=unpaired",
        "train.objective=kto",
        "no undesirable one of",
        "train.objective: sft",
    ),
    (
        f"{DPO} train.objective=reward promote.metrics=[loss,rouge]",
        "promote.metrics=rouge",
        "train.objective=reward",
    ),
    (f"{DPO} train.objective=reward data.labels=[a,b]", "data.labels=[a, b]", "classification"),
    (f"{DPO} train.objective=reward 'method={{name: loreft}}'", "method.name=loreft", "lora"),
    (
        "raytune-ft sweep jobs/dpo.yaml search.execution=packed train.objective=reward "
        "search.space.train.dpo.beta=null",
        "search.execution=packed",
        "train.objective=reward trains a head",
    ),
]
GRPO = "train train.objective=grpo data.train.path=short.jsonl data.test=null"
ROLLOUTS: list[Case] = [
    ("train train.objective=grpo", "train.objective=grpo", "needs a reward", "rewards:"),
    (f"{GRPO} rewards=[exact_mach]", "rewards=exact_mach", "exact_match"),
    (
        f"{GRPO} rewards=[scores.py:corect]",
        "scores.py:corect",
        "names no function",
        "scores.py, which has right, needs_solution",
    ),
    (
        f"{GRPO} rewards=[scores.py:needs_solution]",
        "rewards.needs_solution",
        "'solution'",
        "no column of data.train (instruction, response)",
    ),
    (
        f"{GRPO} rewards=[exact_match] train.rollout.num_generations=1",
        "train.rollout.num_generations=1",
        "at least 2",
        "train.objective: ppo",
    ),
    (f"{GRPO} rewards=[exact_match] train.ppo.lam=0.9", "train.ppo=", "train.objective: ppo"),
    (f"{GRPO} train.objective=ppo", "train.objective=ppo", "needs a reward"),
    (
        f"{GRPO} rewards=[exact_match] train.objective=ppo train.ppo.lam=1.5",
        "train.ppo.lam=1.5",
        "1",
    ),
    (
        f"{GRPO} rewards=[exact_match] train.objective=ppo train.ppo.kl_coeff=0.1",
        "train.ppo.kl_coeff",
        "did you mean",
        "kl_coef",
    ),
    (
        f"{GRPO} rewards=[exact_match] train.objective=ppo train.grpo.beta=0.1",
        "train.grpo=",
        "train.objective=grpo",
    ),
    (
        "sweep train.objective=ppo data.train.path=short.jsonl data.test=null "
        "rewards=[exact_match] search.execution=packed",
        "search.execution=packed",
        "train.objective=ppo",
    ),
    (
        f"{GRPO} rewards=[exact_match] train.rollout.max_completion_length=2000",
        "train.rollout.max_completion_length=2000",
        "positions",
        "write at most",
    ),
    (f"{GRPO} rewards=[exact_match] train.grpo.loss_type=bnpo", "loss_type=bnpo", "dapo"),
    (
        f"{GRPO} rewards=[exact_match] train.grpo.loss_type=cispo",
        "train.grpo.epsilon_high=null",
        "cispo",
        "epsilon_high: 5",
    ),
    (
        f"{GRPO} rewards=[exact_match] train.grpo.loss_type=cispo train.grpo.epsilon_high=5.0 "
        "train.grpo.importance_sampling_level=sequence",
        "importance_sampling_level=sequence",
        "loss_type: grpo",
    ),
    (f"{GRPO} rewards=[exact_match] train.grpo.gate=gold", "train.grpo.gate=gold", "exact_match"),
    (
        f"{GRPO} 'rewards=[{{name: exact_match, weight: 0}}]'",
        "rewards",
        "weight 0",
        "leaves nothing to learn from",
    ),
    (f"{GRPO} rewards=[exact_match] train.watch=[exact_match]", "train.watch", "nothing to learn"),
    (f"{GRPO} rewards=[exact_match] train.watch=[gold]", "train.watch=gold", "exact_match"),
    ("train train.watch=[gold]", "train.watch=gold", "names no reward", "write it in rewards"),
    ("train train.rollout.num_generations=4", "train.rollout=", "train.objective=grpo", "sft"),
    (
        f"{GRPO} rewards=[exact_match] train.objective=online_dpo train.dpo.reference=builtin:tiny",
        "train.dpo.reference",
        "online_dpo",
        "leave the key out",
    ),
    (
        f"{GRPO} 'rewards=[{{name: judge, model: m, api_key: swordfish, url: http://127.0.0.1:9/v1}}]'",
        "api_key",
        "in the clear",
        "${ENV_NAME}",
    ),
    (
        f"{GRPO} 'rewards=[{{name: judge, model: m, retries: 0, url: http://127.0.0.1:9/v1}}]'",
        "http://127.0.0.1:9/v1",
        "answer",
    ),
    (
        "sweep train.objective=grpo data.train.path=short.jsonl data.test=null "
        "rewards=[exact_match] search.execution=packed "
        "search.space.train.rollout.temperature.choice=[0.8,1.0]",
        "search.execution=packed",
        "train.rollout.temperature",
    ),
    (
        "sweep train.objective=grpo data.train.path=short.jsonl data.test=null "
        "rewards=[exact_match] search.metric=eval_reward:gold",
        "search.metric=eval_reward:gold",
        "eval_reward:exact_match",
    ),
    (
        "sweep rewards=[exact_match] search.metric=eval_reward:exact_match",
        "search.metric=eval_reward:exact_match",
        "train.watch",
    ),
]
TRUST: list[Case] = [
    (
        "train model.path=org/name model.trust_remote_code=true",
        "model.path=org/name",
        "main",
        "model.revision",
        "40 digits",
    ),
    (
        "train promote.base=org/name model.trust_remote_code=true",
        "promote.base=org/name",
        "40 digits",
        "directory",
    ),
    (
        f"train model.revision=ghp_{'x1' * 18}",
        "model.revision holds a token of GitHub",
        "${ENV_NAME}",
        "export ENV_NAME",
    ),
]
PROMOTION: list[Case] = [
    ("train promote.metrics=[rogue]", "promote.metrics=rogue", "rouge", "FILE.py:FUNCTION"),
    (
        "train train.objective=classification promote.metrics=[answer]",
        "promote.metrics=answer",
        "train.objective=classification",
    ),
    (
        "train train.objective=classification promote.merge=ties",
        "promote.merge=ties",
        "train.objective=classification",
        "best",
        "greedy_soup",
    ),
    (
        "train promote.metric=rougeL",
        "promote.metric=rougeL",
        "promote.metrics",
        "rouge",
    ),
    (
        "train promote.metrics=[own.py:score]",
        "promote.metrics=",
        "own.py:score",
        "No such file",
        "FILE.py:FUNCTION",
    ),
    (
        "train data.test.path=jobs/data/tiny_instructions/train.jsonl",
        "data.test",
        "data.train",
        "source",
    ),
    (
        "train data.test.path=short.jsonl",
        "data.test",
        "56",
        "60 prompts",
        "data.train",
        "promote.max_overlap=0.1",
    ),
]
RUNS: list[Case] = [
    ("train name=first", "first", "--resume", "another name"),
    ("train name=second --resume", "second", "--resume"),
    ("train name=first --resume auto train.lr=1e-4", "train.lr=0.0001", "another name"),
    (
        "train name=first --resume train.lr=1e-4",
        "train.lr=0.0001",
        "0.001",
        "another name",
    ),
    (
        "train name=first --resume train.batch_size=4",
        "train.batch_size=4",
        "16",
        "another name",
    ),
    (
        "train name=first --resume train.epochs=1",
        "train.epochs=1.0",
        "2.0",
        "another name",
    ),
    (
        "sweep name=searched --resume search.space.train.lr.log_uniform=[1e-5,1e-4]",
        "search.space.train.lr.log_uniform=[1e-05, 0.0001]",
        "[0.0003, 0.01]",
    ),
    ("raytune-ft promote runs/second", "second", "result.json", "--resume"),
]
SUBMIT = "raytune-ft submit jobs/quickstart.yaml --address http://127.0.0.1:1"
THERE = "storage=/mnt/runs"
JOBS: list[Case] = [
    (f"{SUBMIT} {THERE}", "--address=http://127.0.0.1:1", "does not answer", "dashboard"),
    ("raytune-ft stop first --address http://127.0.0.1:1", "does not answer"),
    ("raytune-ft status --address head:8265", "--address=head:8265", "http://HEAD:8265"),
    ("raytune-ft logs first", "--address", "raytune-ft logs --help"),
    (SUBMIT, "storage=runs", "every node", "RAYTUNE_FT_STORAGE"),
    (f"{SUBMIT} {THERE} train.batchsize=4", "train.batchsize", "train.batch_size"),
    (
        f"{SUBMIT} {THERE} data.train.path=/data/train.jsonl",
        "data.train.path=/data/train.jsonl",
        "--cluster-paths",
    ),
    (f"{SUBMIT} {THERE} --retry 2 --no-follow", "--retry=2", "--no-follow"),
    (f"{SUBMIT} {THERE} --command promote", "--command=promote", "train", "sweep"),
    (
        f"{SUBMIT} {THERE} search.storage=sqlite:///study.db",
        "search.storage=sqlite:///study.db",
        "absolute path",
    ),
]
DOCTOR: list[Case] = [
    ("raytune-ft doctor --address http://127.0.0.1:1", "http://127.0.0.1:1", "does not answer"),
    ("raytune-ft doctor nowhere.yaml", "nowhere.yaml", "No such file", "config file"),
    (f"raytune-ft doctor {QUICKSTART} train.batchsize=4", "train.batchsize", "train.batch_size"),
    (f"raytune-ft doctor {QUICKSTART} storage=gs://bucket/runs", "storage=gs://", "s3://"),
    ("raytune-ft doctor --adress auto", "--adress", "raytune-ft doctor --help"),
]
TABLE = [
    *(COMMAND_LINE + FILES + CONFIG + SEARCH + MODEL_AND_DATA + METHODS),
    *(OBJECTIVES_AND_SOURCES + PREFERENCES + ROLLOUTS + TRUST + PROMOTION + RUNS + JOBS + DOCTOR),
]
YAML = {
    "twice": b"name: a\nname: b\n",
    "open": b"name: [a\n",
    "list": b"- a\n",
    "void": b"",
    "binary": b"\xff\xfe\x00",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `jobs/`, the files that the table names, and two runs that have begun."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    write_bad_models(folder)
    write_bad_files(folder)
    for name, content in YAML.items():
        (folder / f"{name}.yaml").write_bytes(content)
    with contextlib.chdir(folder):
        for name, search in (("first", ["search=null"]), ("searched", [])):
            written = load_config(Path(QUICKSTART), [f"name={name}", *search])
            with open_run(resolve(written), resume=False) as run:
                (run.path / "result.json").write_text('{"status": "completed"}')
    return folder


def write_bad_models(folder: Path) -> None:
    """Copies of the built-in model, each with one file that is wrong."""
    for name, file, content in (
        ("pointer", "model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        ("newer", "tokenizer.json", '{"version": "1.0", "model": {"type": "New"}}'),
        ("small", "config.json", None),
    ):
        shutil.copytree(TINY, folder / name)
        config = json.loads((TINY / "config.json").read_text()) | {"max_position_embeddings": 16}
        (folder / name / file).write_text(content or json.dumps(config))
    shutil.copytree(TINY, folder / "wider")
    config = json.loads((TINY / "config.json").read_text()) | {"vocab_size": 2048}
    (folder / "wider" / "config.json").write_text(json.dumps(config))


def write_bad_files(folder: Path) -> None:
    """Rows of which some cannot be used, next to 60 that can."""
    rows = ROWS.read_text().splitlines(keepends=True)
    (folder / "short.jsonl").write_text("".join(rows[:60]))
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "empty.jsonl").touch()
    bad = [{"instruction": f"row {number}", "response": "x"} for number in range(40)]
    bad[3]["response"] = ""
    bad[7]["response"] = 7  # type: ignore[assignment]
    alone = [{"messages": [{"role": "user", "content": "Is anybody here?"}]}]
    classes = [
        {"text": f"text {number}", "label": ["up", "down"][number % 2]} for number in range(8)
    ]
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ] * 8
    told = [{"from": "human", "value": "a"}, {"from": "narrator", "value": "b"}]
    files = {"bad": bad, "monologue": alone, "classes": classes, "chats": chats}
    files["speakers"] = [{"conversations": told}] * 8
    pair = {"prompt": "Name a colour.", "chosen": "black", "rejected": "black"}
    files["equal"] = [pair] * 4
    files["good"] = [{"prompt": f"{n}?", "completion": "x", "label": True} for n in range(9)]
    (folder / "scores.py").write_text(
        "def right(prompt, reference, generated):\n    return 1.0\n\n\n"
        "def needs_solution(completions, solution, **columns):\n    return [1.0]\n"
    )
    (folder / "broken.jinja").write_text("{{ raise_exception('no such thing') }}")
    (folder / "silent.jinja").write_text("{% for m in messages %}<{{ m.role }}>{% endfor %}")
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture
def session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`folder` as the current directory; on exit no run is there that was not there before.

    No local Ray starts ahead: nothing that is refused here gets as far as to use it.
    """
    monkeypatch.chdir(folder)
    for name in ("DB_PASSWORD", "RAY_ADDRESS", "RAYTUNE_FT_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Backend, "starting", lambda *_: contextlib.nullcontext())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = runs(folder)
    yield folder
    torch.set_num_threads(threads)
    assert runs(folder) == before


def runs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs").iterdir() if not path.name.startswith(".")}


def refused(command: str, code: int = 2) -> str:
    """The one line of a command that must fail; printed, for `pytest -s`."""
    arguments = shlex.split(command)
    if arguments[0] in ("train", "sweep"):
        arguments.insert(1, QUICKSTART)
        command = shlex.join(["raytune-ft", *arguments])
    else:
        del arguments[0]
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        found = run_command(arguments)
    line = stream.getvalue()
    print(f"\n$ {command}\n{line.replace(str(Path.cwd()), '$PWD')}", end="")
    assert found == code, line
    check_line(line)
    return line


def check_line(line: str) -> None:
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert "hunter2" not in line


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[0])
def test_bad_inputs(case: Case, session: Path) -> None:
    command, *words = case
    line = refused(command)
    for word in words:
        assert word in line, f"{word!r} is not in the line of: {command}"


def test_bad_inputs_that_only_training_finds(
    tmp_path: Path, session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTUNE_FT_STORAGE", str(tmp_path))
    small = "data.train.path=short.jsonl promote.max_overlap=1 data.test=null"
    line = refused(f"train name=lost storage={tmp_path} train.lr=1e30 {small}", code=1)
    assert "Diverged: step 2" in line
    assert "train.lr below 1e+30" in line
    result = json.loads((tmp_path / "lost" / "result.json").read_text())
    assert result["status"] == "failed"
    assert f"error: {result['error']}\n" == line


def test_bad_inputs_of_a_promotion_that_exists(tmp_path: Path, session: Path) -> None:
    small = "data.train.path=short.jsonl promote.max_overlap=1 data.test=null train.epochs=1"
    arguments = shlex.split(f"train {QUICKSTART} name=trained storage={tmp_path} {small}")
    assert run_command(arguments) == 0
    (tmp_path / "trained" / "promoted").mkdir()
    line = refused(f"raytune-ft promote {tmp_path}/trained")
    assert "trained/promoted" in line
    assert "--again" in line


@pytest.mark.parametrize(
    ("workers", "words"),
    [("8", ["parallel.workers=8", "8 CPU"]), ("[3,4]", ["parallel.workers=[3, 4]", "at least 3"])],
)
def test_bad_inputs_of_a_cluster_with_two_cpus(
    workers: str, words: list[str], session: Path
) -> None:
    config = load_config(Path(QUICKSTART), [f"parallel.workers={workers}"])
    with pytest.raises(ClusterError) as caught:
        require_capacity(config.parallel, nodes=[{"CPU": 2.0}])
    print(f"\n$ raytune-ft train {QUICKSTART} parallel.workers={workers}\nerror: {caught.value}")
    for word in [*words, "2 CPU on 1 node", "at most 2 workers"]:
        assert word in str(caught.value)


def test_bad_inputs_inside_a_ray_job(session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    line = refused("sweep")
    assert "storage=runs" in line
    assert "RAYTUNE_FT_STORAGE" in line


def test_a_second_driver(session: Path) -> None:
    written = load_config(Path(QUICKSTART), ["name=first", "search=null"])
    with open_run(resolve(written), resume=True):
        assert "another process" in refused("train name=first --resume")
        line = refused("train name=first --resume auto --wait-lock 0.2s", code=1)
        assert "another process" in line
        assert "0.2 s" in line


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_more_workers_than_the_cluster_has(command: str, tmp_path: Path) -> None:
    arguments = ["parallel.workers=512", "train.batch_size=512", f"storage={tmp_path}/runs"]
    if command == "sweep":
        arguments += ["search.space.train.batch_size=null"]
    line = _in_a_process("-m", "raytune_ft", command, QUICKSTART, "name=bad", *arguments)
    assert line.startswith("error: parallel.workers=512 with {CPU: 1} each needs 512 CPU;")
    assert not (tmp_path / "runs" / "bad").exists()


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = ["model.path=nobody/no-such-model", f"storage={tmp_path}/runs"]
    line = _in_a_process("-m", "raytune_ft", "train", QUICKSTART, *model)
    assert "model.path=nobody/no-such-model" in line
    assert "network" in line


@pytest.mark.parametrize(
    ("job", "arguments", "word"),
    [
        ("train", [QUICKSTART, "train.lrr=1"], "train.lr?"),
        ("sweep", [QUICKSTART, "train.lrr=1"], "train.lr?"),
        ("promote", ["nowhere"], "nowhere"),
    ],
)
def test_the_entry_points_of_jobs_say_the_same(
    job: str,
    arguments: list[str],
    word: str,
    session: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for library in ("HF_HUB", "TRANSFORMERS"):
        monkeypatch.setenv(f"{library}_VERBOSITY", "error")
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(f"jobs/{job}.py", run_name="__main__")
    line = capsys.readouterr().err
    assert caught.value.code == 2, line
    check_line(line)
    assert word in line


def _in_a_process(*arguments: str) -> str:
    """The line of a command with a cluster or an environment of its own."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    check_line(done.stderr)
    return done.stderr
