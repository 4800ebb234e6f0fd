"""From a run or a sweep to `promoted/`: select, make candidates, decide, measure, publish."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from raytune_ft.checkpoints.manifest import flush_files, fsync_folders
from raytune_ft.config.load import expand_env, load_config
from raytune_ft.config.metrics import compares
from raytune_ft.config.objectives import figures
from raytune_ft.config.schema import Config, ModelConfig, PromoteConfig
from raytune_ft.config.train import TrainConfig
from raytune_ft.config.trust import Code, check_code
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.prompts import prompted
from raytune_ft.data.report import DataReport, check_overlap, check_same
from raytune_ft.errors import CheckpointError, MergeError, ModelError, Promoted, StorageError
from raytune_ft.evaluate.answers import Asking
from raytune_ft.evaluate.classifier import constant_scores, length_scores
from raytune_ft.evaluate.evaluate import (
    Job,
    Measured,
    measured_split,
    prepare_retention,
    run_job,
    run_samples,
    split_named,
)
from raytune_ft.evaluate.generate import check_generation
from raytune_ft.evaluate.metrics import check_metrics
from raytune_ft.evaluate.precompute import referenced
from raytune_ft.evaluate.scoring import Scoring
from raytune_ft.evaluate.workers import HERE, Workers
from raytune_ft.files import fsync, read_json
from raytune_ft.layout import (
    ADAPTER,
    CARD,
    CONFIG,
    DATA,
    EVALUATION,
    MODEL,
    PROMOTED,
    PROMOTION,
    PROMOTION_LOCK,
    SCORES,
    cache_in,
    free_path,
)
from raytune_ft.locks import PROMOTING, WAIT, Wait, locked
from raytune_ft.merge.fold import held_out
from raytune_ft.merge.verify import FoldCheck
from raytune_ft.model.heads import Head
from raytune_ft.model.hub import at_path
from raytune_ft.model.load import base_file_hashes, load_tokenizer
from raytune_ft.model.methods.saved import unfoldable
from raytune_ft.model.objectives.classification import Classification
from raytune_ft.model.objectives.reward import Reward
from raytune_ft.model.sampling import end_tokens
from raytune_ft.promote.candidates import (
    BASE,
    BASE_NAME,
    BEST,
    Entry,
    Pantry,
    Written,
    entries,
)
from raytune_ft.promote.card import Lineage, model_card, package_versions
from raytune_ft.promote.decide import (
    Contender,
    Evaluation,
    Sample,
    Verdict,
    decide,
    evaluation_of,
    score_lines,
)
from raytune_ft.promote.select import Selection, read_result, select
from raytune_ft.records import Tell, to_json
from raytune_ft.strategy import Strategy
from raytune_ft.train.setup import evaluation_objective, head_of

CONSTANT, LENGTH = "constant", "length"
"""The reference of classifiers: a constant answer, the one with the smallest training loss."""


@dataclass(frozen=True)
class Jobs:
    """What every model of a promotion is measured with; `retained` is that of `Job`, and so is
    `asking`, which each split has its own of.
    """

    base: ModelConfig
    head: Head | None
    train: TrainConfig
    settings: PromoteConfig
    data_dir: Path
    retained: Path | None
    asking: Mapping[str, Asking | None] = field(default_factory=dict)

    def of(self, directory: Path, split: str, samples: int = 0) -> Job:
        """Measure the model in `directory`, which may be the base."""
        base = self.base
        is_base = str(directory) == base.path
        own = base.model_copy(update={"path": str(directory.absolute())})
        return Job(
            base if is_base else own,
            base,
            self.settings,
            self.data_dir,
            split,
            self.retained,
            samples,
            self.head,
            self.train,
            self.asking.get(split),
        )


@dataclass(frozen=True)
class MergeScore:
    """Scores a merge that is being made: its deciding figure on validation, negated where more is
    better, and infinite where it is not finite.
    """

    jobs: Jobs
    figure: str
    tokenizer: PreTrainedTokenizerBase
    report: DataReport

    def __call__(self, directory: Path, strategy: Strategy) -> float:
        if strategy.rank == 0 and not (directory / "tokenizer_config.json").is_file():
            save_tokenizer(self.tokenizer, directory, self.report)
        strategy.from_rank0(None)
        job = replace(self.jobs.of(directory, "validation"), retained=None)
        found = run_job(job, strategy).scores[self.figure]
        if not math.isfinite(found.value):
            return math.inf
        return found.value if found.mode == "min" else -found.value


@dataclass(frozen=True)
class Measurer:
    """Measures the models of one promotion; `samples` is that of `Job`. Where rewards score, the
    first of the models that are measured together is the base.
    """

    jobs: Jobs
    data: PreparedData
    samples: int
    workers: Workers
    scoring: Scoring
    tell: Tell

    @property
    def head(self) -> Head | None:
        """Of the models; None where they predict tokens."""
        return self.jobs.head

    @property
    def reference(self) -> str:
        """The name of what a promoted model is compared with: the base, or where that has no
        trained head a rule that needs no model.
        """
        if self.head is None:
            return BASE_NAME
        return LENGTH if self.data.report.pairs else CONSTANT

    def contenders(self, found: Sequence[Entry], directories: Sequence[Path]) -> list[Contender]:
        """Every candidate on validation and on the general set, the reference first."""
        measured = self._measured(directories, "validation")
        contenders = [
            Contender(entry.name, entry.simplicity, one)
            for entry, one in zip(found, measured, strict=True)
        ]
        if self.head is None:
            return contenders
        rule = self._by_rule("validation", self.head)
        return [Contender(self.reference, BASE, rule, is_model=False), *contenders]

    def on_test(self, directory: Path | None) -> tuple[Measured, Measured]:
        """Scores of the reference and of the promoted model; `directory` is None where the base was
        kept and is both.
        """
        directories = [Path(self.jobs.base.path)] if self.head is None else []
        directories += [] if directory is None else [directory]
        measured = self._measured(directories, "test", self.samples)
        reference = measured[0] if self.head is None else self._by_rule("test", self.head)
        return reference, measured[-1]

    def with_samples(
        self, base: Measured, promoted: Measured, directory: Path | None
    ) -> tuple[Measured, Measured]:
        """What was measured on validation, with what base and promoted model say to its first
        prompts; as it is where a metric has asked them more. `directory`: see `on_test`.
        """
        if self.head is not None or not self.samples or base.continuations:
            return base, promoted
        directories = [Path(self.jobs.base.path), *([] if directory is None else [directory])]
        jobs = [self.jobs.of(each, "validation", self.samples) for each in directories]
        said = self.workers.each(run_samples, jobs)
        return replace(base, continuations=said[0]), replace(promoted, continuations=said[-1])

    def _measured(
        self, directories: Sequence[Path], split: str, samples: int = 0
    ) -> list[Measured]:
        jobs = [self.jobs.of(directory, split, samples) for directory in directories]
        found = self.workers.each(run_job, jobs)
        scored = []
        for directory, one in zip(directories, found, strict=True):
            rates = self.scoring.win_rates(
                found[0].answers, one.answers, partial(self._tell_of, directory)
            )
            for note in () if one.answers is None else one.answers.notes:
                self._tell_of(directory, note)
            scored.append(replace(one, scores={**one.scores, **rates}))
        return scored

    def _tell_of(self, directory: Path, line: str) -> None:
        self.tell(f"{directory.name}: {line}")

    def _by_rule(self, split: str, head: Head) -> Measured:
        train, measured = self.data.train, split_named(self.data, split)
        objective = evaluation_objective(self.jobs.train, self.data)
        own = figures(self.jobs.train.objective, head.problem)
        if isinstance(objective, Reward):
            return Measured(length_scores(train, measured, objective, own))
        assert isinstance(objective, Classification)
        return Measured(constant_scores(train, measured, objective, own))


def same_scores(a: Measured, b: Measured) -> bool:
    """Whether every example has exactly the same loss, as where an adapter was not applied."""
    one, other = (each.scores["eval_loss"].columns[0] for each in (a, b))
    return bool(np.array_equal(one, other))


def looks_so_far(directory: Path) -> int:
    """How often the held-out split of this run or sweep has been measured before."""
    counts = [0]
    for path in directory.glob(f"{PROMOTED}*/{EVALUATION}"):
        counts.append(int(read_json(path).get("looks", 1)))
    return max(counts)


def publish(unfinished: Path, target: Path, tell: Callable[[str], None]) -> None:
    """Move `unfinished` to `target`; an earlier `target` is kept as `promoted-1` or the next free
    number.
    """
    fsync_folders(unfinished)
    if target.exists():
        kept = free_path(target, "-")
        target.rename(kept)
        tell(f"the earlier {PROMOTED} is kept as {kept.name}")
    unfinished.rename(target)
    fsync(target.parent)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Path, report: DataReport) -> None:
    """Save tokenizer and chat template, and add the end tokens of training to those that end
    generation.
    """
    tokenizer.save_pretrained(str(model))
    path = model / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    written = settings.get("eos_token_id")
    ends = end_tokens(written, tokenizer, report)
    if ends in ([], written, [written]):
        return
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion.

    Attributes:
        trial: the trial that was promoted; None for the base, a merge and a run of its own.
        better: the promoted model is better than the reference by the figure that decided, and the
            interval of the difference excludes zero.
        check: None where nothing was folded.
    """

    path: Path
    trial: str | None
    better: bool
    evaluation: Evaluation
    check: FoldCheck | None
    samples: tuple[Sample, ...]

    @property
    def model(self) -> Path:
        """The directory of the model, or of an adapter that cannot be folded."""
        model = self.path / MODEL
        return model if model.exists() else self.path / ADAPTER


