"""RoI pooling on a device: forward and backward equal to the CPU's, and to what its definition gives."""

import pytest
import torch
from device_runs import CUDA
from ops.test_roi_pool import STRIDE, distinct, random_boxes, slow

from altopt.machine.determinism import fixed_order
from altopt.ops.roi_pool import roi_pool


def both_ways(features, boxes, size, weights, device):
    """Return what is pooled, and the features' gradient, on the CPU."""
    learned = features.to(device).detach().requires_grad_()
    pooled = roi_pool(learned, [each.to(device) for each in boxes], size, 1 / STRIDE)
    (pooled * weights.to(device)).sum().backward()
    return pooled.detach().cpu(), learned.grad.cpu()


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("size", [1, 6, 7])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_equal_to_brute_force_and_to_the_cpu(device, size, in_order):
    """To the bit in any order of sums, as all numbers are whole."""
    features, boxes = distinct(3, 2, 7, 9), [random_boxes(6, 1), torch.zeros(0, 4), random_boxes(5, 2)]
    weights = distinct(11, 2, size, size, seed=3)
    with fixed_order(in_order):
        pooled, gradient = both_ways(features, boxes, size, weights, device)
    for expected in (slow(features, boxes, size, weights), both_ways(features, boxes, size, weights, "cpu")):
        assert torch.equal(pooled, expected[0])
        assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_map_of_vgg16_is_pooled_as_on_the_cpu(device, dtype):
    random = torch.Generator().manual_seed(7)
    features, boxes = torch.randn(1, 64, 38, 50, generator=random).to(dtype), [random_boxes(128, 11) * 4]
    weights = torch.randn(128, 64, 7, 7, generator=random).to(dtype)
    pooled, gradient = both_ways(features, boxes, 7, weights, device)
    expected, expected_gradient = both_ways(features, boxes, 7, weights, "cpu")
    assert torch.equal(pooled, expected)  # maxima are not rounded
    torch.testing.assert_close(gradient, expected_gradient)
