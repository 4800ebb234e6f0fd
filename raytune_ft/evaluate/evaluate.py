"""Measure a model directory on a split: every figure, from columns with a value an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import FORMATS, DataConfig
from raytune_ft.config.metrics import OWN
from raytune_ft.config.objectives import figures
from raytune_ft.config.schema import Config, ModelConfig, PromoteConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData, open_prepared
from raytune_ft.data.prompts import prompted
from raytune_ft.data.report import DataReport, check_overlap
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.evaluate.answers import Answers, Asking, answers_of
from raytune_ft.evaluate.classifier import check_head
from raytune_ft.evaluate.columns import columns_of, figures_of, retention
from raytune_ft.evaluate.context import Continuation, Subject, runner_of
from raytune_ft.evaluate.metrics import check_metrics, metric_named
from raytune_ft.evaluate.precompute import referenced
from raytune_ft.evaluate.scores import Scores
from raytune_ft.evaluate.scoring import Scoring
from raytune_ft.evaluate.workers import HERE, Workers
from raytune_ft.model.heads import Head
from raytune_ft.model.hub import given_model
from raytune_ft.model.load import check_files, load_tokenizer
from raytune_ft.model.methods.saved import unfoldable
from raytune_ft.model.sampling import stop_tokens
from raytune_ft.records import Tell
from raytune_ft.strategy import Strategy
from raytune_ft.train.setup import evaluation_objective, head_of


@dataclass(frozen=True)
class Job:
    """Plain facts: what a process needs to measure one model. Paths are absolute.

    Attributes:
        model: what is measured; its path is a directory, a hub id or `builtin:`. It may be an
            adapter that cannot be folded.
        base: what retention compares with, and the model that such an adapter works in.
        split: "validation" or "test".
        head: the task head that `model` has; None where it predicts tokens.
        train: what it was trained for.
        asking: what rewards are to score; None where no metric asks for it.
        retained: tokens of `promote.retention`, None where there is none.
        samples: how many of the first prompts of the split are continued, for people to read.
    """

    model: ModelConfig
    base: ModelConfig
    settings: PromoteConfig
    data_dir: Path
    split: str
    retained: Path | None = None
    samples: int = 0
    head: Head | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    asking: Asking | None = None


@dataclass(frozen=True)
class Measured:
    """Scores by the names of figures, those of `retention_` over another set; and texts.

    `continuations` are of all examples where a metric needs them, else of the samples alone.
    `answers` are what rewards have scored, where a metric asks for that.
    """

    scores: Mapping[str, Scores]
    continuations: tuple[Continuation, ...] = ()
    answers: Answers | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The values by name."""
        return {name: score.value for name, score in self.scores.items()}


def run_job(job: Job, strategy: Strategy) -> Measured:
    """Load one model and measure it, in all processes of `strategy` at once.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError, DataError, RunFailed: a metric cannot be computed.
    """
    subject = subject_of(job, strategy)
    if job.head is not None:  # which generates no text, so that no other metric applies
        runner = runner_of(job.model, subject.tokenizer, head=job.head, strategy=strategy)
        columns = columns_of(runner, subject.objective, subject.split)
        return Measured(figures_of(columns, subject.figures, subject.split))
    scores = measure(subject)
    if job.retained is not None:
        general = open_prepared(job.retained).train
        same = job.model == job.base
        base = subject.runner if same else runner_of(job.base, subject.tokenizer, strategy=strategy)
        scores |= retention(subject.runner, base, general)
    made = "continuations" in vars(subject)  # some metric has asked for them
    shown = subject.continuations if made else subject.first(job.samples)
    return Measured(scores, tuple(shown), vars(subject).get("answers"))


def run_samples(job: Job, strategy: Strategy) -> tuple[Continuation, ...]:
    """What a model says to the first `job.samples` prompts; raises as `run_job` does."""
    return tuple(subject_of(job, strategy).first(job.samples))


def subject_of(job: Job, strategy: Strategy) -> Subject:
    """What metrics read of a model."""
    data = open_prepared(job.data_dir)
    tokenizer = tokenizer_of(job.model, job.base)
    return Subject(
        job.model,
        tokenizer,
        split_named(data, job.split),
        data.train,
        job.settings,
        is_chat(data.report),
        job.base,
        stop_tokens(tokenizer, job.base, data.report),
        evaluation_objective(job.train, data),
        figures(job.train.objective, data.report.problem or "single_label"),
        strategy,
        job.asking,
    )


