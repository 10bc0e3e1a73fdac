"""Stage 7: one network from a Fast R-CNN and the RPN that shares its conv layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stages.shared.stage_config import StageConfig
from stages.shared.step import Facts, Runtime


@dataclass(frozen=True, kw_only=True)
class Assemble(StageConfig):
    """Nothing to choose: the layers go together or they do not."""

    keeps_parts: ClassVar[bool] = True


def add_rpn_layers(detector: Path, rpn: Path, *, out: Path, config: Assemble, runtime: Runtime) -> Facts:
    """Put the RPN's layers on the detector; refuse unless their conv layers are equal to the last bit."""
    from altopt.errors import ArtifactError
    from cache.checkpoints import first_difference, load_checkpoint, save_checkpoint

    layers, description = load_checkpoint(detector)
    rpn_layers, rpn_description = load_checkpoint(rpn)

    def part(tensors: dict[str, Any], name: str) -> dict[str, Any]:
        return {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}

    difference = first_difference(part(layers, "conv"), part(rpn_layers, "conv"))
    if difference:
        raise ArtifactError(f"{detector.name} and {rpn.name} do not share their conv layers: {difference}: make "
                            f"{detector.stem} again from {rpn.stem}, conv layers frozen (altopt stage {detector.stem})")
    if not part(rpn_layers, "rpn"):
        raise ArtifactError(f"{rpn.name} has no RPN layers: make it again with altopt stage {rpn.stem}")
    if any(description.get(name) != rpn_description.get(name) for name in ("network", "pixels")):
        raise ArtifactError(f"{detector.name} and {rpn.name} were made for different anchors, image sizes or pixels: "
                            "make both with one recipe")
    save_checkpoint(out, layers | part(rpn_layers, "rpn"), description)
    return {}
