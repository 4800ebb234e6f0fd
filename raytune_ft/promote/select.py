"""Select the checkpoint of a run or a sweep to promote, from files alone: no model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.checkpoints.store import CheckpointStore
from raytune_ft.config.explain import shown_value
from raytune_ft.config.load import expand_env, load_config
from raytune_ft.config.metrics import deciding
from raytune_ft.config.schema import Config, PromoteConfig
from raytune_ft.errors import CheckpointError, RunFailed, StorageError
from raytune_ft.files import below, read_json
from raytune_ft.layout import CHECKPOINTS, CONFIG, RESULT, TRIALS
from raytune_ft.records import CheckpointManifest
from raytune_ft.search.results import USABLE


@dataclass(frozen=True)
class Candidate:
    """A run whose best checkpoint may be promoted.

    Attributes:
        trial, params: of its sweep; None and {} for a run of its own.
        score: the metric of that checkpoint on validation.
    """

    run_dir: Path
    trial: str | None
    params: Mapping[str, Any]
    checkpoint: Path
    score: float


@dataclass(frozen=True)
class Selection:
    """What may be promoted.

    Attributes:
        candidate: the best run with a sound checkpoint, whose manifest and config follow.
        name, data_seed, settings: of the directory. A sweep draws its splits once, by its own seed,
            whatever seed a trial trains with.
        metric, mode: what ranked the runs.
        figure: decides between the candidate, the base and merges.
        others: the sound candidates after the best, for merges.
    """

    candidate: Candidate
    manifest: CheckpointManifest
    config: Config
    name: str
    data_seed: int
    metric: str
    mode: str
    settings: PromoteConfig
    figure: str
    others: tuple[Candidate, ...] = ()


def select(directory: Path, tell: Callable[[str], None]) -> Selection:
    """The best run of `directory` whose best checkpoint verifies, out of the first `top_k`.

    Raises:
        StorageError: the directory is not a run or sweep that has ended.
        RunFailed: no trial is usable, or the run failed.
        CheckpointError: none of the checkpoints looked at is sound.
    """
    result = read_result(directory)
    if result.get("status") == "interrupted":
        raise StorageError(str(directory), "was interrupted", "continue it with --resume first")
    config = load_config(directory / CONFIG)
    sweep = "trials" in result
    metric, mode = ("eval_loss", "min")
    if sweep and config.search is not None:
        metric, mode = config.search.metrics[0], config.search.modes[0]
    ranked = (
        _ranked_trials(directory, result, metric, mode)
        if sweep
        else _the_run(directory, result, metric, mode)
    )
    sound: list[tuple[Candidate, CheckpointManifest]] = []
    looked_at = ranked[: config.promote.top_k]
    for candidate in looked_at:
        if sound and config.promote.merge == "best":
            break
        store = CheckpointStore(candidate.checkpoint.parent)
        try:
            sound.append((candidate, store.verify(candidate.checkpoint)))
        except CheckpointError as error:
            tell(f"{candidate.trial or directory.name} is passed over: {error}")
    if not sound:
        raise CheckpointError(
            f"{directory} has no sound checkpoint to promote among its best {len(looked_at)}"
        )
    best, manifest = sound[0]
    return Selection(
        best,
        manifest,
        load_config(best.run_dir / CONFIG),
        config.name,
        config.seed,
        metric,
        mode,
        expand_env(config).promote,
        deciding(config.promote, config.search if sweep else None),
        tuple(candidate for candidate, _ in sound[1:]),
    )


def read_result(directory: Path) -> dict[str, Any]:
    """`result.json` of a run or a sweep.

    Raises:
        StorageError: it does not exist, or is not JSON.
    """
    remedy = "write the directory of a run or sweep that ended, or resume it with --resume"
    try:
        result = read_json(directory / RESULT)
    except FileNotFoundError:
        raise StorageError(str(directory), f"holds no {RESULT}", remedy) from None
    except (OSError, ValueError) as error:
        raise StorageError(str(directory / RESULT), f"cannot be read ({error})", remedy) from error
    if not isinstance(result, dict) or not (directory / CONFIG).is_file():
        raise StorageError(str(directory), f"holds no {CONFIG} and {RESULT} of a run", remedy)
    return result


def _the_run(directory: Path, result: Mapping[str, Any], metric: str, mode: str) -> list[Candidate]:
    if result["status"] not in USABLE:
        why = result.get("error") or "no reason is recorded"
        raise RunFailed(f"{directory} has status {result['status']} ({why}): nothing to promote")
    found = _candidate(directory, None, {}, metric, mode)
    if found is None:
        raise CheckpointError(f"{directory} has no checkpoint of its best evaluation")
    return [found]


def _ranked_trials(
    directory: Path, result: Mapping[str, Any], metric: str, mode: str
) -> list[Candidate]:
    """Usable trials: the best of the sweep's result first, the others by their best evaluation."""
    for trial in result["trials"]:
        try:
            below(directory / TRIALS, trial["id"])
        except ValueError:
            raise StorageError(
                f"{directory / RESULT}",
                f"names the trial {shown_value(trial['id'])}, which is not in {TRIALS}",
                "find out who wrote that file",
            ) from None
    found = [
        _candidate(directory / TRIALS / trial["id"], trial["id"], trial["params"], metric, mode)
        for trial in result["trials"]
        if trial["status"] in USABLE
    ]
    usable = [candidate for candidate in found if candidate is not None]
    if not usable:
        raise RunFailed(f"{directory} has no usable trial among its {len(result['trials'])}")
    best = (result.get("best") or {}).get("trial")
    sign = 1 if mode == "min" else -1
    return sorted(usable, key=lambda one: (one.trial != best, sign * one.score, one.trial))


def _candidate(
    run_dir: Path, trial: str | None, params: Mapping[str, Any], metric: str, mode: str
) -> Candidate | None:
    """The best evaluation of a run that has a checkpoint; None where there is none.

    A trial that was stopped from outside has no result.json; its manifests have the evaluations.
    """
    result = run_dir / RESULT
    point = read_json(result).get("best") if result.is_file() else None
    if point and point.get("checkpoint") and point.get(metric) is not None:
        path = run_dir / CHECKPOINTS / Path(point["checkpoint"]).name
        return Candidate(run_dir, trial, params, path, point[metric])
    scores = [
        (manifest.metrics.get(metric), path)
        for path, manifest in CheckpointStore(run_dir / CHECKPOINTS).list()
    ]
    measured = [(score, path) for score, path in scores if score is not None]
    if not measured:
        return None
    # The first of equal ones, as in the run itself.
    score, path = (min if mode == "min" else max)(measured, key=lambda pair: pair[0])
    return Candidate(run_dir, trial, params, path, score)