def run_answers(job: Job, strategy: Strategy) -> Answers:
    """What a model answers, and nothing else of it; raises as `run_job` does."""
    assert job.asking is not None
    data, tokenizer = open_prepared(job.data_dir), tokenizer_of(job.model, job.base)
    runner = runner_of(job.model, tokenizer, job.base, strategy=strategy)
    ends = stop_tokens(tokenizer, job.base, data.report)
    return answers_of(runner, tokenizer, ends, job.asking)


def measure(subject: Subject) -> dict[str, Scores]:
    """Every figure of `promote.metrics` but win rates; those of the objective itself always."""
    scores: dict[str, Scores] = {}
    for name in dict.fromkeys([OWN, *subject.settings.metrics]):
        scores |= metric_named(name)(subject)
    return scores


def evaluate_directory(
    directory: Path,
    config: Config,
    cache_dir: Path,
    workers: Workers = HERE,
    tell: Tell = lambda line: None,
) -> tuple[str, int, dict[str, float]]:
    """(split, examples, figures) of any model directory on the test data of `config`.

    Tokens are those of the directory's own tokenizer; an adapter that cannot be folded is used with
    `model` of the config and its tokenizer. Without data.test the split is "validation". Retention
    compares with `model` of the config.

    Raises:
        ConfigError: a metric of the user's own does not exist, or the objective's keys do not go
            with the data.
        DataError, ModelError: the data or the directory cannot be read, or they overlap.
    """
    check_metrics(config)
    model = given_model(config.model, directory)
    if unfoldable(directory) is None and directory.is_dir():
        check_files(model)
    tokenizer = tokenizer_of(model, config.model)
    plain = prepare_data(config.data, tokenizer, config.seed, cache_dir, workers=workers.tokenise)
    data = prompted(config, plain, tokenizer)
    data = referenced(config, data, tell, workers=workers, measured=True)
    check_overlap(config.data, data.report, config.promote.max_overlap)
    name = measured_split(data)
    head = head_of(config, data.report)
    if head is not None:
        check_head(model, head)
    retained = prepare_retention(config.promote, config.data, tokenizer, cache_dir, workers)
    job = Job(
        model,
        config.model,
        config.promote,
        data.path,
        name,
        retained,
        head=head,
        train=config.train,
    )
    with Scoring.of(config, cache_dir) as scoring:
        asking = scoring.asking(plain, name, tokenizer, config.seed)
        scoring.start(asking, workers, tell)
        measured = workers.each(run_job, [replace(job, asking=asking)])[0]
        figures = measured.figures
        if measured.answers is not None and scoring.duels.rewards:
            own = load_tokenizer(config.model)
            plain = prepare_data(config.data, own, config.seed, cache_dir, workers=workers.tokenise)
            asked = scoring.asking(plain, name, own, config.seed)
            base = replace(job, model=config.model, asking=asked)
            (answers,) = workers.each(run_answers, [base])
            rates = scoring.win_rates(answers, measured.answers, tell)
            figures |= {figure: each.value for figure, each in rates.items()}
        for note in () if measured.answers is None else measured.answers.notes:
            tell(note)
    return name, len(split_named(data, name)), figures


def tokenizer_of(model: ModelConfig, base: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or its base's: where it has none, and for an adapter that cannot be
    folded.
    """
    directory = Path(model.path)
    bare = directory.is_dir() and not list(directory.glob("tokenizer*"))
    return load_tokenizer(base if bare or unfoldable(directory) else model)


def prepare_retention(
    settings: PromoteConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    workers: Workers,
) -> Path | None:
    """Tokens of `promote.retention`, cut to the lengths of `data`; None where there is none.

    Raises:
        DataError: the source cannot be read.
    """
    if settings.retention is None:
        return None
    # The rows fill the split "train". A validation split is required and not read: a copy.
    changes: dict[str, Any] = {
        "train": settings.retention,
        "validation": settings.retention,
        "test": None,
        "mixture": None,
        "curriculum": None,
    }
    read = data.model_copy(update=changes)
    return prepare_data(read, tokenizer, 0, cache_dir, workers=workers.tokenise).path


def is_chat(report: DataReport) -> bool:
    """Whether models are trained on conversations."""
    trained = (one for name, one in report.sources.items() if name.partition(".")[0] == "train")
    return any(FORMATS[source.format].chat_template for source in trained)


def measured_split(data: PreparedData) -> str:
    """The test split if there is one, else the validation split."""
    return "validation" if data.test is None else "test"


def split_named(data: PreparedData, name: str) -> TokenizedSplit:
    """`data.validation` or `data.test`."""
    split = data.test if name == "test" else data.validation
    assert split is not None
    return split
