"""What a config needs of the Hugging Face hub, downloaded ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from raytune_ft.config.data import source_configs
from raytune_ft.config.environment import joins_cluster
from raytune_ft.config.load import expand_env, load_config
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.model.hub import Download, Fetched, commit_of, fetch, named_models
from raytune_ft.records import Tell

HERE = "this machine"


def fetch_all(
    file: Path, overrides: Sequence[str], address: str | None, tell: Tell
) -> list[Download]:
    """Download models to every node of a cluster that may hold workers, or else to this machine,
    and data sets, which the driver alone reads, to this machine.

    The cluster is that of `address`, of RAY_ADDRESS or of the Ray job.

    Raises:
        ModelError, DataError: the hub does not provide one of them.
        StorageError: a disk is full.
        ClusterError: the cluster cannot be joined, or has no node for workers.
    """
    config = expand_env(resolve(load_config(file, overrides, tell)))
    joins = joins_cluster() if address is None else address != "local"
    with ExitStack() as stack:
        if joins:
            from raytune_ft.ray_backend.cluster import connected

            stack.enter_context(connected(address))
        return [*_models(config, joins, tell), *_data(config)]


def _models(config: Config, on_nodes: bool, tell: Tell) -> Iterator[Download]:
    for key, model in named_models(config).items():
        if not on_nodes:
            yield Download(key, HERE, fetch(model, commit_of(model), tell))
            continue
        from raytune_ft.ray_backend.fetch import fetch_on_nodes

        for node, found in fetch_on_nodes(model, config.parallel, tell):
            yield Download(key, node.name, found)


def _data(config: Config) -> Iterator[Download]:
    from raytune_ft.data.sources import fetch_source

    sources = {f"data.{name}": source for name, source in source_configs(config.data).items()}
    if config.promote.retention is not None:
        sources["promote.retention"] = config.promote.retention
    for key, source in sources.items():
        if (found := fetch_source(key, source)) is not None:
            folder, size, new = found
            yield Download(f"{key}.path={source.shown}", HERE, Fetched(folder, size, new))
