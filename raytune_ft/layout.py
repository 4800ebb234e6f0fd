"""Every file and folder that this package writes, by name.

STORAGE/
  .cache/tokens/                  token cache, shared by runs, trials and workers
    <key>/                        train.arrow, validation.arrow, test.arrow, report.json,
                                  <split>_partners.arrow,
                                  base_loss.npy, teacher_logits.npy, reference_<split>.npy,
                                  <split>_prompts.jsonl
    .reference-<key>/, .lock      blocks of a reference pass that is not done
    .parts-<key>/, .lock          parts of tokens that are not whole: 000000.arrow, 000000.json
  NAME/                           a run
    .lock                         held by the process that drives the run
    config.yaml                   the resolved config
    data.json                     what the data consisted of
    metrics.jsonl                 one line a step and an evaluation
    rollouts.jsonl                what the model said, where it learns from that: some of it
    result.json                   exists once the run has ended
    report.html
    hang.log                      stacks of ranks that made no progress
    budget.json                   smaller passes or recomputation, since memory ran out
    forecast.json                 on GPUs: the memory and speed that were expected
    tracking.json, tensorboard/   run ids of trackers; event files
    mirror.json                   storage s3://: which copy is the newest; touched by each copy
    checkpoints/
      step-000120/                a checkpoint
        manifest.json             size and sha256 of every file; written last
        adapter_config.json, adapter_model.safetensors         of an adapter, or
        config.json, model*.safetensors                        of a whole model
        state/                    state.json, and of each rank model*.safetensors and
                                  optimizer*.safetensors; rollout.safetensors inside a rollout
      step-000120.damaged-1/      moved aside
      .step-000120.<machine>.<pid>.<token>.new, .old    being written, being deleted
    promoted/                     promoted-1/ and so on are earlier promotions
      model/ or adapter/          manifest.json; .journal.json while it is written
      evaluation.json, scores.jsonl, README.md
    .promoted.new/, .promoted.lock                    a promotion in progress
  NAME/                           a sweep: also
    study.db                      Optuna's storage
    trials/<id>/                  each a run
    engines/<id>/                 of each process that trains several trials at once
"""

from __future__ import annotations

import re
from pathlib import Path

# A run.
CONFIG, RESULT, METRICS, DATA = "config.yaml", "result.json", "metrics.jsonl", "data.json"
CHECKPOINTS, PROMOTED = "checkpoints", "promoted"
ROLLOUTS, FIRST_ANSWERS = "rollouts.jsonl", "first_answers.json"
LOCK, HANG_LOG, REPORT = ".lock", "hang.log", "report.html"
TRACKING_IDS, TENSORBOARD = "tracking.json", "tensorboard"
MIRROR_OWNER = "mirror.json"
BUDGET, FORECAST = "budget.json", "forecast.json"

# A sweep.
STUDY, TRIALS, ENGINES = "study.db", "trials", "engines"

NOT_BEGUN = frozenset(
    {CONFIG, DATA, LOCK, HANG_LOG, BUDGET, FORECAST, TRACKING_IDS, TENSORBOARD, MIRROR_OWNER}
    | {CHECKPOINTS, STUDY, TRIALS, ENGINES}
)
"""What a driver leaves that was killed before anything was measured."""
UNFINISHED = (f".{CONFIG}.", f".{DATA}.", f".{FORECAST}.", f".{MIRROR_OWNER}.", f"{STUDY}-")
"""Names of files that were being written begin so."""

# A checkpoint.
MANIFEST = "manifest.json"
STATE, PROGRESS = "state", "state.json"
WEIGHTS, OPTIMIZER = "model", "optimizer"  # stems of the files in STATE
ROLLOUT = "rollout.safetensors"  # in STATE
STEP_NAME = re.compile(r"step-(\d{6,})")
HIDDEN_STEP = re.compile(
    r"\.step-\d+\.(?P<machine>.+)\.(?P<pid>\d+)\.(?P<token>\w+)\.(?P<kind>new|old)"
)

# A model directory of Hugging Face, and an adapter's directory of PEFT.
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# A promotion.
MODEL, ADAPTER = "model", "adapter"
EVALUATION, CARD, SCORES = "evaluation.json", "README.md", "scores.jsonl"
PROMOTION, PROMOTION_LOCK = ".promoted.new", ".promoted.lock"
JOURNAL = ".journal.json"

# An entry of the token cache.
DATA_REPORT = "report.json"
BASE_LOSS, TEACHER_LOGITS = "base_loss.npy", "teacher_logits.npy"


def partners_name(split: str) -> str:
    """The file of a split's partners, without its suffix."""
    return f"{split}_partners"


def reference_file(split: str) -> str:
    """The log-probabilities of a split's label tokens under the reference."""
    return f"reference_{split}.npy"


def rows_file(split: str) -> str:
    """The row of each example of a split."""
    return f"{split}_rows.npy"


def prompts_file(split: str) -> str:
    """The prompts of a split with their rows: a line of JSON for each of its examples."""
    return f"{split}_prompts.jsonl"


def step_name(step: int) -> str:
    """The folder of a step; zero-padded so that names sort as steps do."""
    return f"step-{step:06d}"


def checkpoint_path(step: int) -> str:
    """A checkpoint's path relative to its run."""
    return f"{CHECKPOINTS}/{step_name(step)}"


def hidden_step(name: str, owner: str, kind: str) -> str:
    """A checkpoint's folder while `owner` writes it (`new`) or deletes it (`old`)."""
    return f".{name}.{owner}.{kind}"


def shard_name(stem: str, rank: int, world_size: int) -> str:
    """The file of a rank, named as Hugging Face names the files of a sharded model."""
    if world_size == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def shard_files(folder: Path, stem: str) -> list[Path]:
    """The files that `shard_name` names, whatever the world size that wrote them."""
    return sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")])


def cache_in(storage: Path) -> Path:
    """The token cache beside the runs. No run can have this name: names begin with a letter or a
    digit.
    """
    return storage / ".cache" / "tokens"


def judges_beside(tokens: Path) -> Path:
    """The answers of judges, beside the token cache."""
    return tokens.with_name("judges")


def free_path(path: Path, suffix: str) -> Path:
    """The first of `PATH<suffix>1`, `PATH<suffix>2`, ... that does not exist."""
    number = 1
    while (free := path.with_name(f"{path.name}{suffix}{number}")).exists():
        number += 1
    return free
