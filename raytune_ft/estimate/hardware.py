"""Hardware of workers: this machine, measured, or accelerators by name.

Figures of the table are from the vendors' data sheets: memory in GiB (for cards with GDDR6 as their
driver reports it, without the part that ECC takes), dense TFLOP/s of matrix products (float32
without TF32, as torch computes it), memory bandwidth in GB/s, and the link of one accelerator
inside a node in GB/s and one direction. `network` is the bandwidth of a node of the vendor's
reference design or of the clouds that offer it; for A10G, L4 and L40S of a node with 8 of them.
"""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from raytune_ft.errors import ClusterError, ConfigError
from raytune_ft.format import GIB

USABLE = 0.94
"""Share of an accelerator's memory; the rest goes to the contexts of driver and collectives and to
fragmentation."""
USABLE_RAM = 0.9
ACHIEVED = 0.4
"""Share of the peak rate: Llama 3 was trained at 38 to 43 % (arXiv 2407.21783, table 4)."""
BESIDE_PRODUCTS = 0.6
"""Share of the rate of a matrix product, since norms, activations and masks take time too."""
DRIVER_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
"""Files in /dev of the drivers of NVIDIA, of AMD, and of both under Windows."""
PROCESS = {"cpu": int(0.6 * GIB), "cuda": 0}
"""A worker's memory on its device before it holds a model: Python, torch, transformers."""
GPU_PROCESS = 2 * GIB
"""The host memory of a worker on a GPU, before it holds a model; the driver's libraries too."""


@dataclass(frozen=True)
class Accelerator:
    """One accelerator; units as in the module's docstring."""

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float
    network: float
    source: str


ACCELERATORS = {
    "A10G": Accelerator(22.5, 70, 31.5, 600, 32, 12.5, "NVIDIA A10 data sheet, AWS g5"),
    "A100-40G": Accelerator(40, 312, 19.5, 1555, 300, 50, "NVIDIA A100 data sheet, AWS p4d"),
    "A100-80G": Accelerator(80, 312, 19.5, 2039, 300, 200, "NVIDIA A100 data sheet, DGX A100"),
    "B200": Accelerator(180, 2250, 75, 8000, 900, 400, "NVIDIA DGX B200 data sheet"),
    "H100": Accelerator(80, 989, 67, 3350, 450, 400, "NVIDIA H100 SXM data sheet, DGX H100"),
    "H200": Accelerator(141, 989, 67, 4800, 450, 400, "NVIDIA H200 SXM data sheet, DGX H200"),
    "L4": Accelerator(22.5, 121, 30.3, 300, 32, 12.5, "NVIDIA L4 data sheet, GCP g2"),
    "L40S": Accelerator(45, 362, 91.6, 864, 32, 50, "NVIDIA L40S data sheet, AWS g6e"),
    "MI300X": Accelerator(192, 1307, 163.4, 5300, 448, 400, "AMD Instinct MI300X data sheet"),
}
# Ray's names in a node's resources, where they differ. Its A100 may have either size.
RAY_NAMES = {"A100": "A100-40G", "AMD-Instinct-MI300X-OAM": "MI300X"}


@dataclass(frozen=True)
class Hardware:
    """`memory` and `usable` are bytes of one worker, None if unknown. `tflops` is the rate that one
    worker achieves, `peak_tflops` that of an accelerator's data sheet. GB/s: `bandwidth` of memory,
    `link` of each worker inside a node, `network` of all workers of a node together. `host`: usable
    bytes of a node's host memory, where that is not the workers' own; None if unknown.
    """

    name: str
    device: str
    nodes: int
    per_node: int
    memory: int | None
    usable: int | None
    tflops: float
    bandwidth: float
    link: float
    network: float
    source: str
    peak_tflops: float | None = None
    host: int | None = None

    def fits(self, needed: int) -> bool:
        """Whether a worker has room for `needed` bytes; true if its memory is unknown."""
        return self.usable is None or needed + PROCESS[self.device] <= self.usable

    def shared(self, gpus: float) -> Hardware:
        """The hardware of workers that share an accelerator, as with `GPU: 0.5`."""
        return replace(
            self,
            memory=None if self.memory is None else int(self.memory * gpus),
            usable=None if self.usable is None else int(self.usable * gpus),
            tflops=self.tflops * gpus,
            bandwidth=self.bandwidth * gpus,
            peak_tflops=None if self.peak_tflops is None else self.peak_tflops * gpus,
        )


def named(name: str, nodes: int, per_node: int, precision: str) -> Hardware:
    """Nodes with an accelerator of the table.

    Raises:
        ConfigError: the table has no accelerator of that name.
    """
    key = next((k for k in ACCELERATORS if k.lower() == name.lower()), None)
    if key is None:
        near = [k for k in ACCELERATORS if k.lower().startswith(name.lower())]
        near = near or difflib.get_close_matches(name.upper(), ACCELERATORS) or list(ACCELERATORS)
        raise ConfigError(f"--accelerator={name}", "is unknown", f"write {' or '.join(near)}")
    one = ACCELERATORS[key]
    memory = int(one.memory * GIB)
    peak = one.bfloat16 if precision == "bfloat16" else one.float32
    return Hardware(
        name=key,
        device="cuda",
        nodes=nodes,
        per_node=per_node,
        memory=memory,
        usable=int(memory * USABLE),
        tflops=peak * ACHIEVED,
        bandwidth=one.bandwidth,
        link=one.link,
        network=one.network,
        source=f"{one.source}; {ACHIEVED:.0%} of its peak",
        peak_tflops=peak,
    )


