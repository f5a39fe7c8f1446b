"""The adaptive weight, computed by hand, and the gradients of generator and discriminator."""

import pytest
import torch
from accelerate import Accelerator

from adni_ldm.models.autoencoder import ReconstructingVAE, build_autoencoder
from adni_ldm.training.adversarial_loss import AdversarialLoss, PatchDiscriminator, adaptive_weight


@pytest.fixture
def game():
    """A small autoencoder, its discriminator, and a batch's reconstruction."""
    torch.manual_seed(0)
    model = ReconstructingVAE(build_autoencoder(32, widths=(8, 16)))
    discriminator = PatchDiscriminator(width=8)
    last_layer = model.vae.decoder.conv_out.weight
    adversarial_loss = AdversarialLoss(
        Accelerator(cpu=True), discriminator, discriminator, last_layer, weight=0.5
    )
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    return model, discriminator, adversarial_loss, images


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
    model, discriminator, adversarial_loss, images = game
    last_layer = model.vae.decoder.conv_out.weight
    reconstruction, rec_loss = reconstruct(model, images)
    g_loss, _ = adversarial_loss(images, reconstruction, rec_loss)
    assert g_loss.item() == 0, "nothing is known before the first update"
    adversarial_loss.end_update()
    fooled = (discriminator(reconstruct(model, images)[0]) - 1).square().mean()
    by_hand = torch.autograd.grad(fooled, last_layer)[0].norm()
    by_hand = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)[0].norm() / by_hand
    assert discriminator.d_weight.item() == pytest.approx(by_hand.item(), rel=1e-4)

    reconstruction, rec_loss = reconstruct(model, images)
    g_loss, _ = adversarial_loss(images, reconstruction, rec_loss)
    lengths = [
        torch.autograd.grad(one, last_layer, retain_graph=True)[0].norm() for one in (g_loss, rec_loss)
    ]
    assert (lengths[0] / lengths[1]).item() == pytest.approx(0.5, rel=1e-3)


def test_each_side_learns_from_its_own_loss_alone(game):
    model, discriminator, adversarial_loss, images = game
    discriminator.d_weight.fill_(1.0)
    reconstruction, rec_loss = reconstruct(model, images)
    g_loss, d_loss = adversarial_loss(images, reconstruction, rec_loss)
    g_loss.backward(retain_graph=True)
    assert all(weight.grad is None for weight in discriminator.parameters())
    assert model.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    model.zero_grad()
    d_loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in discriminator.parameters())


def test_the_discriminator_learns_to_tell(game):
    model, discriminator, adversarial_loss, images = game
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    with torch.no_grad():
        reconstruction = reconstruct(model, images)[0]
    for _ in range(60):
        drawn = reconstruction.clone().requires_grad_()
        adversarial_loss.last_layer = drawn
        _, d_loss = adversarial_loss(images, drawn, drawn.square().mean())
        optimizer.zero_grad()
        d_loss.backward()
        optimizer.step()
    assert discriminator(images).mean() > 0.8 and discriminator(reconstruction).mean() < 0.2


def test_a_score_does_not_depend_on_the_rest_of_the_batch(game):
    _, discriminator, _, images = game
    assert torch.allclose(discriminator(images)[:1], discriminator(images[:1]), atol=1e-6)


def test_a_batch_that_is_not_finite_leaves_the_weight(game):
    model, discriminator, adversarial_loss, images = game
    discriminator.d_weight.fill_(2.0)
    reconstruction, rec_loss = reconstruct(model, images)
    adversarial_loss(images, reconstruction, rec_loss * torch.nan)
    adversarial_loss.end_update()
    assert discriminator.d_weight.item() == 2.0
