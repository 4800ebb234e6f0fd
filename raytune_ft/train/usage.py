"""What a run makes of its GPUs, read without waiting for them."""

from __future__ import annotations

import torch

from raytune_ft.format import GIB
from raytune_ft.records import Forecast


class Usage:
    """Memory of this process's GPU, and the share of the peak rate of all GPUs of the run.

    On a CPU both are None: no data sheet says its rate, and the memory of a process has mapped
    files in it, which are no part of what a run needs.
    """

    def __init__(self, device: torch.device, workers: int, forecast: Forecast | None) -> None:
        self._device, self._workers, self._forecast = device, workers, forecast

    @property
    def peak_gib(self) -> float | None:
        """The most that tensors took at a time, in GiB."""
        if self._device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self._device) / GIB, 3)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs utilisation (arXiv 2204.02311): nothing that is computed twice counts."""
        forecast = self._forecast
        if self._device.type != "cuda" or forecast is None or forecast.peak_flops is None:
            return None
        peak = forecast.peak_flops * self._workers
        return round(tokens_per_s * forecast.flops_a_token / peak, 4)