def promote(
    directory: Path,
    again: bool = False,
    cache_dir: Path | None = None,
    tell: Tell = lambda line: None,
    samples: int = 3,
    wait_s: float | None = None,
    code: Code = (),
    workers_of: Callable[[Config], Workers] = lambda config: HERE,
) -> Promotion:
    """Write `directory/promoted` from a run or a sweep that has ended.

    Candidates are compared on validation alone, and the base is one of them; classifiers, whose
    base has no trained head, are compared with a constant answer. The test split is measured here
    only, once for the base and once for the promoted model. With `again` an earlier `promoted` is
    kept as `promoted-1` and so on. A promotion that is killed leaves an earlier one as it was, and
    what it wrote is made anew. `wait_s`: see `Wait`. `workers_of` the promoted run's config write
    and measure the models.

    `code` is the Python code that may be run of what the configs in the directory name.

    Raises:
        Promoted: `promoted` exists, and `again` is not given.
        StorageError: the run has not ended, another process promotes it, or the disk is full.
        LockHeld: another process promotes it for longer than `wait_s`.
        RunFailed: no trial is usable.
        CheckpointError: no checkpoint is sound.
        MergeError: a folded model differs from base and adapter.
        DataError: the data are missing, overlap, or have changed since the run began.
        ConfigError: a metric cannot be computed, or the directory's configs name other code.
        ModelError: the base cannot be loaded.
    """
    target = directory / PROMOTED
    read_result(directory)  # refuses what is no run before a lock is left there
    with locked(directory / PROMOTION_LOCK, PROMOTING, WAIT, Wait(wait_s, tell)):
        if target.exists() and not again:
            raise Promoted(
                str(target),
                "exists, and promoting again would measure the test split once more",
                "write --again to do so; the earlier one is kept beside it",
            )
        selection = select(directory, tell)
        own = load_config(directory / CONFIG)  # and not that of a trial
        kept = {key: getattr(own, key) for key in ("promote", "rewards", "sampling")}
        check_code(selection.config.model_copy(update=kept), directory, code)
        config = expand_env(selection.config)
        measuring = config.model_copy(update={**kept, "promote": selection.settings})
        check_metrics(measuring)
        workers = workers_of(config)
        if selection.settings.generation == "vllm":
            workers.alone(check_generation, "vllm", tell=tell)
        tokens = cache_dir or cache_in(directory.absolute().parent)  # a run may have been moved
        unfinished = directory / PROMOTION
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a promotion that was killed
        try:
            unfinished.mkdir()
            with Scoring.of(measuring, tokens) as scoring:
                promotion = _Promoter(
                    selection,
                    config,
                    directory,
                    unfinished,
                    tokens,
                    tell,
                    samples,
                    workers,
                    scoring,
                ).run()
            list(flush_files(unfinished))
            publish(unfinished, target, tell)
        except (OSError, SafetensorError) as cause:
            raise StorageError(
                str(target), f"cannot be written ({cause})", "make room there and promote again"
            ) from cause
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    tell(promotion.evaluation.verdict)
    return replace(promotion, path=target)


