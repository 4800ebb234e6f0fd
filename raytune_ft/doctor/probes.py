"""What the checks ask a node; each function runs in a process there.

They are sent by value and import the rest of the package only inside, so that a node without it, or
with another version of it, still answers. They return plain values. `kept` is what earlier probes
left in that process, such as a port on which it listens.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Kept = dict[str, Any]
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "optuna", "raytune-ft")
COMMAND_S = 60.0
CONNECT_S = 5.0
READ_S = 5.0
"""How long a file of another node may take to appear; NFS looks again after 3 s."""
HELD = "is held by another process"
GREETING = b"raytune-ft"
PAIR_BYTES = 2**20
REPEATS = 3
PAIR_REPEATS = 8
"""The best of them counts, since a busy processor delays a few."""
GROUP_S = 40.0


def now(kept: Kept) -> float:
    """The clock."""
    return time.time()


def versions(kept: Kept) -> dict[str, str]:
    """Of Python and the packages; of our own code also a hash, since a checkout has one version for
    many commits. Nothing is imported.
    """
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    found["code of raytune-ft"] = _hash_of_code("raytune_ft")
    torch = _folder("torch")
    written = runpy.run_path(str(torch / "version.py")) if torch else {}
    found["CUDA of torch"] = written.get("cuda") or "none"
    return found


def _folder(module: str) -> Path | None:
    found = find_spec(module)
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) if places else None


def _hash_of_code(module: str) -> str:
    folder = _folder(module)
    if folder is None:
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def gpus(kept: Kept, expected: bool) -> dict[str, Any]:
    """`listed`: name and driver of each GPU, as nvidia-smi says; None without that command.
    `usable`: how many torch can use, counted only where there are GPUs or Ray expects some.
    """
    listed = None
    if command := shutil.which("nvidia-smi"):
        query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = _run(query, os.environ)
        lines = done.stdout.splitlines() if done.returncode == 0 else []
        listed = [[part.strip() for part in line.split(",")] for line in lines]
    usable = None
    if listed or expected:
        # Ray hides GPUs from processes that reserve none.
        environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        count = "import torch; print(torch.cuda.is_available() and torch.cuda.device_count())"
        done = _run([sys.executable, "-c", count], environ)
        usable = int(done.stdout.replace("False", "0").split()[-1]) if done.stdout.split() else 0
    return {"listed": listed, "usable": usable}


def _run(words: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=dict(environ), capture_output=True, text=True, timeout=COMMAND_S, check=False
    )


def rays(kept: Kept) -> dict[str, Any]:
    """Ray nodes that run on this host, by the address of their cluster, with the CPUs and GPUs that
    they offer together; and what the host has. Containers with a network of their own are hosts.
    """
    import psutil

    own = os.readlink("/proc/self/ns/net")
    clusters: dict[str, dict[str, float]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.name() == "raylet" and os.readlink(f"/proc/{process.pid}/ns/net") == own:
                words = " ".join(process.cmdline())
                address = re.findall(r"--gcs-address=(\S+)", words)
                offered = dict(re.findall(r"\b(CPU|GPU),([\d.]+)", words))
                cluster = clusters.setdefault(next(iter(address), "?"), {"CPU": 0.0, "GPU": 0.0})
                for name, amount in offered.items():
                    cluster[name] += float(amount)
    has = {"CPU": float(os.cpu_count() or 1), "GPU": float(len(glob.glob("/dev/nvidia[0-9]*")))}
    return {"clusters": clusters, "has": has}


def disk(kept: Kept, storage: str | None) -> dict[str, tuple[str, int]]:
    """Path and free bytes of each place that a run writes to."""
    places = {"temporary files": tempfile.gettempdir(), "models of the hub": _hub_cache()}
    if storage is not None:
        places["storage"] = storage
    return {
        name: (path, shutil.disk_usage(existing(Path(path))).free) for name, path in places.items()
    }


def _hub_cache() -> str:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return os.environ.get("HF_HOME", str(Path.home()))
    return str(HF_HUB_CACHE)


def existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def shared_memory(kept: Kept) -> int | None:
    """Bytes of /dev/shm; None where there is none."""
    try:
        return shutil.disk_usage("/dev/shm").total  # nosec B108 # no file is made there
    except OSError:
        return None


def write(kept: Kept, folder: str, name: str, text: str) -> None:
    """A file, on the disk when this returns."""
    with open(Path(folder, name), "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def unreadable(kept: Kept, folder: str, text: str, names: Sequence[str]) -> list[str]:
    """Those of the files that do not hold `text` here."""
    deadline, missing = time.monotonic() + READ_S, list(names)
    while True:
        missing = [name for name in missing if not _holds(Path(folder, name), text)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def hold_lock(kept: Kept, path: str) -> None:
    """Until this process ends or `kept` is closed. Raises StorageError."""
    from raytune_ft.locks import locked

    kept["lock"] = stack = ExitStack()
    stack.enter_context(locked(Path(path), HELD, ""))


def takes_lock(kept: Kept, path: str) -> bool:
    """Whether this process gets the lock that another one holds.

    Raises:
        StorageError: the file system has no locks.
    """
    from raytune_ft.errors import StorageError
    from raytune_ft.locks import locked

    try:
        with locked(Path(path), HELD, ""):
            return True
    except StorageError as error:
        if error.rule == HELD:
            return False
        raise


def listen(kept: Kept, address: str) -> int:
    """Greet whoever connects, for as long as this process lives; returns the port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = kept["server"] = socket.create_server((address, 0), family=family, backlog=512)

    def greet() -> None:
        with suppress(OSError):
            while True:
                with server.accept()[0] as peer, suppress(OSError):
                    peer.sendall(GREETING)

    threading.Thread(target=greet, daemon=True).start()
    return int(server.getsockname()[1])


