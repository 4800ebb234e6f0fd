"""From a checked Config to a resolved one: the one place where values are derived from places and
machines. Defaults that depend on the objective are written as the file is read."""

from __future__ import annotations

from pathlib import Path

from raytune_ft.config import deepspeed_json, environment, metrics, paths, rewards
from raytune_ft.config.data import CHAT_TEMPLATES, NamedSource, listed
from raytune_ft.config.execution import choose_execution
from raytune_ft.config.load import choose_strategy, to_plain, validated
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config
from raytune_ft.config.search_space import trial_count


def resolve(
    config: Config,
    cwd: Path | None = None,
    disposable_cwd: bool | None = None,
    shortage: str | None = None,
) -> Config:
    """A copy in which paths are absolute and `auto` values that need no model are concrete.

    `disposable_cwd`: the current directory does not outlive the run or is not the same on every
    node, so that a relative storage goes under RAYTUNE_FT_STORAGE; None asks whether this is a
    Ray job. `shortage`: see `choose_strategy`. Raises StorageError where that variable is not set.
    """
    here = Path.cwd() if cwd is None else cwd
    disposable = environment.in_ray_job() if disposable_cwd is None else disposable_cwd
    data = to_plain(config)
    data["storage"] = paths.storage(config.storage, here, disposable)
    data["model"]["path"] = paths.model(config.model.path, here)
    for name in ("train", "validation", "test"):
        plain = data["data"][name]
        for number, source in enumerate(listed(getattr(config.data, name))):
            if isinstance(source, NamedSource):
                key = f"data.{name}.{source.called}.path"
                found = {"path": paths.sources(source.path, here, key), "name": source.called}
                plain[number] |= found
                item = plain[number]
            else:
                item = plain
                plain["path"] = paths.sources(source.path, here, f"data.{name}.path")
            if source.chat_template not in (None, *CHAT_TEMPLATES):
                key = f"data.{name}.chat_template"
                item["chat_template"] = paths.absolute(source.chat_template, here, key)
    if data["promote"]["retention"] is not None:
        retained = data["promote"]["retention"]
        retained["path"] = paths.sources(retained["path"], here, "promote.retention.path")
    if config.promote.base is not None:
        data["promote"]["base"] = paths.model(config.promote.base, here)
    if OBJECTIVES[config.train.objective].chunked and config.data.chunk is None:
        data["data"]["chunk"] = {"overlap": 0}
    if config.train.kd is not None:
        data["train"]["kd"]["teacher"] = paths.model(config.train.kd.teacher, here)
    if config.train.dpo.reference is not None:
        data["train"]["dpo"]["reference"] = paths.model(config.train.dpo.reference, here)
    data["promote"]["metrics"] = [metrics.located(name, here) for name in config.promote.metrics]
    for written, reward in zip(data["rewards"], config.rewards, strict=True):
        written["name"] = rewards.located(reward.name, here)
        if isinstance(reward, rewards.RewardModel):
            key = f"rewards.{reward.called}.path"
            written["path"] = paths.source(reward.path, here, key)
        if isinstance(reward, rewards.Judge) and reward.answers is not None:
            written["answers"] = paths.absolute(reward.answers, here, "rewards.judge.answers")
    data["parallel"]["strategy"] = choose_strategy(config, shortage)[0]
    if config.parallel.deepspeed is not None:
        file = paths.absolute(config.parallel.deepspeed, here, deepspeed_json.KEY)
        deepspeed_json.check(config, environment.expand_text(file, deepspeed_json.KEY))
        data["parallel"]["deepspeed"] = file
    if config.search is not None:
        data["search"]["execution"] = choose_execution(config)[0]
        data["search"]["trials"] = trial_count(config.search)
        data["search"]["warm_start"] = paths.folders(config.search.warm_start, here)
        modes = config.search.modes
        data["search"]["mode"] = modes[0] if isinstance(config.search.metric, str) else modes
        data["search"]["storage"] = paths.study(config.search.storage, here)
    return validated(data)
