"""A model answers prompts, rewards score what it says; best against worst become preferences, and
the best answers examples to train on (rejection sampling, as in arXiv 2307.09288, sec. 3.2.3).

Each row of the file is a function of (settings, seed, prompt, sample number), so a run that was
interrupted goes on behind the last whole prompt and gives the file that it would have given.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from raytune_ft import __version__
from raytune_ft.config.identity import FREE_OF_REWARDS
from raytune_ft.config.rewards import RewardModel, function_of
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prompts import of_file, of_split
from raytune_ft.errors import ConfigError, StorageError
from raytune_ft.evaluate.context import runner_of
from raytune_ft.evaluate.evaluate import measured_split, tokenizer_of
from raytune_ft.evaluate.workers import whole
from raytune_ft.files import read_object, sha256_of, write_text_atomic
from raytune_ft.locks import locked
from raytune_ft.model.hub import reward_model
from raytune_ft.model.lengths import usable_positions
from raytune_ft.model.load import (
    base_file_hashes,
    check_files,
    load_model_config,
    resolve_model_path,
)
from raytune_ft.model.methods.hooks import virtual_tokens
from raytune_ft.model.methods.saved import unfoldable
from raytune_ft.model.sampling import Said, by_prompt, requests_of, sample, stop_tokens
from raytune_ft.records import Tell
from raytune_ft.rewards.base import Group
from raytune_ft.rewards.groups import group_of
from raytune_ft.rewards.pool import Rewards, check_columns, started

CHUNK_ROWS = 256
"""Completions that are drawn, scored and written together."""
TELL_EVERY_S = 5.0


@dataclass(frozen=True)
class Asked:
    """What `raytune-ft sample` was told beside the config.

    Attributes:
        model: what is sampled; its path is a directory, a hub id or `builtin:`.
        out: the file of samples; OUT.settings.json beside it says what they are of.
        pairs: the file of preferences, None for none.
        best: the file of best completions, None for none.
        prompts: a file of prompts; None takes those of the config's test or validation data.
        split: `test` or `validation`; None is test where there is one.
    """

    model: ModelConfig
    out: Path
    pairs: Path | None = None
    best: Path | None = None
    prompts: Path | None = None
    split: str | None = None


@dataclass
class Sampled:
    """What the files hold.

    Attributes:
        kept: samples that were there before.
        means: of each reward, over the completions that have a score; None where none has.
        missing: completions without a score, for each reward that has such.
        pairs: preferences that were written; None where none were asked for.
        ties: prompts whose best and worst completion have one score, or are the same.
        unscored: prompts with under two scores.
        best: best completions that were written; None where none were asked for. Blank ones cannot
            be learnt and are left out.
        best_mean: their mean score; None without one.
        best_cut: those without an end token.
        notes: sentences on scores that are missing, and on judges.
    """

    kept: int
    prompts: int = 0
    samples: int = 0
    ended: int = 0
    near_ties: int = 0
    means: dict[str, float | None] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    pairs: int | None = None
    ties: int = 0
    unscored: int = 0
    best: int | None = None
    best_mean: float | None = None
    best_cut: int = 0
    notes: tuple[str, ...] = ()


def run_sample(asked: Asked, config: Config, cache_dir: Path, tell: Tell) -> Sampled:
    """Sample, score and write; `config` is resolved and expanded.

    Raises:
        ConfigError, DataError, ModelError, StorageError: an input is wrong; nothing was started.
        RunFailed: a reward died repeatedly, or scored nothing.
    """
    _check_files(asked)
    pinned = unfoldable(Path(asked.model.path)) is None
    if pinned:
        check_files(asked.model)
        load_model_config(asked.model)
    tokenizer = tokenizer_of(asked.model, config.model)
    data = prepare_data(config.data, tokenizer, config.seed, cache_dir)
    ends = stop_tokens(tokenizer, asked.model if pinned else config.model, data.report)
    if asked.prompts is not None:
        prompts = of_file(asked.prompts, config.data, tokenizer)
        name = asked.prompts.name
    else:
        split = asked.split or measured_split(data)
        if split == "test" and data.test is None:
            raise ConfigError(
                "--split test", "has no rows", "write data.test, or --split validation"
            )
        prompts = of_split(config.data, data, split, tokenizer)
        name = f"data.{split}"
    with (
        locked(asked.out.with_name(f".{asked.out.name}.lock"), IN_USE, "write another --out"),
        started(config.rewards) as rewards,
    ):
        columns = dict.fromkeys(column for one in prompts for column in one.columns)
        check_columns(rewards, list(columns), name)
        kept = _resume(asked, config, prompts, tell)
        if kept < len(prompts):
            _fill(asked, config, prompts, kept, tokenizer, ends, rewards, tell)
        done = _finished(asked, config.sampling.n, rewards.names)
        done.kept = kept * config.sampling.n
        done.notes = tuple(rewards.notes())
        return done


IN_USE = "is being written by another process"


def _check_files(asked: Asked) -> None:
    """Raises StorageError for files that cannot be written."""
    written = {"--out": asked.out, "--pairs": asked.pairs, "--best": asked.best}
    named = {option: path for option, path in written.items() if path is not None}
    for option, path in named.items():
        if path.is_dir() or not path.parent.is_dir():
            rule = "is a directory" if path.is_dir() else "is in no directory that exists"
            raise StorageError(f"{option} {path}", rule, "write a file in an existing directory")
        if asked.prompts is not None and path.resolve() == asked.prompts.resolve():
            raise StorageError(f"{option} {path}", "is the file of --prompts", "write another file")
        other = next((one for one in named if named[one].resolve() == path.resolve()), option)
        if other != option:
            raise StorageError(f"{option} {path}", f"is {other} too", "write another file")


def settings_file(out: Path) -> Path:
    """What the samples of a file are of."""
    return out.with_name(f"{out.name}.settings.json")


def _settings(asked: Asked, config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that samples and scores depend on, without secrets."""
    listed = [[one.origin, one.ids, one.reference, one.columns] for one in prompts]
    text = json.dumps(listed, default=str, sort_keys=True)
    rewards = {}
    for reward in config.rewards:
        keys = reward.model_dump(exclude={*FREE_OF_REWARDS, "path"})  # its files count
        if found := function_of(reward.name):
            keys["file"] = sha256_of(Path(found[0]))
        if isinstance(reward, RewardModel):
            keys["files"] = _hashes(reward_model(reward))
        rewards[reward.called] = keys
    return {
        "raytune_ft": __version__,
        "model": _hashes(asked.model),
        "prompts": hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
        "seed": config.seed,
        "sampling": config.sampling.model_dump(),
        "rewards": rewards,
    }


