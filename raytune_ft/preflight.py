"""What a run is given, checked and tokenised before anything is spent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytune_ft.config.schema import Config
from raytune_ft.records import Tell
from raytune_ft.rundir import cache_path

if TYPE_CHECKING:
    from raytune_ft.data.prepare import PreparedData


def prepare(config: Config, tell: Tell) -> PreparedData:
    """Check model and method, then tokenise; `config` is resolved and expanded.

    Raises ModelError, DataError and ConfigError before anything is spent on a cluster.
    """
    from raytune_ft.data.order import pass_length
    from raytune_ft.data.prepare import prepare_data
    from raytune_ft.data.report import check_overlap
    from raytune_ft.evaluate.metrics import check_functions
    from raytune_ft.model.load import check_backend, load_model_config, load_tokenizer
    from raytune_ft.train.distill import check_teacher
    from raytune_ft.train.setup import check_lengths, check_objective, head_before
    from raytune_ft.train.trackers import check_trackers

    load_model_config(config.model, head_before(config))
    check_backend(config.method)
    check_teacher(config)
    check_functions(config.promote.metrics)
    check_trackers(config.tracking)
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer, config.seed, cache_path(config), tell)
    check_overlap(config.data, data.report, config.promote.max_overlap)
    pass_length(config.data, data.train)
    check_lengths(config, data)
    check_objective(config, data)
    return data
