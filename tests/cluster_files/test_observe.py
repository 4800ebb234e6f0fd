"""cluster/observe: rules and board ask for what is exported; each alert fires when it should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "cluster" / "observe"
PROMTOOL = shutil.which("promtool", path=f"{os.environ['PATH']}:{ROOT}/.venv-tools/usr/bin")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool; run `make test-cluster-files`"
)


def rules() -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((OBSERVE / "rules.yaml").read_text())["spec"]
    return spec


def board() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((OBSERVE / "grafana.json").read_text())
    return loaded


def expressions() -> list[str]:
    alerts = [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]
    asked = [target["expr"] for panel in board()["panels"] for target in panel["targets"]]
    return alerts + asked


def promtool(tmp_path: Path, *command: str, **files: Any) -> subprocess.CompletedProcess[str]:
    for name, value in files.items():
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(value))
    return subprocess.run(
        [str(PROMTOOL), *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_what_is_asked_for_is_exported() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    from raytune_ft.ray_backend import metrics as ours

    tuples = [value for value in vars(ours).values() if isinstance(value, tuple)]
    names = {name for name, *_ in tuples if name.startswith("raytune_ft_")}
    asked = set(re.findall(r"\bray_(\w+)", " ".join(expressions()))) - {"io_cluster"}
    assert asked <= names | METRICS_GAUGES.keys()
    assert {name for name in asked if name.startswith("raytune_ft_")} == names - {"raytune_ft_step"}


@needs_promtool
@pytest.mark.parametrize("planted", [[], ["sum by run (ray_raytune_ft_examples"]])
def test_every_expression_parses(tmp_path: Path, planted: list[str]) -> None:
    asked = [each.replace("$run", "a") for each in expressions() + planted]
    recorded = [{"record": f"expression_{n}", "expr": each} for n, each in enumerate(asked)]
    file = {"groups": [*rules()["groups"], {"name": "board", "rules": recorded}]}
    done = promtool(tmp_path, "check", "rules", "rules.yml", rules=file)
    assert (done.returncode == 0) == (planted == []), done.stderr


RUN = '{run="a"}'
NODES = '{ray_io_cluster="c", node_type="gpu"}'
CASES = {
    "RaytuneFtNoProgress": (f"ray_raytune_ft_examples{RUN}", "0+100x10 1000x60", "0+100x70"),
    "RaytuneFtLostNodes": (f"ray_cluster_failed_nodes{NODES}", "0x30 1x40", "0x70"),
    "RaytuneFtOldCheckpoint": (f"ray_raytune_ft_checkpoint_age_s{RUN}", "0+300x70", "300x70"),
    "RaytuneFtMirrorBehind": (f"ray_raytune_ft_mirror_lag_s{RUN}", "0+60x70", "10x70"),
}


@needs_promtool
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_for_its_fault_and_not_without(tmp_path: Path, alert: str) -> None:
    series, bad, good = CASES[alert]
    fired = promtool(
        tmp_path, "test", "rules", "bad.yml", rules=rules(), bad=_case(alert, series, bad)
    )
    silent = promtool(
        tmp_path, "test", "rules", "good.yml", rules=rules(), good=_case(alert, series, good)
    )
    ended = promtool(
        tmp_path,
        "test",
        "rules",
        "gone.yml",
        rules=rules(),
        gone=_case(alert, series, f"{good} stale"),
    )
    # promtool is asked to expect no alert, so that it fails where one fires.
    assert fired.returncode != 0
    assert f'alertname="{alert}"' in fired.stdout + fired.stderr
    assert silent.returncode == 0, silent.stdout + silent.stderr
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _case(alert: str, series: str, values: str) -> dict[str, Any]:
    return {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": values}],
                "alert_rule_test": [{"eval_time": "69m", "alertname": alert, "exp_alerts": []}],
            }
        ],
    }


def test_the_board_is_one_that_grafana_takes() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert {"datasource", "run"} == {each["name"] for each in board()["templating"]["list"]}
