"""From a run or a sweep to `promoted/`: select, fold, measure, describe, publish by one rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from raytune_ft.checkpoints.manifest import flush_files, fsync_folders
from raytune_ft.config.load import expand_env
from raytune_ft.data.prepare import PreparedData, prepare_data
from raytune_ft.data.same import check_same
from raytune_ft.errors import StorageError
from raytune_ft.files import fsync
from raytune_ft.model.build import load_tokenizer
from raytune_ft.promote.card import (
    Evaluation,
    Lineage,
    Sample,
    base_file_hashes,
    model_card,
    package_versions,
)
from raytune_ft.promote.evaluate import decode, measure, measured_split, sample_prompts
from raytune_ft.promote.fold import FoldCheck, fold, held_out
from raytune_ft.promote.select import Selection, select
from raytune_ft.records import to_json
from raytune_ft.rundir import DATA, PROMOTED, cache_in

MODEL, EVALUATION, CARD = "model", "evaluation.json", "README.md"
_UNFINISHED = ".promoted.new"
_LOCK = ".promoted.lock"
_METRIC = {
    "eval_loss": "eval_loss",
    "eval_token_accuracy": "token_accuracy",
    "eval_exact_match": "exact_match",
}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Promotion:
    """What came of it. `better`: than the base, by the metric that chose the model."""

    path: Path
    trial: str | None
    better: bool
    evaluation: Evaluation
    check: FoldCheck
    samples: tuple[Sample, ...]

    @property
    def model(self) -> Path:
        """The directory that `from_pretrained` takes."""
        return self.path / MODEL


def promote(
    directory: Path,
    again: bool = False,
    cache_dir: Path | None = None,
    tell: Tell = lambda line: None,
    samples: int = 3,
) -> Promotion:
    """Write `directory/promoted` from the best checkpoint of a run or a sweep that has ended.

    The test split is measured here and nowhere else, once for the base and once for the promoted
    model. A model that is not better than its base is written all the same, and called so. With
    `again` an earlier `promoted` is kept as `promoted-1`, and so on. What is killed half-way
    leaves `promoted` as it was.

    Raises:
        StorageError: no run that ended, `promoted` exists and not `again`, or no room to write.
        RunFailed: nothing usable (CheckpointError: nothing sound; MergeError: a wrong fold).
        DataError: the data are gone, or not what they were when the run began.
        ModelError: the base is gone.
    """
    target = directory / PROMOTED
    selection = select(directory, tell)
    if target.exists() and not again:
        raise StorageError(
            str(target),
            "exists, and promoting again would measure the test split once more",
            "write --again to do so; the earlier one is kept beside it",
        )
    tokens = cache_dir or cache_in(directory.absolute().parent)  # a run may have been moved
    with _locked(directory):
        unfinished = directory / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)  # of a promotion that was killed
        try:
            unfinished.mkdir()
            looks = _looks(directory) + 1
            promotion = _build(selection, directory, unfinished, tokens, looks, tell, samples)
            list(flush_files(unfinished))
            _publish(unfinished, target, tell)
        except (OSError, SafetensorError) as cause:
            raise StorageError(
                str(target), f"cannot be written ({cause})", "make room there and promote again"
            ) from cause
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    tell(promotion.evaluation.verdict)
    return Promotion(
        target,
        promotion.trial,
        promotion.better,
        promotion.evaluation,
        promotion.check,
        promotion.samples,
    )


def _build(
    selection: Selection,
    directory: Path,
    folder: Path,
    cache_dir: Path,
    looks: int,
    tell: Tell,
    samples: int,
) -> Promotion:
    """Fill `folder` from the run or sweep in `directory`.

    Everything that can be refused is refused before the test split is measured.
    """
    chosen, config = selection.candidate, expand_env(selection.config)
    tell(f"promoting {chosen.trial or chosen.run_dir.name}, step {selection.manifest.step}")
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer, selection.data_seed, cache_dir, tell)
    if (directory / DATA).exists():
        check_same(directory / DATA, data.report)
    else:  # of a trial by itself, or of an earlier version
        tell(f"{directory} keeps no {DATA}, so whether the data are the same is not known")
    check = fold(config.model, chosen.checkpoint, folder / MODEL, held_out(data.validation))
    tell(f"folded; logits differ by at most {check.written_difference:.1e} as written")
    _save_tokenizer(tokenizer, folder / MODEL)
    evaluation, better, shown = _evaluate(
        selection, folder / MODEL, tokenizer, data, looks, tell, samples
    )
    lineage = Lineage(
        name=selection.name,
        config=config,
        config_sha256=selection.manifest.config_sha256,
        base_files=base_file_hashes(config.model),
        data=data.report,
        trial=chosen.trial,
        params=chosen.params,
        step=selection.manifest.step,
        examples=selection.manifest.examples,
        versions=package_versions(),
    )
    (folder / EVALUATION).write_text(to_json(evaluation, indent=2) + "\n", encoding="utf-8")
    model_card(lineage, evaluation, check, shown).save(folder / CARD)
    return Promotion(folder, chosen.trial, better, evaluation, check, shown)


def _evaluate(
    selection: Selection,
    promoted: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    looks: int,
    tell: Tell,
    samples: int,
) -> tuple[Evaluation, bool, tuple[Sample, ...]]:
    """Base and promoted model on the same tokens; whether the second is better; what both say."""
    name, split = measured_split(data)
    prompts = sample_prompts(split, samples)
    model = expand_env(selection.config).model
    tell(f"measuring base and promoted model on {len(split):,} examples ({name})")
    base = measure(model, tokenizer, split, prompts)
    own = model.model_copy(update={"path": str(promoted), "revision": None})
    new = measure(own, tokenizer, split, prompts)
    metric = _METRIC[selection.metric]
    before, after = base.metrics[metric], new.metrics[metric]
    better = after < before if selection.mode == "min" else after > before
    verdict = (
        f"promoted is {'better' if better else 'not better'} than base "
        f"({metric} {after:.4f} against {before:.4f})"
    )
    shown = tuple(
        Sample(decode(tokenizer, prompt.ids), decode(tokenizer, prompt.reference), *texts)
        for prompt, *texts in zip(prompts, base.continuations, new.continuations, strict=True)
    )
    evaluation = Evaluation(name, len(split), base.metrics, new.metrics, looks, verdict)
    return evaluation, better, shown


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Path) -> None:
    """Tokenizer and chat template; and the end token that training used ends generation too."""
    tokenizer.save_pretrained(str(model))
    path = model / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    written = settings.get("eos_token_id")
    known = written if isinstance(written, list) else [written] if written is not None else []
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id in known:
        return
    ends = [*known, tokenizer.eos_token_id]
    settings["eos_token_id"] = ends if known else tokenizer.eos_token_id
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _looks(directory: Path) -> int:
    """How often the held-out split of this run or sweep has been measured so far."""
    counts = [0]
    for path in directory.glob(f"{PROMOTED}*/{EVALUATION}"):
        counts.append(int(json.loads(path.read_text(encoding="utf-8")).get("looks", 1)))
    return max(counts)


def _publish(unfinished: Path, target: Path, tell: Tell) -> None:
    fsync_folders(unfinished)
    if target.exists():
        number = 1
        while (kept := target.with_name(f"{PROMOTED}-{number}")).exists():
            number += 1
        target.rename(kept)
        tell(f"the earlier {PROMOTED} is kept as {kept.name}")
    unfinished.rename(target)
    fsync(target.parent)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One promotion at a time; the kernel gives the lock up when its holder dies."""
    lock = FileLock(directory / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StorageError(
            str(directory), "is being promoted by another process", "wait for it to end"
        ) from None
    except OSError as error:
        raise StorageError(
            str(directory), f"cannot be written ({error.strerror})", "make it writable"
        ) from error
    try:
        yield
    finally:
        lock.release()
