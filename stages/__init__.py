"""The training schemes, each a list of steps: what is made, by which stage, from what."""

from stages.shared.step import Step
from stages.steps.assemble import add_rpn_layers
from stages.steps.detect import detect_shared, detect_unshared
from stages.steps.fast_rcnn import train_box_layer, train_classification, train_fast_rcnn, train_fast_rcnn_frozen_conv
from stages.steps.fast_rcnn_regions import cache_pooled_features, detect_on_proposals, detect_with_svms
from stages.steps.joint import train_approximate_joint, train_exact_joint
from stages.steps.pretrained import load_imagenet_weights, pretrain_on_crops
from stages.steps.proposals import generate_proposals
from stages.steps.rcnn import cache_warped_features, detect_rcnn, train_on_warped_regions
from stages.steps.rpn import train_rpn, train_rpn_frozen_conv
from stages.steps.selective_search import selective_search, selective_search_test
from stages.steps.spp_net import cache_conv_features, cache_region_features, detect_spp_net, train_fc_layers
from stages.steps.svms import train_regressors, train_svms

# M0 comes from before the list; a recipe has the table of one of the two.
PRETRAINED = [Step("M0", load_imagenet_weights), Step("M0", pretrain_on_crops)]

# Girshick, "Training R-CNNs of various velocities"; Faster R-CNN, section 3.2.
ALTERNATING = [
    Step("M1", train_rpn, "M0"),
    Step("P1", generate_proposals, "M1"),
    Step("M2", train_fast_rcnn, "M0", "P1"),
    Step("M3", train_rpn_frozen_conv, "M2"),
    Step("P2", generate_proposals, "M3"),
    Step("M4", train_fast_rcnn_frozen_conv, "M3", "P2"),
    Step("M5", add_rpn_layers, "M4", "M3"),
]

# Girshick et al., "Rich feature hierarchies": features of warped regions, SVMs and box regressors on them.
RCNN = [
    Step("P0", selective_search),
    Step("M1", train_on_warped_regions, "M0", "P0"),
    Step("F1", cache_warped_features, "M1", "P0"),
    Step("S1", train_svms, "F1"),
    Step("R1", train_regressors, "F1"),
]

# He et al., "Spatial pyramid pooling": conv features once for each image, only the layers behind them learn.
SPP_NET = [
    Step("P0", selective_search),
    Step("F1", cache_conv_features, "M0"),
    Step("M1", train_fc_layers, "M0", "F1", "P0"),
    Step("F2", cache_region_features, "M1", "F1", "P0"),
    Step("S1", train_svms, "F2"),
    Step("R1", train_regressors, "F2"),
]

# Girshick, "Fast R-CNN": one network on proposals of other origin.
FAST_RCNN = [Step("P0", selective_search), Step("M1", train_fast_rcnn, "M0", "P0")]

# Its ablations that take further steps: SVMs in place of the softmax (section 5.4), and the box layer trained by itself
# on a network that learned to classify only (section 5.1).
FAST_RCNN_SVM = [
    Step("P0", selective_search),
    Step("M1", train_fast_rcnn, "M0", "P0"),
    Step("F1", cache_pooled_features, "M1", "P0"),
    Step("S1", train_svms, "F1"),
]
FAST_RCNN_STAGE_WISE = [
    Step("P0", selective_search),
    Step("M1", train_classification, "M0", "P0"),
    Step("M2", train_box_layer, "M1", "P0"),
]

# Faster R-CNN, section 3.2: one network, four losses; proposals are constants in the backward pass, or they are not.
APPROXIMATE_JOINT = [Step("M1", train_approximate_joint, "M0")]
EXACT_JOINT = [Step("M1", train_exact_joint, "M0")]

SCHEMES = {
    "alternating": ALTERNATING,
    "rcnn": RCNN,
    "spp-net": SPP_NET,
    "fast-rcnn": FAST_RCNN,
    "approximate-joint": APPROXIMATE_JOINT,
    "exact-joint": EXACT_JOINT,
    "fast-rcnn-svm": FAST_RCNN_SVM,
    "fast-rcnn-stage-wise": FAST_RCNN_STAGE_WISE,
}

# What is evaluated, scheme by scheme. Alternating: two networks that share nothing (the paper's "unshared"), and the
# one of the last step. A label sets detections apart from others of the same run.
DETECTIONS = {
    "alternating": [Step("D2", detect_unshared, "M1", "M2", label="unshared"),
                    Step("D5", detect_shared, "M5", label="shared")],
    "rcnn": [Step("T0", selective_search_test), Step("D1", detect_rcnn, "M1", "S1", "R1", "T0")],
    "spp-net": [Step("T0", selective_search_test), Step("D1", detect_spp_net, "M1", "S1", "R1", "T0")],
    "fast-rcnn": [Step("T0", selective_search_test), Step("D1", detect_on_proposals, "M1", "T0")],
    "approximate-joint": [Step("D1", detect_shared, "M1")],
    "exact-joint": [Step("D1", detect_shared, "M1")],
    "fast-rcnn-svm": [Step("T0", selective_search_test), Step("D1", detect_with_svms, "M1", "S1", "T0")],
    "fast-rcnn-stage-wise": [Step("T0", selective_search_test), Step("D1", detect_on_proposals, "M2", "T0")],
}
