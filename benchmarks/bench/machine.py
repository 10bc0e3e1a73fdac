"""What the figures of a bench depend on beside the program: processor, threads, versions."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision

BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # the processor multiplies bfloat16 by itself


def machine_facts(devices: list[torch.device]) -> dict[str, Any]:
    """Return what a reader has to know about the machine, JSON-able."""
    model, flags = _processor()
    gpus = [torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"]
    return {
        "processor": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "bf16_flags": [flag for flag in BF16_FLAGS if flag in flags], "gpus": gpus,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "system": f"{platform.system()} {platform.machine()}", "load_average": os.getloadavg()[0],
    }


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is faster than float32 by the hardware's own account."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(flag in _processor()[1] for flag in BF16_FLAGS)


def bfloat16_sentence(facts: dict[str, Any]) -> str:
    """Return what the processor makes of bfloat16, in words."""
    if facts["bf16_flags"]:
        return f"the processor multiplies bfloat16 itself ({', '.join(facts['bf16_flags'])})"
    return "the processor has neither AVX512-BF16 nor AMX: on it bfloat16 is emulated, and slower than float32"


def _processor() -> tuple[str, list[str]]:
    """Return the model of the processor and its flags; no flags where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    lines = [line.partition(":") for line in text.splitlines() if ":" in line]
    facts = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    return facts.get("model name", platform.machine()), facts.get("flags", "").split()
