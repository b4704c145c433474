"""The autoencoder's scale, its loss, its digest, and those that others trained."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import load_file, save_file

from svdrr import vae as autoencoder
from svdrr.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


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


def test_an_autoencoder_without_latents_is_refused(vae: AutoencoderKL, line_integrals: torch.Tensor) -> None:
    for value in (0.0, float("nan")):
        for parameter in vae.requires_grad_(False).parameters():
            parameter.fill_(value)
        with pytest.raises(InputError, match="a standard deviation of"):
            autoencoder.measure_latents(vae, [line_integrals])


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
        generator = torch.Generator().manual_seed(step)
        loss = autoencoder.loss(vae, image, 1e-6, 1.0, 0.0, generator, 2, slice(2)).mean()
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


def test_the_loss_follows_its_generator_and_a_weight_of_0_leaves_its_term_out(
    vae: AutoencoderKL, line_integrals: torch.Tensor
) -> None:
    def loss(gradient: float, equivariance: float, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return autoencoder.loss(vae, line_integrals, 1e-6, gradient, equivariance, generator, 4, slice(4)).detach()

    assert loss(1, 1).shape == (4,)
    assert torch.equal(loss(1, 1), loss(1, 1))
    assert not torch.equal(loss(1, 1), loss(1, 1, seed=1))
    assert (loss(0, 0) < loss(1, 0)).all()
    assert (loss(1, 0) < loss(1, 1)).all()
    extra = loss(1, 1) - loss(1, 0)
    assert torch.allclose(loss(1, 2) - loss(1, 0), 2 * extra, atol=1e-5)  # float32 at a loss of a few


def test_the_error_of_differences_ignores_constants(line_integrals: torch.Tensor) -> None:
    """What is added everywhere has no differences, so that their weight does not matter; a ramp of slope 1 has."""
    for weight in (0.0, 1.0, 50.0):
        moved = autoencoder.image_error(line_integrals + 0.25, line_integrals, weight)
        assert torch.allclose(moved, torch.full((4,), 0.25), atol=1e-5)  # rounding of 8 + 0.25, times 50
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    assert autoencoder.image_error(ramp, torch.zeros(1), 3.0).item() == 7.5 + 3
    assert autoencoder.image_error(ramp.mT, torch.zeros(1), 3.0).item() == 7.5 + 3


def test_equivariance_is_zero_for_what_is_equivariant(line_integrals: torch.Tensor) -> None:
    """Pixel for pixel and linear, it commutes with every turn and average; adding a ramp does not."""
    ramp = torch.arange(16.0)
    sides, ramps_seen = set(), []

    def affine(latents: torch.Tensor) -> torch.Tensor:
        sides.add(latents.shape[-1])
        return 2 * latents - 3

    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        error = autoencoder.equivariance(affine, (line_integrals + 3) / 2, line_integrals, 1.0, generator)
        assert error.shape == (4,)
        assert error.max() < 1e-5  # rounding of numbers up to 8
        with_ramp = autoencoder.equivariance(
            lambda latents: latents + ramp[: latents.shape[-1]], line_integrals - ramp, line_integrals, 0.0, generator
        )
        ramps_seen.append(with_ramp.min())
    assert max(ramps_seen) > 1
    assert min(sides) >= 4
    assert len(sides) > 5


def test_an_image_is_changed_as_a_turned_detector_with_larger_pixels_sees_it(line_integrals: torch.Tensor) -> None:
    changed = autoencoder.changed
    assert torch.equal(changed(line_integrals, 1, 16), line_integrals.rot90(1, (-2, -1)))
    halved = torch.nn.functional.avg_pool2d(line_integrals, 2)
    assert torch.allclose(changed(line_integrals, 0, 8), halved, atol=1e-5)  # sums in another order
    for side in range(1, 17):
        seen = changed(line_integrals, side % 4, side)
        assert torch.allclose(seen.mean(dim=(1, 2, 3)), line_integrals.mean(dim=(1, 2, 3)), atol=1e-5)
        assert torch.allclose(changed(torch.ones(1, 1, 16, 16), side % 4, side), torch.ones(side, side), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_that_others_trained_is_read_and_sees_grey(
    channels: int, line_integrals: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = AutoencoderKL(channels, channels, block_out_channels=(8,), latent_channels=2, norm_num_groups=2).eval()
    theirs.save_pretrained(tmp_path)
    vae = autoencoder.load(str(tmp_path))
    assert autoencoder.digest(vae) == autoencoder.digest(theirs)
    with torch.no_grad():
        autoencoder.measure_latents(vae, line_integrals.split(2))
        latents = autoencoder.encode(vae, line_integrals)
        assert (latents.mean().abs(), latents.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
        grey = (line_integrals / 4 - 1).repeat(1, channels, 1, 1)
        plain = theirs.encode(grey).latent_dist.mean
        images = (theirs.decode(plain).sample.mean(dim=1, keepdim=True) + 1) * 4
        # rounding of the scale and back, amplified by the decoder
        assert torch.allclose(autoencoder.decode(vae, latents), images.clamp(min=0), atol=1e-3)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # what diffusers gives the Hub
def test_what_the_hubs_cache_has_is_taken_from_there_and_no_network_is_asked(
    vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as huggingface_hub lays it out; at the address of the Hub nobody answers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    vae.save_pretrained(tmp_path / f"models--somebody--theirs/snapshots/{40 * '0'}")
    (tmp_path / "models--somebody--theirs/refs").mkdir()
    (tmp_path / "models--somebody--theirs/refs/main").write_text(40 * "0")
    assert autoencoder.digest(autoencoder.load("somebody/theirs")) == autoencoder.digest(vae)


def test_one_that_cannot_be_used_is_refused_in_one_line(vae: AutoencoderKL, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    vae.save_pretrained(whole)
    weights = load_file(whole / WEIGHTS)

    def like(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
        return folder

    torch.save(weights, like("pickled") / "diffusion_pytorch_model.bin")
    (like("cut") / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes()[:-100])
    save_file(dict(list(weights.items())[1:]), like("partial") / WEIGHTS)
    save_file({**weights, "encoder.conv_in.bias": torch.zeros(5)}, like("other shape") / WEIGHTS)
    (like("no json") / "config.json").write_text("{")
    UNet2DModel(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                norm_num_groups=2).save_pretrained(tmp_path / "unet")  # fmt: skip
    AutoencoderKL(4, 4, block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "colours")
    (tmp_path / "empty").mkdir()

    for name, words in {
        "pickled": "cannot be read", "cut": "cannot be read", "other shape": "cannot be read",
        "no json": "cannot be read", "empty": "cannot be read", "not/there/at/all": "cannot be read",
        "partial": "lacks 1 of its weights", "unet": "of the kind UNet2DModel", "colours": "4 image channels",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=words) as refused:
            autoencoder.load(str(tmp_path / name))
        assert "\n" not in str(refused.value), name
        assert str(refused.value).startswith(f"--vae {tmp_path / name} ")
