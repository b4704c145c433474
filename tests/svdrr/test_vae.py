"""The autoencoder's scale, its loss, and its digest."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from svdrr import vae as autoencoder


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return autoencoder.build(latent_channels=2, block_channels=(4, 8), layers_per_block=1)


@pytest.fixture
def line_integrals() -> torch.Tensor:
    return 8 * torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_latents_are_measured_to_mean_0_and_deviation_1(vae: AutoencoderKL, line_integrals: torch.Tensor) -> None:
    with torch.no_grad():
        autoencoder.measure_latents(vae, line_integrals.split(3))
        latents = autoencoder.encode(vae, line_integrals)
    assert latents.shape == (4, 2, 8, 8)
    assert latents.mean().item() == pytest.approx(0, abs=1e-5)
    assert latents.std().item() == pytest.approx(1, abs=1e-5)


def test_decode_undoes_the_normalisation_and_gives_no_negative_line_integral(vae: AutoencoderKL) -> None:
    latents = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = autoencoder.decode(vae, latents)
        vae.register_to_config(scaling_factor=0.25, shift_factor=3.0)
        again = autoencoder.decode(vae, (latents - 3) * 0.25)
    assert torch.allclose(plain, again, atol=1e-4)  # rounding of (x - 3) / 4 * 4 + 3, amplified by the decoder
    assert plain.min() >= 0


def test_the_loss_falls_in_a_few_steps(vae: AutoencoderKL) -> None:
    image = torch.linspace(0, 8, 16).expand(2, 1, 16, 16)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        loss = autoencoder.loss(vae, image, 1e-6, torch.Generator().manual_seed(step)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_digest_survives_saving_and_changes_with_weights_and_scale(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.register_to_config(scaling_factor=0.1234567890123456)
    vae.save_pretrained(tmp_path)
    digest = autoencoder.digest(vae)
    assert autoencoder.digest(AutoencoderKL.from_pretrained(tmp_path)) == digest
    vae.register_to_config(shift_factor=0.1)
    assert autoencoder.digest(vae) != digest
    vae.register_to_config(shift_factor=0.0)
    assert autoencoder.digest(vae) == digest
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-6
    assert autoencoder.digest(vae) != digest
