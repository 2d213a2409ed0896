"""A description of the machine for the head of a report, without anything that names its owner."""

import os
import platform
from pathlib import Path

import torch


def describe_machine() -> dict:
    """Return the processor, its cores and instructions, the memory, the system, and every GPU with its driver."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name, "memory_mb": properties.total_memory // 2**20,
                "processors": properties.multi_processor_count, "capability": [properties.major, properties.minor],
                "architecture": getattr(properties, "gcnArchName", None),  # of AMD's
            }
        )  # fmt: skip
    return {
        "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "memory_mb": _memory_mb(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cuda": torch.version.cuda, "hip": torch.version.hip, "driver": _driver(), "gpus": gpus,
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system than Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_mb() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, others not these names
        return None


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
