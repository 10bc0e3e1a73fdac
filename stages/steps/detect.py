"""Detection on the test split, for evaluation: by one network, or by an RPN and a Fast R-CNN that share nothing."""

from pathlib import Path

from stages.shared.detection import Detect, detect_split
from stages.shared.step import Facts, Runtime


def detect_shared(detector: Path, *, out: Path, config: Detect, runtime: Runtime) -> Facts:
    """Detect on the test split with one network, RPN and Fast R-CNN on the same conv layers."""
    return detect_split([(detector, ("conv", "rpn", "fc", "head"))], out, config, runtime)


def detect_unshared(rpn: Path, detector: Path, *, out: Path, config: Detect, runtime: Runtime) -> Facts:
    """Detect on the test split with a Fast R-CNN on the proposals of a separate RPN."""
    return detect_split([(rpn, ("conv", "rpn")), (detector, ("conv", "fc", "head"))], out, config, runtime)
