"""Run a function in several gloo processes on this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """`function(*arguments)` on `world_size` ranks of one process group; raises what they raise."""
    mp.spawn(_entry, (world_size, _free_port(), function, arguments), nprocs=world_size)


def _entry(
    rank: int, world_size: int, port: int, function: Callable[..., None], arguments: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
