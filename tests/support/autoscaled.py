"""A Ray cluster on this machine whose autoscaler starts and ends nodes as processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import FAKE_HEAD_NODE_ID, AutoscalingCluster

from tests.support.head import RAY, kill_tree
from tests.support.ports import free_port

EMPTY = ("initialization", "setup", "head_setup", "worker_setup")
NODE_TYPE = "worker"
FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


AGENTS = ("dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent")


class Autoscaled(AutoscalingCluster):
    """A head without CPUs and nodes of one CPU, up to `most` of them, that come on demand and go
    after `idle_s`.

    Ray's own class ends every other Ray on the machine, and reads a file that is not installed.
    """

    def __init__(self, most: int, idle_s: float = 6.0) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._folder = Path(tempfile.mkdtemp(prefix="rtft-", dir="/tmp"))
        nodes = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most}
        super().__init__(
            head_resources={"CPU": 0},
            worker_node_types={NODE_TYPE: nodes},
            autoscaler_v2=True,
            max_workers=most,
            idle_timeout_minutes=idle_s / 60,
        )

    def _generate_config(
        self, head_resources: Any, worker_node_types: Any, autoscaler_v2: bool = False, **more: Any
    ) -> dict[str, Any]:
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "autoscaled",
            "provider": {
                "type": "external",
                "module": FAKE_PROVIDER,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "launch_multiple": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "gcs_address": self.address,
            },
            "available_node_types": {"ray.head.default": head, **worker_node_types},
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "auth": {},
            "cluster_synced_files": [],
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{f"{name}_commands": [] for name in EMPTY},
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
            **more,
        }

    @property
    def environment(self) -> dict[str, str]:
        """For drivers."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "disabled",
            ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # all of it on loopback
        }

    def __enter__(self) -> Autoscaled:
        config = self._folder / "config.json"
        config.write_text(json.dumps(self._config))
        self._head = subprocess.Popen(
            [
                *(RAY, "start", "--head", "--block", "--num-cpus=0", "--disable-usage-stats"),
                *("--include-dashboard=false", "--node-ip-address=127.0.0.1"),
                # A head that has to find them gives up after 15 s on a busy machine.
                *(f"--{agent}-port={free_port()}" for agent in AGENTS),
                f"--port={self.address.split(':')[1]}",
                f"--autoscaling-config={config}",
                f"--temp-dir={self._folder}",
            ],
            env=os.environ
            | self.environment
            | {
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while True:
            assert self._head.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "ray start does not answer"
            try:
                self.nodes()
            except RuntimeError:
                time.sleep(0.5)
            else:
                return self

    def nodes(self) -> tuple[int, int]:
        """(nodes in use, nodes) without the head."""
        status = get_cluster_status(self.address)
        used, idle = (
            [node for node in nodes if node.ray_node_type_name == NODE_TYPE]
            for nodes in (status.active_nodes, status.idle_nodes)
        )
        return len(used), len(used) + len(idle)

    def __exit__(self, *_: object) -> None:
        kill_tree(self._head)
        shutil.rmtree(self._folder, ignore_errors=True)
