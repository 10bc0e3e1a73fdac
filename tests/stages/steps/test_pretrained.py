"""M0 from torchvision's host: what is told on the way."""

import hashlib

import torch
from loopback import serving

from altopt.models import imagenet
from stages.shared.events import Event, ImagesDone
from stages.shared.step import Runtime
from stages.steps.pretrained import LoadImageNetWeights, load_imagenet_weights


def test_imagenet_weights_are_fetched_with_progress(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    name = f"squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    events: list[Event] = []
    with serving() as server:
        monkeypatch.setattr(imagenet, "imagenet_url",
                            lambda backbone: server.url(f"/{name}", lambda handler: handler.ranged(content)))
        facts = load_imagenet_weights(out=tmp_path / "M0.safetensors", runtime=Runtime(report=events.append),
                                      config=LoadImageNetWeights(backbone="squeezenet1_1"))
    assert facts == {"file": name}
    assert (tmp_path / "M0.safetensors").is_file()
    size = len(content) // 1_000_000
    assert (events[0], events[-1]) == (ImagesDone(0, size, "MB"), ImagesDone(size, size, "MB"))