def _hashes(model: ModelConfig) -> dict[str, str]:
    """Of the model's files; of a hub id its name and revision."""
    if not Path(resolve_model_path(model.path)).is_dir():
        return {model.path: model.revision or ""}
    return base_file_hashes(model)


def _resume(asked: Asked, config: Config, prompts: Sequence[Prompt], tell: Tell) -> int:
    """How many prompts are done; the file is cut behind the last of them.

    Raises:
        StorageError: the file was written from other settings, or by another program.
    """
    now, file = json.loads(json.dumps(_settings(asked, config, prompts))), settings_file(asked.out)
    if not asked.out.exists() or asked.out.stat().st_size == 0:
        write_text_atomic(file, json.dumps(now, indent=2) + "\n")
        asked.out.touch()
        return 0
    before = read_object(file) or {}
    differs = next((key for key in now if before.get(key) != now[key]), None)
    if differs is not None:
        raise StorageError(
            f"--out {asked.out}",
            f"holds samples of other settings ({differs} in {file.name})"
            if before
            else f"exists, and no {file.name} says what it holds",
            "write another --out, or remove it",
        )
    n, good, done, found = config.sampling.n, 0, 0, 0
    with asked.out.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:
                row = {}
            if (row.get("place"), row.get("sample")) != (found // n, found % n):
                break
            found += 1
            good += len(line)
            if found % n == 0:
                done = good
    with asked.out.open("r+b") as cut:
        cut.truncate(done)
    if found // n:
        tell(f"{asked.out}: the samples of {found // n} of {len(prompts)} prompts are kept")
    return found // n


def _fill(
    asked: Asked,
    config: Config,
    prompts: Sequence[Prompt],
    kept: int,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    rewards: Rewards,
    tell: Tell,
) -> None:
    """Append the samples of all prompts from number `kept` on."""
    settings = config.sampling
    runner = runner_of(asked.model, tokenizer, config.model, strategy=whole(config.parallel))
    _check_room(runner.model, prompts, settings.max_new_tokens)
    start, told, tokens = time.monotonic(), 0.0, 0
    step = max(1, CHUNK_ROWS // settings.n)
    with asked.out.open("a", encoding="utf-8", errors="surrogatepass") as file:
        for first in range(kept, len(prompts), step):
            numbers = range(first, min(first + step, len(prompts)))
            said = sample(
                runner.model,
                requests_of([(place, prompts[place]) for place in numbers], settings.n),
                settings.max_new_tokens,
                settings=settings,
                ends=ends,
                pad=runner.pad_token,
                seed=config.seed,
                apart=runner.apart,
            )
            tokens += sum(len(one.ids) for one in said)
            parts = by_prompt(said, settings.n)
            groups = [
                group_of(prompts[place], part, tokenizer)
                for place, part in zip(numbers, parts, strict=True)
            ]
            scores = rewards.score(groups)
            rewards.check_scored()
            for place, part, group, scored in zip(numbers, parts, groups, scores, strict=True):
                for row in _rows(place, prompts[place], part, group, scored, rewards):
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            file.flush()
            spent = time.monotonic() - start
            if spent - told >= TELL_EVERY_S or numbers[-1] + 1 == len(prompts):
                told = spent
                tell(
                    f"{numbers[-1] + 1:,} of {len(prompts):,} prompts, "
                    f"{tokens / max(spent, 1e-9):,.0f} tokens/s with scoring"
                )


def _check_room(model: Any, prompts: Sequence[Prompt], new: int) -> None:
    positions = usable_positions(model)
    longest = max(len(one.ids) for one in prompts) + virtual_tokens(model)
    if positions is not None and longest + new > positions:
        raise ConfigError(
            f"sampling.max_new_tokens={new}",
            f"after prompts of up to {longest} tokens exceeds the model's {positions} positions",
            f"write at most {positions - longest}"
            if longest < positions
            else "write shorter prompts",
        )


def _rows(
    place: int,
    prompt: Prompt,
    said: Sequence[Said],
    group: Group,
    scored: Sequence[dict[str, float | None]],
    rewards: Rewards,
) -> Iterator[dict[str, Any]]:
    for number, one in enumerate(said):
        yield {
            "prompt": prompt.written,
            "completion": group.completions[number],
            "score": rewards.total(scored[number]),
            "scores": scored[number],
            "ended": one.ended,
            "origin": prompt.origin,
            "place": place,
            "sample": number,
            "near_ties": one.near_ties,
            "completion_ids": one.ids,
        }


def _finished(asked: Asked, n: int, names: Sequence[str]) -> Sampled:
    """Read the samples again, count them, and write preferences and best completions."""
    done, values = Sampled(0), {name: [0, 0.0] for name in names}
    pairs, best = list[dict[str, Any]](), list[dict[str, Any]]()
    for rows in _by_prompt(asked.out, n):
        done.prompts += 1
        done.samples += len(rows)
        done.ended += sum(row["ended"] for row in rows)
        done.near_ties += sum(row["near_ties"] for row in rows)
        for row in rows:
            for name, score in row["scores"].items():
                if score is None:
                    done.missing[name] = done.missing.get(name, 0) + 1
                else:
                    values[name] = [values[name][0] + 1, values[name][1] + score]
        known = [row for row in rows if row["score"] is not None]
        pair = pair_of(known) if len(known) > 1 else None
        pairs += [pair] if pair is not None else []
        done.unscored += len(known) < 2
        done.ties += pair is None and len(known) > 1
        first = best_of(known) if known else None
        best += [first] if first is not None and first["completion"].strip() else []
    done.means = {name: total / count if count else None for name, (count, total) in values.items()}
    if asked.pairs is not None:
        _write(asked.pairs, pairs)
        done.pairs = len(pairs)
    if asked.best is not None:
        _write(asked.best, [example_of(row) for row in best])
        done.best, done.best_cut = len(best), sum(not row["ended"] for row in best)
        done.best_mean = sum(row["score"] for row in best) / len(best) if best else None
    return done


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _by_prompt(out: Path, n: int) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    with out.open(encoding="utf-8", errors="surrogatepass") as file:
        for line in file:
            rows.append(json.loads(line))
            if len(rows) == n:
                yield rows
                rows = []


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sample with the highest score, the first of equals."""
    return max(rows, key=lambda row: float(row["score"]))


def example_of(row: dict[str, Any]) -> dict[str, Any]:
    """A sample as a row of `format: prompt_completion`."""
    said = row["completion"]
    completion = _turn(said) if isinstance(row["prompt"], list) else said
    return {"prompt": row["prompt"], "completion": completion, "score": row["score"]}


def pair_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best completion of a prompt against the worst, the first of equals; None for a tie."""
    best, worst = best_of(rows), min(rows, key=lambda row: float(row["score"]))
    margin = best["score"] - worst["score"]
    if margin <= 0 or best["completion"] == worst["completion"]:
        return None
    chosen, rejected = best["completion"], worst["completion"]
    if isinstance(best["prompt"], list):
        chosen, rejected = _turn(chosen), _turn(rejected)
    return {
        "prompt": best["prompt"],
        "chosen": chosen,
        "rejected": rejected,
        "margin": margin,
    }


def _turn(said: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": said}]
