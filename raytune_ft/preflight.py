"""What is found out and checked before a run starts and before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from raytune_ft.config.environment import in_ray_job, joins_cluster
from raytune_ft.config.execution import choose_execution
from raytune_ft.config.load import choose_strategy, expand_env, memory_decides, with_resources
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.errors import ClusterError, ConfigError
from raytune_ft.model.quantise import check_backend, skip_unused_bitsandbytes
from raytune_ft.records import Tell
from raytune_ft.rundir import Layout, cache_path

if TYPE_CHECKING:
    from raytune_ft.data.prepared import PreparedData
    from raytune_ft.data.processes import Workers
    from raytune_ft.estimate.hardware import Hardware
    from raytune_ft.estimate.parameters import Shell, Shells


@contextmanager
def placed(
    written: Config, usable: int | None = None, tell: Tell = lambda line: None
) -> Iterator[tuple[Config, str]]:
    """The resolved config, and the reason for its strategy. Tells first where workers compute.

    Where there is a cluster, this process joins it for as long as the context lasts: the
    cluster decides whether workers have GPUs, whether there are several nodes and how much memory
    a worker has. `usable` (bytes) replaces the measured memory of a worker.
    """
    skip_unused_bitsandbytes(written)
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
        shortage = _shortage(written, usable)
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


def _shortage(written: Config, usable: int | None) -> str | None:
    """Why a whole copy of the model does not fit on a worker; None where it fits, or where the
    strategy does not depend on that.
    """
    if not memory_decides(written) or written.parallel.replicas > 1:
        return None
    from raytune_ft.estimate.memory import shortage

    return shortage(expand_env(written), usable_memory(written) if usable is None else usable)


def usable_memory(config: Config) -> int | None:
    """Bytes of a worker on the joined cluster, or on this machine; None where unknown."""
    parallel = config.parallel
    if joins_cluster():
        from raytune_ft.ray_backend.cluster import cluster_worker_memory

        return cluster_worker_memory(parallel)
    from raytune_ft.estimate.hardware import worker_memory

    return worker_memory(parallel.max_workers, parallel.resources["GPU"])


def worker_of(config: Config) -> tuple[int | None, Hardware | None]:
    """Usable bytes of a worker, and its accelerator as the table has it; None where unknown, as on
    nodes that an autoscaler has yet to add.
    """
    from raytune_ft.estimate.hardware import accelerator_here, named

    parallel, precision = config.parallel, config.train.precision
    try:
        usable = usable_memory(config)
        if parallel.device == "cpu":
            return usable, None
        if not joins_cluster():
            found = accelerator_here(parallel.max_workers, precision)
        else:
            from raytune_ft.ray_backend.cluster import cluster_room

            room = cluster_room(parallel)
            name = room.accelerator
            found = None if name is None else named(name, room.nodes, room.per_node, precision)
            found = found and replace(found, host=room.host)
    except ClusterError:  # of a node that is missing: the start says so where it stays missing
        return None, None
    return usable, None if found is None else found.shared(parallel.resources["GPU"])


def lay_out(
    config: Config,
    data: PreparedData,
    usable: int | None,
    hardware: Hardware | None,
    tell: Tell,
    shells: Shells | None = None,
) -> dict[str, Layout]:
    """The layout of a run by the name of its method, of a sweep for each method of its space.

    `config` is resolved and expanded; `usable` (bytes) and `hardware` are a worker's; `shells` has
    those that are known already. A sweep decides here, once, and not in each trial: trials of a
    method differ little, the driver of a trial loads no torch, and all trials of an engine share
    its passes. The trial with the most trained weights decides.

    Raises:
        ModelError: the model cannot take the method.
    """
    from raytune_ft.estimate.memory import misfit
    from raytune_ft.estimate.parameters import Shells
    from raytune_ft.estimate.passes import choose_passes, forecast_of, heaviest
    from raytune_ft.model.lengths import apart_of
    from raytune_ft.train.setup import head_of

    packed = config.search is not None and choose_execution(config)[0] == "packed"
    shells = shells or Shells(head_of(config, data.report))
    trained = [(each, shells.of(each)) for each in heaviest(config)]
    by_method: dict[str, tuple[Config, Shell]] = {}
    for each, shell in sorted(trained, key=lambda pair: pair[1].trained):
        by_method[each.method.name] = each, shell
    if packed:
        by_method = dict.fromkeys(by_method, max(by_method.values(), key=lambda p: p[1].trained))
    found: dict[str, Layout] = {}
    for name, (each, shell) in by_method.items():
        apart = apart_of(shell.module.config)
        passes = choose_passes(each, shell, data.train, usable, apart, packed)
        forecast = None
        if each.parallel.device == "cuda":
            forecast = forecast_of(each, shell, data.train, passes, hardware, packed)
        found[name] = Layout(passes.micro_tokens, passes.checkpointing, forecast)
        tell(f"{name}: {passes}" if len(by_method) > 1 else f"{passes}")
        reason = hardware and misfit(passes.memory, each.parallel, hardware)
        if passes.fits and reason:
            tell(f"{name}: {reason}")
    return found


def needs_ray(config: Config) -> bool:
    """Whether Ray starts the processes that train: on a cluster, for a search, for workers and for
    engines of vLLM.
    """
    several = not STRATEGIES[choose_strategy(config)[0]].one_process
    engines = config.train.rollout.on_vllm
    return joins_cluster() or config.search is not None or several or engines


def check_engines(config: Config) -> None:
    """Raises ConfigError where `train.rollout.engine: vllm` lacks GPUs or the package."""
    own, parallel = config.train.rollout, config.parallel
    if not own.on_vllm:
        return
    gpus, installed = _gpus(config, joins_cluster()), find_spec("vllm") is not None
    engines = own.vllm.engines * own.vllm.gpus
    needed = engines + int(parallel.min_workers * parallel.resources["GPU"])
    if gpus >= needed and installed:
        return
    asked = f"{needed} GPUs" if needed > 1 else "a GPU"
    asked += f", {engines} of them for engines," if needed > engines else ""
    if gpus < needed:
        found = f"and there are {gpus} GPUs" if gpus > 1 else "and there is one GPU"
        found = found if gpus else "which are not here"
    else:
        found = "which is not here"
    raise ConfigError(
        "train.rollout.engine=vllm",
        f"needs {asked} and the package vllm, {found}",
        "write train.rollout.engine: embedded",
    )


@contextmanager
def makers(config: Config) -> Iterator[Workers]:
    """What makes the parts of the tokens: tasks of the joined cluster, or else processes of this
    machine, which start now; `config` is resolved and expanded.
    """
    if joins_cluster():
        from raytune_ft.ray_backend.tokenise import in_tasks

        yield in_tasks
        return
    from raytune_ft.data.processes import started_ahead

    with started_ahead(config.data) as workers:
        yield workers


def prepare(config: Config, tell: Tell) -> PreparedData:
    """Check model and method, then tokenise; `config` is resolved and expanded.

    Raises ModelError, DataError and ConfigError before anything is spent on a cluster.
    """
    with makers(config) as workers:
        from raytune_ft.data.order import pass_length
        from raytune_ft.data.prepare import prepare_data
        from raytune_ft.data.prompts import prompted
        from raytune_ft.data.report import check_overlap
        from raytune_ft.evaluate.metrics import check_metrics
        from raytune_ft.model.critic import check_critic
        from raytune_ft.model.hub import at_path
        from raytune_ft.model.load import (
            check_files,
            check_pinned,
            load_model_config,
            load_tokenizer,
        )
        from raytune_ft.model.meta import build_shapes
        from raytune_ft.train.distill import check_others
        from raytune_ft.train.rollouts import with_rewards
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
        check_metrics(config)
        check_trackers(config.tracking)
        tokenizer = load_tokenizer(config.model)
        data = prepare_data(config.data, tokenizer, config.seed, cache_path(config), tell, workers)
    check_overlap(config.data, data.report, config.promote.max_overlap)
    data = prompted(config, data, tokenizer)
    data = with_rewards(config, data)
    pass_length(config.data, data.train)
    shapes = build_shapes(config.model, head=head_of(config, data.report))
    check_lengths(config, shapes, data)
    check_vocabulary(config, shapes, data, tokenizer)
    if OBJECTIVES[config.train.objective].critic:
        check_critic(shapes)
    check_objective(config, data)
    check_pairs(config, data)
    return data
