"""A process on every node of a cluster, to ask what is there; and what a stranger may do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import grpc
import ray
from ray import cloudpickle
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raytune_ft.errors import Unreachable
from raytune_ft.format import seconds
from raytune_ft.ray_backend.placement import Node, alive_nodes

START_S = 90.0
STRANGER_S = 10.0
THREADS = 4
"""A call that hangs must not keep later ones from their process."""


class NodeProcesses:
    """One process on every node that is alive in the joined cluster.

    Attributes:
        nodes: those whose process has started, by name; the node of this process comes first.
        lost: the others, with the reason.
    """

    def __init__(self, functions: ModuleType, gpus: int = 0) -> None:
        """Functions of the module `functions` may be asked; they are sent by value, so that nodes
        need not have them. A process reserves no CPU, and `gpus` GPUs.
        """
        cloudpickle.register_pickle_by_value(functions)
        own = ray.get_runtime_context().get_node_id()
        nodes = sorted(alive_nodes(), key=lambda node: (node.id != own, node.name))
        self._actors = {node.name: _start(node, gpus) for node in nodes}
        answers = self.ask(functions.now, (), START_S)
        self.lost = {name: error for name, error in answers.items() if isinstance(error, Exception)}
        self.nodes: dict[str, Node] = {n.name: n for n in nodes if n.name not in self.lost}
        for name in self.lost:
            ray.kill(self._actors.pop(name))

    def ask(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any] | Mapping[str, Sequence[Any]],
        limit_s: float,
    ) -> dict[str, Any]:
        """What each node answers, and an exception for a node that does not.

        `arguments` are the same for all nodes, or those of each node that is asked.
        """
        if not isinstance(arguments, Mapping):
            arguments = dict.fromkeys(self._actors, arguments)
        asked = {
            name: self._actors[name].call.remote(function, *own) for name, own in arguments.items()
        }
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=limit_s)
        return {name: _answer(reference, limit_s) for name, reference in asked.items()}

    def gcs_addresses(self) -> list[str]:
        """Of the one cluster."""
        return [ray.get_runtime_context().gcs_address]

    def end(self) -> None:
        """End all processes."""
        for actor in self._actors.values():
            ray.kill(actor)


def _start(node: Node, gpus: int) -> Any:
    class Process:  # a local class is sent by value
        def __init__(self) -> None:
            self.kept: dict[str, Any] = {}

        def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
            return function(self.kept, *arguments)

    remote: Any = ray.remote(num_cpus=0, num_gpus=gpus, max_concurrency=THREADS)(Process)
    return remote.options(label_selector={"ray.io/node-id": node.id}).remote()


def _answer(reference: Any, limit_s: float) -> Any:
    try:
        return ray.get(reference, timeout=0)
    except GetTimeoutError:
        return TimeoutError(f"no answer within {seconds(limit_s)}")
    except RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except RayError as error:
        return error


def is_open(gcs_address: str) -> bool:
    """Whether a cluster answers a stranger who has no token.

    Raises:
        Unreachable: it does not answer at all.
    """
    with grpc.insecure_channel(gcs_address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=STRANGER_S)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return False
            raise Unreachable(
                f"the cluster at {gcs_address}",
                f"does not answer ({error.code().name})",
                "start it",
            ) from None
    return True
