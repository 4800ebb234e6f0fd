"""What is found out and checked before a run starts and before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from raytune_ft.config.environment import in_ray_job, joins_cluster
from raytune_ft.config.load import choose_strategy, expand_env, memory_decides, with_resources
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.records import Tell
from raytune_ft.rundir import cache_path

if TYPE_CHECKING:
    from raytune_ft.data.prepare import PreparedData


@contextmanager
def placed(
    written: Config, usable: int | None = None, tell: Tell = lambda line: None
) -> Iterator[tuple[Config, str]]:
    """The resolved config, and the reason for its strategy. Tells first where workers compute.

    Where there is a cluster, this process joins it for as long as the context lasts: the
    cluster decides whether workers have GPUs, whether there are several nodes and how much memory
    a worker has. `usable` (bytes) replaces the measured memory of a worker.
    """
    with ExitStack() as stack:
        several = False
        joined = joins_cluster()
        if joined:
            from raytune_ft.ray_backend.capacity import autoscaler_runs
            from raytune_ft.ray_backend.cluster import connected, node_count

            stack.enter_context(connected())
            several = node_count() > 1 or autoscaler_runs()
        written, devices = on_devices(written, joined)
        tell(devices)
        shortage = _shortage(written, joined, usable)
        config = resolve(written, disposable_cwd=several or in_ray_job(), shortage=shortage)
        yield config, choose_strategy(written, shortage)[1]


def on_devices(written: Config, joined: bool) -> tuple[Config, str]:
    """The config with concrete `resources_per_worker`, and a line that says where workers compute.

    `joined`: this process is part of a cluster, whose nodes count, and not this machine.
    """
    asked = written.parallel.resources_per_worker
    if isinstance(asked, dict) and "GPU" in asked:
        why, gpu = f"parallel.resources_per_worker.GPU={asked['GPU']:g}", False
    elif written.parallel.accelerator is not None:
        why, gpu = f"parallel.accelerator={written.parallel.accelerator}", True
    else:
        found = _gpus(written, joined)
        where = "the nodes that suit have" if joined else "this machine has"
        why, gpu = f"{where} {found or 'none'}", found > 0
    config = with_resources(written, gpu)
    gpus = config.parallel.resources["GPU"]
    if not gpus:
        return config, f"workers compute on CPUs: {why}"
    return config, f"each worker computes on {'a' if gpus == 1 else f'{gpus:g} of a'} GPU: {why}"


def _gpus(written: Config, joined: bool) -> int:
    if joined:
        from raytune_ft.ray_backend.cluster import gpu_count

        return gpu_count(written.parallel)
    from raytune_ft.estimate.hardware import visible_gpus

    return visible_gpus()


def _shortage(written: Config, joined: bool, usable: int | None) -> str | None:
    """Why a whole copy of the model does not fit on a worker; None where it fits, or where the
    strategy does not depend on that.
    """
    if not memory_decides(written) or written.parallel.replicas > 1:
        return None
    from raytune_ft.estimate.hardware import worker_memory
    from raytune_ft.estimate.memory import shortage

    parallel = written.parallel
    if usable is None and joined:
        from raytune_ft.ray_backend.cluster import cluster_worker_memory

        usable = cluster_worker_memory(parallel)
    elif usable is None:
        usable = worker_memory(parallel.max_workers, parallel.resources["GPU"])
    return shortage(expand_env(written), usable)


def needs_ray(config: Config) -> bool:
    """Whether Ray starts the processes that train: on a cluster, for a search, for workers."""
    several = not STRATEGIES[choose_strategy(config)[0]].one_process
    return joins_cluster() or config.search is not None or several


def prepare(config: Config, tell: Tell) -> PreparedData:
    """Check model and method, then tokenise; `config` is resolved and expanded.

    Raises ModelError, DataError and ConfigError before anything is spent on a cluster.
    """
    from raytune_ft.data.order import pass_length
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.data.report import check_overlap
    from raytune_ft.evaluate.metrics import check_functions
    from raytune_ft.model.hub import at_path
    from raytune_ft.model.load import (
        check_backend,
        check_files,
        check_pinned,
        load_model_config,
        load_tokenizer,
    )
    from raytune_ft.model.meta import build_shapes
    from raytune_ft.train.distill import check_others
    from raytune_ft.train.setup import (
        check_lengths,
        check_objective,
        check_pairs,
        check_vocabulary,
        head_before,
        head_of,
    )
    from raytune_ft.train.trackers import check_trackers

    if config.promote.base is not None:
        check_pinned(at_path(config.model, config.promote.base), "promote.base")
    check_files(config.model)
    load_model_config(config.model, head_before(config))
    check_backend(config.method)
    check_others(config)
    check_functions(config.promote.metrics)
    check_trackers(config.tracking)
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer, config.seed, cache_path(config), tell)
    check_overlap(config.data, data.report, config.promote.max_overlap)
    pass_length(config.data, data.train)
    shapes = build_shapes(config.model, head=head_of(config, data.report))
    check_lengths(config, shapes, data)
    check_vocabulary(config, shapes, data, tokenizer)
    check_objective(config, data)
    check_pairs(config, data)
    return data