class _Promoter:
    """Fills `folder` from the run or sweep in `directory`."""

    def __init__(
        self,
        selection: Selection,
        config: Config,
        directory: Path,
        folder: Path,
        cache_dir: Path,
        tell: Tell,
        samples: int,
        workers: Workers,
        scoring: Scoring,
    ) -> None:
        self._workers = workers
        self._selection, self._directory, self._folder = selection, directory, folder
        self._tell, self._samples = tell, samples
        self._config, base = config, selection.settings.base
        self._model: ModelConfig = at_path(config.model, base) if base else config.model
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._config.model)
        data, settings = self._config.data, selection.settings
        seed = selection.data_seed
        plain = prepare_data(data, self._tokenizer, seed, cache_dir, tell, workers.tokenise)
        asked = prompted(self._config, plain, self._tokenizer)
        self._data = referenced(self._config, asked, tell, workers=workers, measured=True)
        if (directory / DATA).exists():
            check_same(directory / DATA, self._data.report)
        else:  # a trial alone has none
            tell(f"{directory} has no {DATA}, so that changes of the data cannot be detected")
        check_overlap(data, self._data.report, settings.max_overlap)
        self._promoted = folder / MODEL
        jobs = Jobs(
            self._model,
            head_of(self._config, self._data.report),
            self._config.train,
            settings,
            self._data.path,
            prepare_retention(settings, data, self._tokenizer, cache_dir, workers),
            {
                split: scoring.asking(plain, split, self._tokenizer, seed)
                for split in dict.fromkeys(("validation", measured_split(self._data)))
            },
        )
        for asking in jobs.asking.values():
            scoring.start(asking, workers, tell)
        self._measurer = Measurer(jobs, self._data, samples, workers, scoring, tell)

    def run(self) -> Promotion:
        """Everything that may raise comes before the test split is measured."""
        chosen, manifest = self._selection.candidate, self._selection.manifest
        self._tell(f"promoting {chosen.trial or chosen.run_dir.name}, step {manifest.step}")
        others = self._selection.others
        pantry = Pantry(
            self._model,
            [one.checkpoint for one in (chosen, *others)],
            [one.trial or self._selection.name for one in (chosen, *others)],
            held_out(self._data.validation, self._measurer.head),
            self._selection.settings,
            self._config.seed,
            self._measurer.head,
        )
        written = self._write_all(entries(pantry, self._tell))
        found = list(written)
        contenders = self._validate(found)
        verdict = decide(contenders, self._selection.figure)
        winner = next(entry for entry in found if entry.name == verdict.winner)
        self._take(winner)
        self._write_adapter(winner, written[winner].members)
        settings = {one.name: its.settings for one, its in written.items()}
        evaluation = self._test(verdict, contenders, settings)
        check = written[winner].check
        self._describe(winner, evaluation, written[winner])
        trial = chosen.trial if winner.name == chosen.trial else None
        return Promotion(
            self._folder,
            trial,
            evaluation.improved,
            evaluation,
            check,
            evaluation.samples[: self._samples],
        )

    def _directory_of(self, name: str) -> Path:
        base = Path(self._model.path)
        return base if name == BASE_NAME else self._folder / "candidates" / name

    def _write_all(self, wanted: Sequence[Entry]) -> dict[Entry, Written]:
        """Write all candidates. Under `merge: auto` a merge that cannot be made is left out."""
        written: dict[Entry, Written] = {}
        for entry in wanted:
            try:
                written[entry] = Written(None) if entry.name == BASE_NAME else self._write(entry)
            except (MergeError, CheckpointError, ModelError) as error:
                if self._selection.settings.merge != "auto" or entry.simplicity <= BEST:
                    raise
                self._tell(f"{entry.name} is passed over: {error}")
        return written

    def _write(self, entry: Entry) -> Written:
        directory = self._directory_of(entry.name)
        jobs, figure = self._measurer.jobs, self._selection.figure
        if entry.by_score and compares(figure):
            raise MergeError(f"{entry.name} chooses by a figure of one model, not by {figure}")
        score = MergeScore(jobs, figure, self._tokenizer, self._data.report)
        written = self._workers.alone(
            entry.write,
            directory,
            tell=self._tell,
            measure=score if entry.by_score else None,
        )
        save_tokenizer(self._tokenizer, directory, self._data.report)
        if written.check is not None:
            difference = f"{written.check.written_difference:.1e}"
            self._tell(f"{entry.name}: logits differ by at most {difference} as written")
        return written

    def _validate(self, found: Sequence[Entry]) -> list[Contender]:
        """Measure every candidate on validation and on the general set."""
        count = len(self._data.validation)
        several = f"{len(found)} candidates" if len(found) > 1 else "1 candidate"
        self._tell(f"measuring {several} on {count:,} examples (validation)")
        directories = [self._directory_of(entry.name) for entry in found]
        contenders = self._measurer.contenders(found, directories)
        self._keep("validation", {one.name: one.measured for one in contenders})
        for one in contenders[1:]:
            if same_scores(contenders[0].measured, one.measured):
                reference = self._measurer.reference
                self._tell(f"{one.name} has exactly the scores of {reference}: it changes nothing")
        return contenders

    def _test(
        self, verdict: Verdict, contenders: Sequence[Contender], settings: dict[str, dict[str, Any]]
    ) -> Evaluation:
        """Measure the reference and the winner on the test split; without one, what they have on
        validation stands.
        """
        name, reference = measured_split(self._data), self._measurer.reference
        kept = verdict.winner == BASE_NAME
        directory = None if kept else self._promoted
        looks = looks_so_far(self._directory) + 1
        if name == "test":
            count = len(split_named(self._data, name))
            self._tell(f"measuring {reference} and promoted model on {count:,} examples ({name})")
            base, promoted = self._measurer.on_test(directory)
            self._keep(name, {reference: base} | ({} if kept else {verdict.winner: promoted}))
        else:
            found = {one.name: one.measured for one in contenders}
            base, promoted = self._measurer.with_samples(
                found[reference], found[verdict.winner], directory
            )
        return evaluation_of(verdict, contenders, settings, name, base, promoted, looks, reference)

    def _take(self, winner: Entry) -> None:
        """Make the winner's directory the promoted model and delete the others."""
        if winner.name == BASE_NAME:
            self._workers.alone(winner.write, self._folder / MODEL, tell=self._tell)
            save_tokenizer(self._tokenizer, self._folder / MODEL, self._data.report)
        else:
            written = self._directory_of(winner.name)
            if (kind := unfoldable(written)) is not None:
                self._promoted = self._folder / ADAPTER
                self._tell(f"{kind} cannot be folded: {ADAPTER} holds it, to be used with its base")
            written.rename(self._promoted)
        shutil.rmtree(self._folder / "candidates")

    def _write_adapter(self, winner: Entry, members: Sequence[int]) -> None:
        """Write a winning merge as an adapter too, where `promote.merging.adapter_rank` is set."""
        rank = self._selection.settings.merging.adapter_rank
        if rank is None:
            return
        if winner.adapter is None:
            self._tell(f"{winner.name} is not a merge: nothing is factored to rank {rank}")
            return
        target = self._folder / ADAPTER
        made = self._workers.alone(winner.adapter, target, rank, members, tell=self._tell)
        self._tell(f"{ADAPTER}: rank {rank}, which loses {made.lost:.2%} of what was merged")

    def _keep(self, split: str, measured: Mapping[str, Measured]) -> None:
        with (self._folder / SCORES).open("a", encoding="utf-8") as file:
            for name, one in measured.items():
                file.writelines(score_lines(split, name, one))

    def _describe(self, winner: Entry, evaluation: Evaluation, written: Written) -> None:
        chosen, manifest = self._selection.candidate, self._selection.manifest
        single = winner.name == (chosen.trial or self._selection.name)
        lineage = Lineage(
            name=self._selection.name,
            config=self._config,
            config_sha256=manifest.config_sha256,
            base_files=base_file_hashes(self._model),
            data=self._data.report,
            trial=chosen.trial if single else None,
            params=chosen.params if single else written.settings,
            step=manifest.step if single else None,
            examples=manifest.examples if single else None,
            versions=package_versions(),
        )
        text = to_json(evaluation, indent=2) + "\n"
        (self._folder / EVALUATION).write_text(text, encoding="utf-8")
        shown = evaluation.samples[: self._samples]
        model_card(lineage, evaluation, written.check, shown, unfoldable(self._promoted)).save(
            self._folder / CARD
        )
