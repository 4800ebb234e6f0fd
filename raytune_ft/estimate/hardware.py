"""What workers run on: this machine as it is, or accelerators by name.

The table's figures are of the vendors' data sheets: memory in GiB (of cards with GDDR6, what their
driver shows, since ECC takes a part of it), dense TFLOP/s of matrix products without sparsity
(float32 without TF32, as torch computes it), memory bandwidth in GB/s, and what one accelerator
sends to its neighbours in a node, in GB/s and one direction. `network` is what a node of the
vendor's reference design, or of the clouds that offer it, sends to others: of A10G, L4 and L40S one
with 8 of them.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from raytune_ft.errors import ConfigError

GIB = 2**30
USABLE = 0.94
"""Of an accelerator's memory; the rest is the context of the driver and of the collectives, and
what an allocator cannot use for its pieces."""
USABLE_RAM = 0.9
ACHIEVED = 0.4
"""Of the peak: Llama 3 was trained at 38 to 43 % of it (arXiv 2407.21783, table 4)."""
BESIDE_PRODUCTS = 0.6
"""Of the rate of a bare matrix product, where norms, activations and masks take their time too."""
PROCESS = {"cpu": int(0.6 * GIB), "cuda": 0}
"""A worker's host memory before it holds a model: Python, torch, transformers."""


@dataclass(frozen=True)
class Accelerator:
    """One line of the table."""

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
# What Ray calls them in a node's resources, where that is another name. Its A100 is of either size.
RAY_NAMES = {"A100": "A100-40G", "AMD-Instinct-MI300X-OAM": "MI300X"}


@dataclass(frozen=True)
class Hardware:
    """`memory` and `usable` are bytes of one worker, None where nobody knows. `tflops` is what
    matrix products achieve; `bandwidth`, `link` and `network` are GB/s of memory, between the
    workers of a node (each), and between nodes (all of a node's workers together).
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

    def fits(self, needed: int) -> bool:
        """What is unknown is presumed to do."""
        return self.usable is None or needed + PROCESS[self.device] <= self.usable

    def shared(self, gpus: float) -> Hardware:
        """For workers that have a part of an accelerator each, as in `GPU: 0.5`."""
        part = gpu_part(gpus)
        return replace(
            self,
            memory=None if self.memory is None else int(self.memory * part),
            usable=None if self.usable is None else int(self.usable * part),
            tflops=self.tflops * part,
            bandwidth=self.bandwidth * part,
        )


def gpu_part(gpus: float) -> float:
    """Of one accelerator, which is all that a worker uses of several."""
    return min(1.0, gpus)


def named(name: str, nodes: int, per_node: int, precision: str) -> Hardware:
    """Nodes of accelerators out of the table.

    Raises:
        ConfigError: the table has none of that name.
    """
    key = next((k for k in ACCELERATORS if k.lower() == name.lower()), None)
    if key is None:
        near = [k for k in ACCELERATORS if k.lower().startswith(name.lower())]
        near = near or difflib.get_close_matches(name.upper(), ACCELERATORS) or list(ACCELERATORS)
        raise ConfigError(
            f"--accelerator={name}", "is none that is known", f"write {' or '.join(near)}"
        )
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
    )


def machine(workers: int, resources_per_worker: Mapping[str, float], precision: str) -> Hardware:
    """This machine with so many workers, measured for a second."""
    import torch

    gpus = resources_per_worker.get("GPU", 0.0)
    if gpus <= 0:
        return _cpu(workers, resources_per_worker.get("CPU", 1.0), precision)
    if not torch.cuda.is_available():
        like = named("A10G", 1, workers, precision)
        source = "no GPU is visible here, so times are an A10G's; write --accelerator"
        return replace(like, name="GPU", memory=None, usable=None, source=source).shared(gpus)
    tflops, bandwidth = measure("cuda", precision)
    properties = torch.cuda.get_device_properties(0)
    known = ACCELERATORS[
        next((k for k in ACCELERATORS if k.split("-")[0] in properties.name), "A10G")
    ]
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
    return int(torch.cuda.get_device_properties(0).total_memory * USABLE * gpu_part(gpus))


def machine_memory() -> int:
    """RAM, or what a container may use of it."""
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
    """TFLOP/s of a matrix product and GB/s of a copy, on this process' threads."""
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
    """Times a second; what is queued on a device is waited for."""
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
