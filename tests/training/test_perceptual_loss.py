"""The perceptual loss with random weights: its gradient, and which files of weights it accepts."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet50, vgg16

from adni_ldm.errors import UserError
from adni_ldm.training.perceptual_loss import load_perceptual_loss


def slices(seed, count=2, size=32):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def write_vgg(folder):
    torch.manual_seed(0)
    features = vgg16(weights=None).features.state_dict()
    save_file({f"features.{key}": value for key, value in features.items()}, folder / "vgg.safetensors")
    return folder


def with_biases(network):
    """RadImageNet's layout: convolutions with a bias, halving in a block's first."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                options = {"stride": child.stride, "padding": child.padding, "bias": True}
                setattr(
                    module,
                    name,
                    nn.Conv2d(child.in_channels, child.out_channels, child.kernel_size, **options),
                )
            if isinstance(child, nn.BatchNorm2d):
                child.eps = 1.001e-5
                nn.init.normal_(child.running_mean)
    for block in (network.layer2[0], network.layer3[0], network.layer4[0]):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    network.fc = nn.Identity()
    return network.eval()


def write_resnet50(folder):
    torch.save(resnet50(weights=None).state_dict(), folder / "resnet50.pth")
    return folder / "resnet50.pth"


@pytest.mark.parametrize("write", [write_vgg, write_resnet50])
def test_the_gradient_reaches_the_reconstruction(write, tmp_path):
    """Computed under no_grad, as a usual example script does, it would have no gradient."""
    perceptual_loss = load_perceptual_loss(str(write(tmp_path)))
    images, reconstruction = slices(0), slices(1).requires_grad_()
    distance = perceptual_loss(reconstruction, images)
    distance.backward()
    assert distance.item() > 0 and reconstruction.grad.abs().mean() > 0
    assert reconstruction.grad.isfinite().all()
    assert perceptual_loss(images, images).item() == pytest.approx(0, abs=1e-6)
    assert not any(weight.requires_grad for weight in perceptual_loss.parameters())
    # Each slice by itself: the mean of two batches of one is the batch of two.
    alone = [perceptual_loss(slices(1)[[row]], images[[row]]) for row in (0, 1)]
    assert torch.stack(alone).mean().item() == pytest.approx(distance.item(), rel=1e-3)


def test_radimagenets_weights_fit_torchvisions_network(tmp_path):
    torch.manual_seed(0)
    reference = with_biases(resnet50(weights=None))
    torch.save(reference.state_dict(), tmp_path / "RadImageNet-ResNet50_notop.pth")
    perceptual_loss = load_perceptual_loss(str(tmp_path))
    assert torch.equal(perceptual_loss.std, torch.ones(3, 1, 1)), "RadImageNet subtracts the mean alone"
    found = inputs = torch.randn(1, 3, 64, 64)
    for stage in perceptual_loss.stages:
        found = stage(found)
    expected = reference(inputs)
    assert torch.allclose(found.mean(dim=(2, 3)), expected, rtol=1e-3, atol=1e-4 * expected.max().item())


def test_none_is_none():
    assert load_perceptual_loss("none") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg", "get .*vgg16-.*pth elsewhere and give --perceptual"),
        ("radimagenet", "get RadImageNet-ResNet50_notop.pth .* elsewhere"),
        ("lpips", "expected none, vgg, radimagenet, a file"),
    ],
)
def test_missing_weights_are_reported_in_one_line(name, message, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network, also where there is one
    with pytest.raises(UserError, match=message) as refusal:
        load_perceptual_loss(name)
    assert "\n" not in str(refusal.value)


def test_weights_of_something_else_are_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(1, 1, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="neither VGG-16 nor ResNet-50"):
        load_perceptual_loss(str(tmp_path / "other.safetensors"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_perceptual_loss(str(tmp_path / "broken.pth"))
    with pytest.raises(UserError, match="or a folder that holds one"):
        load_perceptual_loss(str(tmp_path))
