"""Perceptual loss: the distance of two slices in the features of a pretrained network."""

from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from torchvision.models import VGG16_Weights, resnet50, vgg16

from adni_ldm.errors import UserError

# MONAI's PerceptualLoss has the same networks; it needs the lpips package for VGG, and runs code from a
# repository for RadImageNet.
VGG = VGG16_Weights.IMAGENET1K_V1.url
RADIMAGENET = ("MONAI/checkpoints", "RadImageNet-ResNet50_notop.pth")
NAMES = ("vgg", "radimagenet")
SUFFIXES = (".safetensors", ".pth", ".pt")


class PerceptualLoss(nn.Module):
    """Distance of the features of slices (Zhang et al. 2018, arXiv:1801.03924, equation 1).

    Features are normalized to length 1 over the channels; the squared differences are summed over channels
    and averaged over positions, depths and slices. No channel weights are learned. The features are the
    outputs of `stages`, consecutive parts of a network; their input is normalized as ImageNet's or, if `kind`
    is radimagenet, as RadImageNet's.
    """

    def __init__(self, stages: list[nn.Module], kind: str):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        std = (1.0, 1.0, 1.0) if kind == "radimagenet" else (0.229, 0.224, 0.225)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()  # the weights get no gradient; the reconstruction does

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Mean distance () of slices (B, 1, H, W) in [-1, 1]; the gradient flows into the reconstruction."""
        found, expected = (self._input(slices.float()) for slices in (reconstruction, images))
        distances = []
        for stage in self.stages:
            found = stage(found)
            with torch.no_grad():
                expected = stage(expected)
            difference = F.normalize(found, dim=1, eps=1e-8) - F.normalize(expected, dim=1, eps=1e-8)
            distances.append(difference.square().sum(dim=1).mean())
        return torch.stack(distances).mean()

    def _input(self, slices: torch.Tensor) -> torch.Tensor:
        """Slices (B, 3, H, W), normalized as in the training of the network."""
        return ((slices / 2 + 0.5).expand(-1, 3, -1, -1) - self.mean) / self.std


def load_perceptual_loss(name: str) -> PerceptualLoss | None:
    """Load the perceptual loss by name, or with the weights of a file; None for "none".

    `name` is none, vgg (ImageNet) or radimagenet; or a file of weights (safetensors, or what torch reads with
    weights_only) of torchvision's VGG-16 or ResNet-50 or of RadImageNet's ResNet-50; or a folder of one.
    Raises UserError if the weights are missing and cannot be downloaded, or belong to another network.
    """
    if name == "none":
        return None
    weights = _read(_find(name))
    try:
        return _vgg(weights) if "features.0.weight" in weights else _resnet50(weights)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"--perceptual {name}: these weights are of neither VGG-16 nor ResNet-50 ({reason})"
        ) from error


def _find(name: str) -> Path:
    """The file of weights; for a known name from the cache, else downloaded."""
    if name in NAMES:
        try:
            if name == "radimagenet":
                return Path(hf_hub_download(*RADIMAGENET))
            path = Path(torch.hub.get_dir(), "checkpoints", Path(VGG).name)
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(VGG, str(path), progress=False)
            return path
        except (OSError, ValueError) as error:
            file = VGG if name == "vgg" else f"{RADIMAGENET[1]} of {RADIMAGENET[0]} (Hugging Face)"
            raise UserError(
                f"--perceptual {name}: its weights are not in the cache and cannot be downloaded; get {file} "
                "elsewhere and give --perceptual PATH/TO/IT, or use none"
            ) from error
    path = Path(name).expanduser()
    found = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"--perceptual {name}: expected none, {', '.join(NAMES)}, a file of weights "
            f"({', '.join(SUFFIXES)}), or a folder that holds one"
        )
    return found[0]


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Weights by name, without the wrapping that training scripts add."""
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of error for a file that holds no weights
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"--perceptual {path}: cannot be read as weights ({reason})") from error
    weights = weights.get("state_dict", weights)
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _vgg(weights: dict[str, torch.Tensor]) -> PerceptualLoss:
    """The five depths of LPIPS: the last activation before each pooling."""
    network = vgg16(weights=None, init_weights=False)
    network.classifier = nn.Identity()
    network.load_state_dict({key: value for key, value in weights.items() if key.startswith("features.")})
    ends = (4, 9, 16, 23, 30)
    return PerceptualLoss([network.features[start:end] for start, end in zip((0, *ends), ends)], "vgg")


def _resnet50(weights: dict[str, torch.Tensor]) -> PerceptualLoss:
    """The five depths of a ResNet."""
    network, kind = resnet50(weights=None), "resnet50"
    network.fc = nn.Identity()
    weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    if "conv1.bias" in weights:  # RadImageNet's comes from Keras
        kind = "radimagenet"
        _from_keras(network, weights)
    network.load_state_dict(weights)
    first = nn.Sequential(network.conv1, network.bn1, network.relu)
    second = nn.Sequential(network.maxpool, network.layer1)
    return PerceptualLoss([first, second, network.layer2, network.layer3, network.layer4], kind)


def _from_keras(network: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Adapt torchvision's ResNet-50 and weights from Keras to each other, in place.

    Keras' convolutions have a bias, which is folded into the mean that the following BatchNorm subtracts, and
    its blocks downsample in their first convolution.
    """
    biases = [key for key in weights if key.endswith(".bias")]
    for key in [key for key in biases if f"{key[:-5]}.running_mean" not in weights]:
        norm = key.replace("conv", "bn").replace("downsample.0", "downsample.1").removesuffix(".bias")
        weights[f"{norm}.running_mean"] = weights[f"{norm}.running_mean"] - weights.pop(key)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.001e-5
    for block in (network.layer2[0], network.layer3[0], network.layer4[0]):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