def key_of(name: str) -> str | None:
    """The accelerator of the table that a driver or torch calls `name`, such as "NVIDIA H100 80GB
    HBM3"; None where it has none. The PCIe and NVL cards of a name are slower, and not in it.
    """
    words = set(re.split("[ -]", name))
    if words & {"PCIe", "NVL"}:
        return None
    return next((key for key in ACCELERATORS if key.split("-")[0] in words), None)


def accelerator_here(workers: int, precision: str) -> Hardware | None:
    """Like this machine's accelerator, from the table and not measured; None where unknown."""
    import torch

    key = key_of(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    found = None if key is None else named(key, 1, workers, precision)
    return None if found is None else replace(found, host=usable_host())


def usable_host() -> int:
    """Bytes of this machine's memory that the workers on it may use together."""
    return int(machine_memory() * USABLE_RAM)


def visible_gpus() -> int:
    """GPUs of this machine that torch can use. Torch is loaded only where a driver has devices."""
    if not any(found for kind in DRIVER_DEVICES for found in Path("/dev").glob(kind)):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def require_gpu(gpus: float, where: str) -> None:
    """Refuses to compute on the CPU where a worker has `gpus` GPUs. Raises ClusterError."""
    import torch

    if gpus > 0 and not torch.cuda.is_available():
        raise ClusterError(
            f"parallel.resources_per_worker.GPU={gpus:g}",
            f"and torch {torch.__version__} sees no GPU on {where}",
            "install the build of torch for its driver, or write GPU: 0",
        )


def machine(workers: int, resources_per_worker: Mapping[str, float], precision: str) -> Hardware:
    """This machine with `workers` workers; its rates are measured for a second."""
    import torch

    gpus = resources_per_worker.get("GPU", 0.0)
    if gpus <= 0:
        return _cpu(workers, resources_per_worker.get("CPU", 1.0), precision)
    if not torch.cuda.is_available():
        source = "no GPU is visible here, so times are an A10G's; write --accelerator"
        like = replace(named("A10G", 1, workers, precision), name="GPU", source=source)
        return replace(like, memory=None, usable=None, peak_tflops=None).shared(gpus)
    tflops, bandwidth = measure("cuda", precision)
    properties = torch.cuda.get_device_properties(0)
    known = ACCELERATORS[key_of(properties.name) or "A10G"]
    memory = int(properties.total_memory)
    whole = Hardware(
        name=properties.name,
        device="cuda",
        nodes=1,
        per_node=workers,
        memory=memory,
        usable=int(memory * USABLE),
        tflops=tflops * BESIDE_PRODUCTS,
        bandwidth=bandwidth,
        link=known.link,
        network=known.network,
        source="measured here",
        host=usable_host(),
    )
    return whole.shared(gpus)


def _cpu(workers: int, threads: float, precision: str) -> Hardware:
    import torch

    tflops, bandwidth = measure("cpu", precision)
    share = min(threads, (os.cpu_count() or 1) / workers) / torch.get_num_threads()
    memory = machine_memory() // workers
    loopback = bandwidth / 8  # a message is copied several times by the same cores
    return Hardware(
        name="CPU",
        device="cpu",
        nodes=1,
        per_node=workers,
        memory=memory,
        usable=int(memory * USABLE_RAM),
        tflops=tflops * min(1.0, share) * BESIDE_PRODUCTS,
        bandwidth=bandwidth / workers,
        link=loopback,
        network=loopback,
        source="measured here",
    )


def worker_memory(workers: int, gpus: float) -> int | None:
    """Bytes for each worker on this machine; None for GPUs that are not visible."""
    if gpus <= 0:
        return int(machine_memory() // workers * USABLE_RAM)
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory * USABLE * gpus)


def machine_memory() -> int:
    """Bytes of RAM, or the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(total, int(limit))
    return total


def measure(device: str, precision: str, seconds: float = 0.5) -> tuple[float, float]:
    """TFLOP/s of a matrix product and GB/s of a copy, on the threads of this process."""
    import torch

    size = 8192 if device == "cuda" else 1024
    dtype = getattr(torch, precision)
    a = torch.ones((size, size), dtype=dtype, device=device)
    rate = _rate(lambda: a @ a, device, seconds)
    source = torch.ones(64 * 2**20 // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copies = _rate(lambda: target.copy_(source), device, seconds / 2)
    return 2 * size**3 * rate / 1e12, 2 * source.nbytes * copies / 1e9


def _rate(act: Callable[[], object], device: str, seconds: float) -> float:
    """Calls of `act` per second, with synchronisation of the device."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    act()
    wait()
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        act()
        count += 1
        wait()
    return count / passed
