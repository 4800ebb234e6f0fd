"""Two ranks train bases whose losses depend on the rows of a batch as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_distributed
from tests.support.models import save_tiny, true_float64
from tests.support.runs import largest_difference, make_config, run, write_rows

pytestmark = pytest.mark.distributed
STRATEGIES = ("ddp", "fsdp")
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
}
CHANGES = {
    "train.precision": "float64",
    "train.batch_size": 5,
    "train.max_examples": 5 * 3 + 1,  # in the last step a rank has no example
    "train.eval_every_examples": 10,
    "train.adam_epsilon": 1e-6,
    "method": {"name": "full"},
}


def _train(inputs: tuple[Path, Path], root: Path, strategies: tuple[str, ...]) -> None:
    for strategy in strategies:
        with true_float64():
            run(make_config(*inputs, CHANGES), root / strategy, strategy)


@pytest.mark.parametrize("base", BASES)
def test_two_ranks_as_one_process(tmp_path: Path, base: str) -> None:
    family, changes = BASES[base]
    model = save_tiny(family, tmp_path / "base", **changes)
    inputs = model, write_rows(tmp_path / "rows.jsonl", 40)
    _train(inputs, tmp_path, ("single",))
    run_distributed(_train, 2, inputs, tmp_path, STRATEGIES)
    for strategy in STRATEGIES:
        assert max(largest_difference(tmp_path / strategy, tmp_path / "single")) < 1e-9, strategy
