"""Does the memory that proposals take depend on the number of images? ``python -m benchmarks.proposals_memory``.

Runs the stage generate_proposals itself on generated images, with the small network and random weights, and prints
the resident memory of the process every so many images, and images per second, by the clock and by processor time
(on a machine with other work only the latter says much). Needs Linux, for /proc; writes to a temporary folder.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from altopt.config import NetworkConfig, Pixels
from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset
from altopt.machine.allocation import keep_freed_memory
from altopt.machine.randomness import generator
from altopt.models.detector import FasterRCNN
from altopt.models.network_parts import initialise_all
from cache.checkpoints import save_checkpoint
from stages.shared.events import Event, ImagesDone
from stages.shared.step import Runtime
from stages.shared.training import describe_network
from stages.steps.proposals import GenerateProposals, generate_proposals

PARTS = ("conv", "rpn", "fc", "head")
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass
class Memory:
    """Takes the stage's reports, and a sample at every ``every`` images."""

    every: int

    def __post_init__(self) -> None:
        self.clock, self.processor = time.perf_counter(), time.process_time()
        self.samples: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        """Sample, if the report is of an image whose turn it is."""
        if not isinstance(event, ImagesDone) or event.done % self.every:
            return
        clock, processor = time.perf_counter() - self.clock, time.process_time() - self.processor
        self.samples.append({"images": event.done, "resident_mb": round(resident(), 1),
                             "seconds": round(clock, 2), "processor_seconds": round(processor, 2)})
        print(f"{event.done:>9}{resident():>13.1f}{event.done / clock:>13.1f}{event.done / processor:>17.1f}",
              flush=True)


def resident() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_MB


def config_for(images: int, width: int, height: int) -> GenerateProposals:
    """Return the stage's config for so many images, each seen as it is."""
    network = NetworkConfig(name="small", short_side=min(width, height), max_side=max(width, height),
                            anchor_scales=(1.0, 2.0), rpn_channels=64)
    data = DataConfig(format="shapes", train=(f"memory:{images}",), test=("test:1",), width=width, height=height)
    return GenerateProposals(network=network, data=data, pre_nms=0, post_nms=300, min_side=4.0)


def write_random_network(path: Path, config: GenerateProposals) -> None:
    """Write a checkpoint with weights that nobody trained."""
    classes = open_dataset(config.data, "train", None).classes
    network = FasterRCNN(config.network, len(classes))
    for part in PARTS:
        initialise_all(getattr(network, part).to_empty(device="cpu"), generator("proposals_memory", part), part)
    save_checkpoint(path, network.tensors(PARTS), describe_network(config.network, classes, Pixels()))


def measure(images: int, every: int, width: int, height: int, threads: int) -> dict[str, Any]:
    """Run the stage and return what was seen, JSON-able."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the command does
    config = config_for(images, width, height)
    with tempfile.TemporaryDirectory() as folder:
        write_random_network(Path(folder, "M1.safetensors"), config)
        print(f"{'images':>9}{'resident MB':>13}{'images/s':>13}{'per processor s':>17}")
        memory = Memory(every)
        facts = generate_proposals(Path(folder, "M1.safetensors"), out=Path(folder, "P1.h5"), config=config,
                                   runtime=Runtime(device="cpu", report=memory))
        size = Path(folder, "P1.h5").stat().st_size
    return {"images": images, "width": width, "height": height, "threads": threads, "torch": torch.__version__,
            "machine": platform.machine(), "proposals": facts["proposals"], "file_mb": round(size / 1e6, 1),
            "samples": memory.samples}


def main() -> None:
    """Measure and print; the first sample is what the others are held against."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=1000, help="images between two samples")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples there as well")
    chosen = parser.parse_args()
    result = measure(chosen.images, chosen.every, chosen.width, chosen.height, chosen.threads)
    if result["samples"]:
        first, *others = [each["resident_mb"] for each in result["samples"]]
        print(f"{result['proposals']} proposals in {result['file_mb']} MB; at most "
              f"{max([0.0, *(each - first for each in others)]):.1f} MB more than after the first {chosen.every}")
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
