"""Which functions of the stages' code are which part of a step; modules are watched where they are made."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import altopt.batches.samples
import altopt.batches.sampling
import altopt.models.fast_rcnn
import altopt.models.rpn
import altopt.models.trunk
import altopt.ops.roi_pool
import altopt.ops.roi_sample
import cache.checkpoints
from benchmarks.bench.stopwatch import Stopwatch
from cache.features import FeatureMapWriter

# Each where it is defined; a name that is gone ends the bench, so that no part goes unnoticed.
FUNCTIONS = {
    altopt.batches.sampling: {"label_anchors": "sampling", "subsample_labels": "sampling", "sample_rois": "sampling"},
    altopt.batches.samples: {"make_batch": "decode", "read_sample": "decode", "stored_sample": "decode"},
    altopt.models.trunk: {"image_maps": "trunk", "of_one_size": "trunk"},
    altopt.models.rpn: {"make_proposals": "rpn", "decode_proposals": "rpn", "filter_proposals": "rpn"},
    altopt.models.fast_rcnn: {"postprocess_detections": "head"},
    altopt.ops.roi_pool: {"roi_pool": "roi_pool"},
    altopt.ops.roi_sample: {"pool_rois": "roi_pool"},
    cache.checkpoints: {"save_checkpoint": "write"},
}
OURS = ("altopt", "cache", "stages", "benchmarks")


@contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    """Tell the watch of the functions that stages call, during the block, wherever they were imported."""
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] in OURS]
    with ExitStack() as stack:
        stack.enter_context(watch.worn([(FeatureMapWriter, name, "write") for name in ("write", "__exit__")]))
        for owner, functions in FUNCTIONS.items():
            for name, part in functions.items():
                function = getattr(owner, name)
                timed = watch.timed(part, function)
                for module in ours:
                    if vars(module).get(name) is function:
                        stack.enter_context(mock.patch.object(module, name, timed))
        yield
