"""Which functions of the stages' code are which part of a step; modules are watched where they are made."""

from collections.abc import Iterator
from contextlib import contextmanager

import altopt.batches.sampling
import altopt.models.detector
import altopt.models.fast_rcnn
import altopt.models.frozen
import altopt.models.joint
import altopt.models.rpn
import cache.checkpoints
import stages.shared.feature_maps
import stages.shared.feature_store
from altopt.stopwatch import Stopwatch
from cache.features import FeatureMapWriter

WATCHED = [
    (altopt.models.rpn, "label_anchors", "sampling"), (altopt.models.rpn, "subsample_labels", "sampling"),
    (altopt.batches.sampling, "sample_rois", "sampling"),
    (altopt.models.fast_rcnn, "roi_pool", "roi_pool"), (altopt.models.joint, "pool_rois", "roi_pool"),
    (altopt.models.detector, "pool_rois", "roi_pool"), (altopt.models.detector, "make_proposals", "rpn"),
    (altopt.models.joint, "decode_proposals", "rpn"), (altopt.models.joint, "filter_proposals", "rpn"),
    (altopt.models.detector, "postprocess_detections", "head"), (altopt.models.rpn, "conv_features", "trunk"),
    (altopt.models.fast_rcnn, "conv_features", "trunk"), (altopt.models.joint, "conv_features", "trunk"),
    (altopt.models.frozen, "frozen_features", "trunk"), (stages.shared.feature_maps, "image_maps", "trunk"),
    (stages.shared.feature_maps, "make_batch", "decode"), (stages.shared.feature_store, "read_sample", "decode"),
    (stages.shared.feature_store, "stored_sample", "decode"), (FeatureMapWriter, "write", "write"),
    (FeatureMapWriter, "__exit__", "write"), (cache.checkpoints, "save_checkpoint", "write"),
]


@contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    """Tell the watch of the functions that stages call, during the block."""
    with watch.worn(WATCHED):
        yield
