"""`parallel.strategy: auto` where memory decides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from raytune_ft.config.load import apply_overrides, choose_strategy, load_config, memory_decides
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.estimate.hardware import PROCESS, Hardware
from raytune_ft.estimate.memory import MemoryModel, beside_of, held_by, shortage
from raytune_ft.estimate.parameters import build_shell
from raytune_ft.format import GIB
from raytune_ft.model.hub import teacher_model
from raytune_ft.model.load import build_frozen
from raytune_ft.preflight import placed

pytestmark = pytest.mark.usefixtures("traced_once")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    return load_config(ROOT / "jobs" / "quickstart.yaml", ["parallel.workers=2"])


def test_a_base_that_fits_is_copied_and_one_that_does_not_is_sharded(config: Config) -> None:
    assert shortage(config, None) is None
    assert shortage(config, GIB) is None
    reason = shortage(config, 2**20)
    assert reason is not None
    assert reason.startswith("a whole copy needs ")
    assert resolve(config).parallel.strategy == "ddp"
    small = resolve(config, shortage=reason)
    assert small.parallel.strategy == "fsdp"
    assert choose_strategy(config, reason) == (
        "fsdp",
        f"the base is frozen, and {reason}: 2 workers shard it",
    )
    assert choose_strategy(small)[0] == "fsdp"  # as every worker asks again


def test_where_sharding_does_not_help_the_base_is_copied(config: Config) -> None:
    # Room for the model of 4 MB and not for its activations, of which sharding takes nothing away.
    assert shortage(apply_overrides(config, {"data.max_length": 1024}), 6 * 2**20) is None


def test_a_teacher_takes_room_unless_its_logits_are_on_disk(config: Config) -> None:
    taught = apply_overrides(
        config, {"train.objective": "kd", "train.kd": {"teacher": "builtin:tiny"}}
    )
    held = beside_of(taught).held
    built = build_frozen(teacher_model(taught), taught.train.precision)
    assert held == sum(p.nbytes for p in built.parameters())
    shell = build_shell(config.model, config.method, config.train.precision)
    copied = config.parallel.model_copy(update={"strategy": "ddp"})
    usable = held_by(shell, copied).resident + held // 2
    assert shortage(taught, usable) is not None
    assert shortage(apply_overrides(taught, {"train.kd.cache": "disk"}), usable) is None


def test_a_copy_fits_where_the_table_says_so(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process takes its own before it holds a model, here and there."""
    copied = GIB

    def estimate(_: MemoryModel, parallel: ParallelConfig, *__: object) -> SimpleNamespace:
        return SimpleNamespace(peak={"ddp": copied, "fsdp": copied // 2}[parallel.strategy])

    monkeypatch.setattr(MemoryModel, "estimate", estimate)
    for usable in (copied + PROCESS["cpu"], copied + PROCESS["cpu"] - 1):
        worker = Hardware("X", "cpu", 1, 2, usable, usable, 1, 1, 1, 1, "a test")
        assert (shortage(config, usable) is None) == worker.fits(copied)


def test_replicas_are_sharded_however_much_fits(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.estimate.memory.shortage", lambda *_: pytest.fail("asked"))
    copies = apply_overrides(config, {"parallel.replicas": 2})
    with placed(copies, usable=2**50) as (chosen, reason):
        assert chosen.parallel.strategy == "fsdp"
        assert "parallel.replicas" in reason


@pytest.mark.parametrize(
    "change",
    [
        {"parallel.workers": 1},
        {"method.name": "full"},
        {"parallel.strategy": "ddp"},
        {"parallel.offload": "all"},
    ],
)
def test_memory_decides_nothing_else(config: Config, change: dict[str, object]) -> None:
    assert memory_decides(config)
    assert not memory_decides(apply_overrides(config, change))
