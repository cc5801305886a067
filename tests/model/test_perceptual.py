"""The frozen networks of the content loss: where weights come from, what they compute."""

import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from model import make_perceptual
from model.efficientnet import EfficientNetLite0, folded_state
from model.perceptual import VGG19_FILE, _lite0_path

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
CAFFE_MEAN = torch.tensor([129.1863, 104.7624, 93.5940]).view(3, 1, 1)


def frames() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def features_of(name: str) -> nn.Sequential:
    """torchvision's convolutions of `vgg16` or `vgg19`, without the large classifier."""
    torch.manual_seed(0)
    layout = torchvision.models.vgg.cfgs[{"vgg16": "D", "vgg19": "E"}[name]]
    return torchvision.models.vgg.make_layers(layout)


def reference(layers: nn.Sequential, x: torch.Tensor, taps: tuple[int, ...]) -> list[torch.Tensor]:
    outputs = []
    for index, layer in enumerate(layers):
        x = layer(x)
        if index in taps:
            outputs.append(x.clone())  # torchvision's ReLU works in place
    return outputs


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights of VGG19 and VGGFace, laid out as the real files are."""
    folder = tmp_path_factory.mktemp("weights")
    for name, file in (("vgg19", VGG19_FILE), ("vgg16", "vggface.pth")):
        state = {f"features.{key}": value for key, value in features_of(name).state_dict().items()}
        state["classifier.0.weight"] = torch.zeros(1)
        torch.save(state, folder / file)
    return folder


def test_vgg_is_torchvisions_at_the_papers_layers(weights: Path):
    network = make_perceptual("vgg", weights_dir=str(weights))
    expected = reference(
        features_of("vgg19"), ((frames() + 1) / 2 - MEAN) / STD, (1, 6, 11, 20, 29)
    )
    for ours, theirs in zip(network(frames()), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    # 0.15 of the paper, times what torchvision's scale of input is smaller by.
    assert network.layer_weights == pytest.approx([0.15 * 57.63] * 5, rel=1e-3)


def test_vggface_joins_with_its_own_scale_and_weight(weights: Path):
    network = make_perceptual("vgg", weights_dir=str(weights), vggface=str(weights / "vggface.pth"))
    expected = reference(
        features_of("vgg16"), (frames() + 1) / 2 * 255 - CAFFE_MEAN, (1, 6, 11, 18, 25)
    )
    for ours, theirs in zip(network(frames())[5:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert network.layer_weights[5:] == (0.025,) * 5
    assert set(network.weights_sha256) == {VGG19_FILE, "vggface.pth"}


def test_vggface_may_be_named_as_in_the_paper_of_vgg(weights: Path, tmp_path: Path):
    state = torch.load(weights / "vggface.pth", weights_only=True)
    names = [
        f"conv{s}_{n}" for s, count in enumerate((2, 2, 3, 3, 3), 1) for n in range(1, count + 1)
    ]
    convs = [key.removesuffix(".weight") for key in state if key.startswith("features")]
    convs = [key for key in convs if f"{key}.weight" in state]
    renamed = {
        f"{new}.{kind}": state[f"{old}.{kind}"]
        for new, old in zip(names, convs, strict=True)
        for kind in ("weight", "bias")
    }
    torch.save(renamed, tmp_path / "renamed.pth")
    networks = [
        make_perceptual("vgg", weights_dir=str(weights), vggface=str(path))
        for path in (weights / "vggface.pth", tmp_path / "renamed.pth")
    ]
    for one, other in zip(networks[0](frames()), networks[1](frames()), strict=True):
        assert torch.equal(one, other)


def test_torch_hubs_cache_is_the_default_place(weights: Path, tmp_path: Path, monkeypatch):
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / VGG19_FILE).symlink_to(weights / VGG19_FILE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = make_perceptual("vgg")
    digest = hashlib.sha256((weights / VGG19_FILE).read_bytes()).hexdigest()
    assert network.weights_sha256 == {VGG19_FILE: digest}


def test_missing_vgg_says_what_to_get_where_to_put_it_and_how_to_do_without(tmp_path: Path):
    with pytest.raises(ValueError, match=r"vgg19-dcbb9e9d\.pth") as caught:
        make_perceptual("vgg", weights_dir=str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth" in message
    assert "--perceptual.name lite" in message


def test_a_missing_vggface_is_refused(weights: Path):
    with pytest.raises(ValueError, match=r"no file of weights at nowhere\.pth"):
        make_perceptual("vgg", weights_dir=str(weights), vggface="nowhere.pth")


def test_another_networks_weights_are_refused(weights: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="not the network it was taken for"):
        make_perceptual("vgg", weights_dir=str(weights), vggface=str(weights / VGG19_FILE))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        make_perceptual("vgg", weights_dir=str(weights), vggface=str(tmp_path / "list.pth"))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_a_file_that_was_cut_short_is_named(tmp_path: Path, content: bytes):
    (tmp_path / VGG19_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"vgg19-dcbb9e9d\.pth can't be read as weights"):
        make_perceptual("vgg", weights_dir=str(tmp_path))


def test_settings_without_effect_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="perceptual network lite has none"):
        make_perceptual("lite", vggface="face.pth")
    with pytest.raises(ValueError, match="is 'vgg11', expected vgg or lite"):
        make_perceptual("vgg11")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lite_is_the_packages_network():
    """Same maps as the package's own network, which pads for pictures of 224 px."""
    state = torch.load(_lite0_path(), weights_only=True)
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(state)
    ours = EfficientNetLite0()
    ours.load_state_dict(folded_state(state))
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        hidden = theirs._swish(theirs._bn0(theirs._conv_stem(x)))
        expected = []
        for number, block in enumerate(theirs._blocks):
            hidden = block(hidden)
            if number in (0, 2, 4, 10, 15):
                expected.append(hidden)
        for layer, reference_layer in zip(ours(x), expected, strict=True):
            torch.testing.assert_close(layer, reference_layer, rtol=1e-3, atol=1e-3)


def test_lite_takes_pictures_that_are_not_square():
    shapes = [tuple(layer.shape) for layer in make_perceptual("lite")(frames())]
    assert shapes == [
        (2, 16, 16, 24),
        (2, 24, 8, 12),
        (2, 40, 4, 6),
        (2, 112, 2, 3),
        (2, 320, 1, 2),
    ]


def test_lite_weighs_its_layers_alike_on_a_face():
    skimage = pytest.importorskip("skimage.data")
    face = torch.from_numpy(skimage.astronaut()[0:256, 96:352]).permute(2, 0, 1)[None]
    network = make_perceptual("lite")
    layers = network(torch.nn.functional.avg_pool2d(face / 127.5 - 1, 2))
    terms = [
        weight * (layer - layer.mean((2, 3), keepdim=True)).abs().mean().item()
        for weight, layer in zip(network.layer_weights, layers, strict=True)
    ]
    assert all(0.05 < term < 0.4 for term in terms)


def test_perceptual_networks_stay_frozen_and_pass_gradients_on():
    network = make_perceptual("lite")
    network.train()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    x = frames().requires_grad_()
    sum(layer.abs().mean() for layer in network(x)).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
