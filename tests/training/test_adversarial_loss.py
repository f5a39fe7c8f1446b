"""The adaptive weight by hand, and what each side of the game learns from."""

import pytest
import torch
from accelerate import Accelerator

from adni_ldm.models.autoencoder import ReconstructingVAE, build_autoencoder
from adni_ldm.training.adversarial_loss import Adversary, Discriminator, adaptive_weight


@pytest.fixture
def game():
    """A small autoencoder, its discriminator, and a batch's reconstruction."""
    torch.manual_seed(0)
    model = ReconstructingVAE(build_autoencoder(32, widths=(8, 16)))
    discriminator = Discriminator(width=8)
    last_layer = model.vae.decoder.conv_out.weight
    adversary = Adversary(Accelerator(cpu=True), discriminator, discriminator, last_layer, weight=0.5)
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    return model, discriminator, adversary, images


def reconstruct(model, images):
    reconstruction, _, _ = model(images, torch.zeros(len(images), 4, 16, 16))
    return reconstruction, (reconstruction - images).abs().mean()


def test_the_weight_by_hand():
    three_four_five, two = torch.tensor([3.0, -4.0]), torch.tensor([[2.0]])
    assert adaptive_weight(three_four_five, two).item() == pytest.approx(5 / 2)
    assert adaptive_weight(three_four_five, 0 * two, delta=0.5).item() == pytest.approx(10)
    assert adaptive_weight(three_four_five, 0 * two).item() == pytest.approx(1e4), "at most"


def test_the_weighted_gradient_at_the_last_layer_is_the_share_asked_for(game):
    """λ makes the two gradients equally long; --discriminator_weight 0.5 is half of that."""
    model, discriminator, adversary, images = game
    last_layer = model.vae.decoder.conv_out.weight
    reconstruction, likeness = reconstruct(model, images)
    fooling, _ = adversary.losses(images, reconstruction, likeness)
    assert fooling.item() == 0, "nothing is known before the first update"
    adversary.end_update(1.0)
    fooled = (discriminator(reconstruct(model, images)[0]) - 1).square().mean()
    by_hand = torch.autograd.grad(fooled, last_layer)[0].norm()
    by_hand = torch.autograd.grad(likeness, last_layer, retain_graph=True)[0].norm() / by_hand
    assert discriminator.balance.item() == pytest.approx(by_hand.item(), rel=1e-4)

    reconstruction, likeness = reconstruct(model, images)
    fooling, _ = adversary.losses(images, reconstruction, likeness)
    lengths = [
        torch.autograd.grad(one, last_layer, retain_graph=True)[0].norm() for one in (fooling, likeness)
    ]
    assert (lengths[0] / lengths[1]).item() == pytest.approx(0.5, rel=1e-3)


def test_each_side_learns_from_its_own_loss_alone(game):
    model, discriminator, adversary, images = game
    discriminator.balance.fill_(1.0)
    reconstruction, likeness = reconstruct(model, images)
    fooling, telling = adversary.losses(images, reconstruction, likeness)
    fooling.backward(retain_graph=True)
    assert all(weight.grad is None for weight in discriminator.parameters())
    assert model.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    model.zero_grad()
    telling.backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in discriminator.parameters())


def test_the_discriminator_learns_to_tell(game):
    model, discriminator, adversary, images = game
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    with torch.no_grad():
        reconstruction = reconstruct(model, images)[0]
    for _ in range(60):
        drawn = reconstruction.clone().requires_grad_()
        adversary.last_layer = drawn
        _, telling = adversary.losses(images, drawn, drawn.square().mean())
        optimizer.zero_grad()
        telling.backward()
        optimizer.step()
    assert discriminator(images).mean() > 0.8 and discriminator(reconstruction).mean() < 0.2


def test_a_score_does_not_depend_on_the_rest_of_the_batch(game):
    _, discriminator, _, images = game
    assert torch.allclose(discriminator(images)[:1], discriminator(images[:1]), atol=1e-6)


def test_a_batch_that_is_not_finite_leaves_the_weight(game):
    model, discriminator, adversary, images = game
    discriminator.balance.fill_(2.0)
    reconstruction, likeness = reconstruct(model, images)
    adversary.losses(images, reconstruction, likeness * torch.nan)
    adversary.end_update(1.0)
    assert discriminator.balance.item() == 2.0
