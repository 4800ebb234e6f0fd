"""What a classifier's directory scores, by its own head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Config, ModelConfig, ParallelConfig
from raytune_ft.data.report import DataReport
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.model.build import disk_dtype, load_base, load_model_config
from raytune_ft.model.heads import Head, reading
from raytune_ft.model.objectives.classification import Classification
from raytune_ft.strategy.single import Single
from raytune_ft.train.engine import Engine, choose_micro_tokens
from raytune_ft.train.evaluation import evaluate


def check_no_classifier(config: Config, directory: Path) -> None:
    """Raises ConfigError where the best of `directory` has a task head."""
    if config.train.objective == "classification":
        raise ConfigError(
            f"train.objective=classification in {directory}",
            "makes classifiers, which promotion does not fold and measure",
            "take the best checkpoint of its result.json: under method.name=full it is a plain "
            "model directory, else a PEFT adapter, and `raytune-ft evaluate` measures the former",
        )


def classifier_figures(
    model: ModelConfig, split: TokenizedSplit, data: DataReport
) -> dict[str, float]:
    """Loss and figures of the problem, without class weights, in the dtype on disk.

    Raises:
        ModelError: the directory has no such head, or one for other labels.
    """
    assert data.problem is not None
    head = Head(data.problem, data.labels)
    _check_labels(model, data)
    strategy = Single(ParallelConfig(), "float32")
    built: Any = load_base(model, disk_dtype(model, head), head).eval()
    engine = Engine(
        model=built,
        wrapped=strategy.lay_out(built),
        head=None,
        names=[],
        strategy=strategy,
        precision=strategy.precision,
        pad_token=built.config.get_text_config().pad_token_id,
        micro_tokens=choose_micro_tokens("auto", strategy.device),
        packing=False,
        objective=Classification(data.problem, (1.0,) * len(data.labels)),
        reading=reading(built, "row"),
    )
    return evaluate(engine, split).figures


def _check_labels(model: ModelConfig, data: DataReport) -> None:
    config = load_model_config(model, Head(data.problem or "", ()))
    written = load_written_labels(model)
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        raise ModelError(
            f"MODEL_DIR={model.path}", "has no classification head", "write one that training made"
        )
    if data.problem != "regression" and written != data.labels:
        raise ModelError(
            f"MODEL_DIR={model.path}",
            f"tells {', '.join(written[:12])} apart, and the data {', '.join(data.labels[:12])}",
            "write data.labels as the model has them",
        )


def load_written_labels(model: ModelConfig) -> tuple[str, ...]:
    """Those in the directory's own config.json, in their order."""
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(model.path).id2label
    return tuple(names[number] for number in sorted(names))
