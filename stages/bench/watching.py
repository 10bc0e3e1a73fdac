"""Which functions of the stages' code are which part of a step; modules are watched where they are made."""

from collections.abc import Iterator
from contextlib import contextmanager

import altopt.detector
import altopt.fast_rcnn
import altopt.frozen
import altopt.joint
import altopt.rpn
import altopt.sampling
import cache.checkpoints
import stages.feature_maps
import stages.feature_store
from altopt.stopwatch import Stopwatch
from cache.features import FeatureMapWriter

WATCHED = [
    (altopt.rpn, "label_anchors", "sampling"), (altopt.rpn, "sample_anchors", "sampling"),
    (altopt.sampling, "sample_rois", "sampling"),
    (altopt.fast_rcnn, "roi_pool", "roi_pool"), (altopt.joint, "pool_rois", "roi_pool"),
    (altopt.detector, "pool_rois", "roi_pool"), (altopt.detector, "proposals_of", "rpn"),
    (altopt.joint, "scored_boxes", "rpn"), (altopt.joint, "kept_boxes", "rpn"),
    (altopt.detector, "detections_of", "head"), (altopt.rpn, "conv_features", "trunk"),
    (altopt.fast_rcnn, "conv_features", "trunk"), (altopt.joint, "conv_features", "trunk"),
    (altopt.frozen, "frozen_features", "trunk"), (stages.feature_maps, "picture_maps", "trunk"),
    (stages.feature_maps, "make_batch", "decode"), (stages.feature_store, "read_sample", "decode"),
    (stages.feature_store, "stored_sample", "decode"), (FeatureMapWriter, "write", "write"),
    (FeatureMapWriter, "__exit__", "write"), (cache.checkpoints, "save_checkpoint", "write"),
]


@contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    """Tell the watch of the functions that stages call, during the block."""
    with watch.worn(WATCHED):
        yield
