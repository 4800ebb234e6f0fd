"""What a config file may say. One class per section, frozen, unknown keys refused.

Importing this module loads neither torch nor ray nor transformers. Every `description` is the
reference that `raytune-ft schema` prints, so it is written for the person who writes the file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.config.merging import MergeName, MergingConfig
from raytune_ft.config.methods import DEFAULT_METHOD, METHODS, LoraMethod, MethodConfig
from raytune_ft.config.rewards import REWARDS, RewardConfig, RewardOf
from raytune_ft.config.sampling import SamplingConfig
from raytune_ft.config.search import SearchConfig
from raytune_ft.config.section import NameIn, Positive, Section, SectionOf
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.config.train import TrainConfig

TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]
PACKAGES: dict[str, str] = {
    "tensorboard": "tensorboardX",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "trackio": "trackio",
}


class TrackingConfig(Section):
    """Where metrics go beside metrics.jsonl. Nothing here changes the numbers."""

    to: list[TrackerName] = Field(
        ["tensorboard"],
        description="any of tensorboard (event files in the run's directory), mlflow, wandb and "
        "trackio; keys and passwords of servers come from the environment alone",
    )
    project: str = Field(
        "raytune-ft",
        min_length=1,
        description="project of wandb and trackio; mlflow's experiment is PROJECT/SWEEP",
    )
    uri: str | None = Field(
        None, description="mlflow: the server's address; null is MLFLOW_TRACKING_URI"
    )
    every_steps: Positive = Field(
        1, description="of the steps, one in this many; evaluations all go"
    )


class ModelConfig(Section):
    """Which model is fine-tuned."""

    path: str = Field(
        "builtin:tiny",
        min_length=1,
        description="a local directory, a Hugging Face hub id, or builtin:tiny",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="how frozen weights are held; auto is train.precision. Trained weights are "
        "held in float32 whatever is written here (float64 under precision: float64)",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="transformers' attn_implementation; auto leaves the choice to it"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(
        False,
        description="run Python code that comes with the model; a hub id then needs a commit as "
        "revision",
    )


class ParallelConfig(Section):
    """How a run is spread over workers. Nothing here changes the numbers."""

    strategy: Annotated[str, NameIn(STRATEGIES, first=("auto",))] = Field(
        "auto",
        description="auto: single for one worker, ddp for adapters on a base that fits on each "
        "worker, else fsdp",
    )
    workers: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        1,
        description="Ray Train workers of one run or trial; [min, max] goes on with the workers "
        "that are left when a node is lost",
    )
    resources_per_worker: Literal["auto"] | dict[str, float] = Field(
        "auto",
        description="what Ray reserves for each worker; CPU is also its number of threads. auto, "
        "and what a mapping leaves out: CPU 1, and GPU 1 where the cluster or this machine has "
        "any or accelerator is written, else 0",
    )
    accelerator: str | None = Field(
        None,
        min_length=1,
        description="workers run on nodes with this accelerator, by Ray's name, such as H100; null "
        "is any",
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict,
        description="workers run on nodes with these labels, such as {ray.io/market-type: "
        "on-demand}; a value is a text, !text, in(a, b) or !in(a, b)",
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK",
        description="PACK: workers of a run on as few nodes as possible, SPREAD: on as many; "
        "STRICT_PACK: on one node, STRICT_SPREAD: each on a node of its own, or not at all",
    )
    replicas: Positive = Field(
        1,
        description="fsdp: copies of the sharded model, each on workers / replicas of the workers; "
        "with one copy a node, weights are gathered inside nodes alone",
    )
    reshard_after_forward: bool = Field(
        True,
        description="fsdp: free a block's gathered weights after its forward; false keeps them "
        "until its backward, which is faster and needs memory for the whole model",
    )
    zero_stage: Literal[1, 2, 3] = Field(
        3, description="deepspeed: 1 shards moments, 2 gradients too, 3 weights too"
    )
    deepspeed: str | None = Field(
        None,
        description="deepspeed: a DeepSpeed JSON file; keys that contradict this config are "
        "refused by name",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="keep in host memory: the optimizer's state (deepspeed), or weights too "
        "(fsdp, and deepspeed with zero_stage 3)",
    )
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="recompute blocks in the backward: selective keeps the results of matrix "
        "products and attention, full keeps a block's input alone; auto: as little as fits into "
        "memory, by the estimate of plan",
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        2, description="restarts from the last checkpoint after a lost worker"
    )
    hang_timeout_s: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="a group of workers without progress for this long is restarted, and the log "
        "says what each worker was doing; auto is 1800, and from the third step or evaluation 20 "
        "times the longest silence in those seen, of 300 to 1800",
    )
    wait_for_nodes: Literal["auto"] | Annotated[float, Field(ge=0)] | str = Field(
        "auto",
        description="how long a run waits for nodes that the cluster lacks, before it is refused: "
        "seconds, or a text such as 90s, 15m, 2h; auto is 15m where an autoscaler adds nodes, else "
        "0",
    )

    @property
    def min_workers(self) -> int:
        """The fewest workers that a run continues with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The workers that a run asks for."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each worker; without a GPU where `auto` is not resolved yet."""
        written = self.resources_per_worker
        return {"CPU": 1.0, "GPU": 0.0} | (written if isinstance(written, dict) else {})

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where workers compute."""
        return "cuda" if self.resources["GPU"] > 0 else "cpu"

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.min_workers != self.max_workers


class CheckpointConfig(Section):
    """What is kept on disk."""

    every_examples: Positive = Field(
        1000, description="save at the first step at or past each multiple"
    )
    keep_last: Annotated[int, Field(ge=2)] = 2
    keep_best: Positive = 1
    keep_every_examples: Positive | None = Field(
        None,
        description="also keep, for good, the first checkpoint at or past each multiple",
    )
    asynchronous: bool = Field(True, description="write in the background while training goes on")


class PromoteConfig(Section):
    """Which model leaves the sweep."""

    top_k: Positive = Field(
        3, description="trials looked at; merge: best takes the first whose checkpoint is sound"
    )
    merge: MergeName = Field(
        "best",
        description="how the trials looked at become one model; auto tries the cheap ones and "
        "keeps the winner",
    )
    merging: MergingConfig = MergingConfig()
    base: str | None = Field(
        None,
        description="fold onto this model instead of model.path: to be written where that one is "
        "quantised",
    )
    max_shard_size: str = Field("5GB", description="of the promoted model's files, at most")
    metrics: list[str] = Field(
        ["loss"],
        description="what candidates and the promoted model are measured by: loss, answer, rouge, "
        "classification, reward, reward:NAME, win_rate:NAME, win_rate_lc:NAME, lm_eval:TASK, "
        "lm_eval:FILE.yaml, or FILE.py:FUNCTION",
    )
    completions: Positive = Field(
        1,
        description="metrics: rewards score this many completions of each prompt, drawn as "
        "sampling says",
    )
    metric: str | None = Field(
        None,
        description="the figure that decides on validation, such as answer_exact_match; null is "
        "that of the search",
    )
    answer: str = Field(
        r"####\s*(\S+)",
        description="metrics: answer compares what the group of this regular expression finds",
    )
    max_new_tokens: Positive = Field(256, description="longest greedy continuation of a prompt")
    generation: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="auto: vLLM where it and a GPU are there, else transformers"
    )
    retention: SourceConfig | None = Field(
        None, description="a general set, for loss and KL against the base: what was forgotten"
    )
    max_overlap: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        description="more of the prompts of data.test (or of a data.validation of its own) than "
        "this in train, and it is refused",
    )


class Config(Section):
    """A whole file."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the directory below storage"
    )
    seed: Annotated[int, Field(ge=0)] = 0
    storage: str = Field("runs", min_length=1, description="where runs are kept")
    model: ModelConfig = ModelConfig()
    method: Annotated[MethodConfig, SectionOf(METHODS, DEFAULT_METHOD)] = LoraMethod()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    search: SearchConfig | None = None
    promote: PromoteConfig = PromoteConfig()
    tracking: TrackingConfig = TrackingConfig()
    sampling: SamplingConfig = SamplingConfig()
    rewards: list[Annotated[RewardConfig, RewardOf(REWARDS, "")]] = Field(
        default_factory=list,
        description="what scores completions, of `raytune-ft sample`, of objectives that learn "
        "from what the model says, and of promote.metrics: names of "
        f"{', '.join(REWARDS)}, or FILE.py:FUNCTION, or sections with such a name",
    )
