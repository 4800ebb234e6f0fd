"""`metrics.jsonl` holds whole lines and nothing that the checkpoint does not know."""

from __future__ import annotations

import json
from pathlib import Path

from raytune_ft.records import EvalMetrics, StepMetrics
from raytune_ft.train.report import MetricsFile, lines_up_to


def _step(step: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(step, step * 4, 40, 20, loss, 1e-3, 0.5, 100.0, 0.1)


def _write(path: Path, steps: range, resume_step: int | None) -> None:
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.step(_step(step))
        if step % 2 == 0:
            file.evaluation(EvalMetrics(step, step * 4, {"eval_loss": 0.5}), None)
    file.close()


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 6), None)
    assert _steps(path) == [1, 2, 2, 3, 4, 4, 5]
    _write(path, range(3, 7), resume_step=2)
    assert _steps(path) == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_the_half_line_of_a_killed_writer_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4), None)
    with path.open("a") as file:
        file.write('{"step": 4, "los')
    _write(path, range(4, 5), resume_step=3)
    assert _steps(path) == [1, 2, 2, 3, 4, 4]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 3), None)
    _write(path, range(1, 2), None)
    assert _steps(path) == [1]


def test_nan_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    file.step(_step(1, float("nan")))
    file.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_lines_with_odd_characters_stay_whole(tmp_path: Path) -> None:
    """Line separators of Unicode within a text, and half a character."""
    path = tmp_path / "rollouts.jsonl"
    rows = [{"step": step, "completion": "a\u2028b\x85c\udc80"} for step in (1, 2, 3)]
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert [json.loads(line) for line in lines_up_to(path, 2)] == rows[:2]