def unconnected(kept: Kept, peers: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """Those of the peers that cannot be connected to, with the reason."""
    with ThreadPoolExecutor(max_workers=min(64, len(peers))) as pool:
        reasons = pool.map(_why_unconnected, peers.values())
    return {name: why for name, why in zip(peers, reasons, strict=True) if why}


def _why_unconnected(place: tuple[str, int]) -> str | None:
    try:
        with socket.create_connection(place, timeout=CONNECT_S) as peer:
            return None if peer.recv(len(GREETING)) == GREETING else "something else answers"
    except OSError as error:
        return error.strerror or str(error)


def token_mode(kept: Kept) -> int | None:
    """Permission bits of the file of Ray's token; None without one."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        return None


def meet(kept: Kept, address: str) -> int:
    """Open the port at which the ranks of `all_reduce` meet, in the process of rank 0."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kept["meeting"] = socket.create_server((address, 0), family=family)
    return int(kept["meeting"].getsockname()[1])


def load_torch(kept: Kept) -> None:
    """Beforehand, so that no rank waits for another one that still imports it."""
    import torch.distributed  # noqa: F401


def all_reduce(
    kept: Kept, rank: int, size: int, place: tuple[str, int], backend: str
) -> dict[str, Any]:
    """`bytes` of a message and the least `seconds` that an all-reduce of it took on all ranks;
    `pairs`: GB/s to and from each other rank, measured while at most one other rank sends to it.
    """
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=GROUP_S)
    meeting = kept.pop("meeting", None)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *place,
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=meeting.detach() if meeting else None,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    device = "cuda" if backend == "nccl" else "cpu"

    def timed(act: Callable[[], object], together: bool) -> float:
        if together:
            dist.barrier()
        started = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def slowest(seconds: float) -> float:
        value = torch.tensor([seconds], dtype=torch.float64, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    def reduced(tensor: torch.Tensor) -> float:
        return slowest(timed(lambda: dist.all_reduce(tensor), together=True))

    try:
        small = torch.zeros(PAIR_BYTES // 4, device=device)
        dist.all_reduce(small)  # connects
        took = min(reduced(small) for _ in range(REPEATS))
        message = torch.zeros(_message_bytes(took) // 4, device=device)
        seconds = min(reduced(message) for _ in range(REPEATS))
        pairs = {}
        for peer in _peers(rank, size):
            act = _exchange(small, rank, peer)
            act()
            took = min(timed(act, together=False) for _ in range(PAIR_REPEATS))
            pairs[peer] = 2 * PAIR_BYTES / 1e9 / took
        dist.barrier()  # rank 0 has the store
        return {"bytes": message.nbytes, "seconds": seconds, "pairs": pairs}
    finally:
        dist.destroy_process_group()


def _message_bytes(seconds: float) -> int:
    """64 MiB, or less where a MiB took so long that this would last for more than a second."""
    return 2**20 * max(1, min(64, int(1 / seconds)))


def _exchange(tensor: Any, rank: int, peer: int) -> Callable[[], object]:
    import torch.distributed as dist

    both = (dist.send, dist.recv) if rank < peer else (dist.recv, dist.send)
    return lambda: [each(tensor, peer) for each in both]


def _peers(rank: int, size: int) -> Iterator[int]:
    """The other ranks in the order of a round-robin tournament, in which each meets one at a
    time.
    """
    even = size + size % 2
    ring = list(range(1, even))
    for _ in range(even - 1):
        seats = [0, *ring]
        peer = seats[even - 1 - seats.index(rank)]
        if peer < size:
            yield peer
        ring = [ring[-1], *ring[:-1]]
