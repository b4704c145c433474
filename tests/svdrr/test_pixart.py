"""The model of the paper is a PixArt: in its size, in its tensors, and in what it computes with PixArt's weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from svdrr import pixart
from svdrr.config import TrainConfig
from svdrr.errors import InputError
from svdrr.presets import svdrr_xl
from svdrr.start import untrained

TINY_SHAPE = {"patch_size": 2, "num_layers": 2, "num_heads": 2, "head_dim": 8}


def pixart_model(in_channels: int, out_channels: int, layers: int = 28, heads: int = 16, head_dim: int = 72, **more):
    return PixArtTransformer2DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        use_additional_conditions=False,
        **more,
    )


@pytest.fixture
def theirs(tmp_path: Path) -> PixArtTransformer2DModel:
    """A tiny PixArt with learned variances, and with the caption's layers as the public one has them, in `tmp_path`."""
    torch.manual_seed(0)
    model = pixart_model(2, 4, 2, 2, 8, sample_size=16, caption_channels=6, interpolation_scale=0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    return model


@pytest.fixture
def like_the_paper(tiny: TrainConfig) -> TrainConfig:
    """Of two latent channels, as those of `theirs`."""
    return replace(tiny, model=replace(svdrr_xl().model, **TINY_SHAPE, image_embedding=5))


def test_svdrr_xl_has_the_papers_size_and_pixarts_tensors() -> None:
    """604.8 million parameters, tensor by tensor those of diffusers' PixArt with 8 channels in and 8 out."""
    with torch.device("meta"):
        ours = untrained(svdrr_xl())
        reference = pixart_model(8, 8)
    shapes = {name: tensor.shape for name, tensor in pixart.mapped(reference.state_dict(), 28, 8, 4).items()}
    shapes["patch.weight"] = torch.Size([1152, 16])  # PixArt's eight channels are here two layers of four
    shapes["patch_condition.weight"] = torch.Size([1152, 16])
    found = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    own = {"pooled_token.weight", "pooled_token.bias"}
    assert {name: shape for name, shape in found.items() if name not in own} == shapes

    size = sum(tensor.numel() for name, tensor in ours.state_dict().items() if name not in own)
    assert size == sum(parameter.numel() for parameter in reference.parameters())
    assert size / 1e6 == pytest.approx(604.8, abs=0.1)
    assert ours.pooled_token.weight.shape == (1152, 768 + 4)


def test_with_pixarts_weights_it_computes_what_pixart_does(
    theirs: PixArtTransformer2DModel, like_the_paper: TrainConfig, tmp_path: Path
) -> None:
    """At the same token, with the variances and without; 1e-4 of outputs of about 1: products round differently.

    The source beside the noisy latent is silent at first. 16 latent pixels of 128 in the image, so its scale is 1/4.
    """
    like_the_paper = replace(like_the_paper, init=str(tmp_path))
    ours = untrained(like_the_paper)
    without = untrained(replace(like_the_paper, model=replace(like_the_paper.model, learned_variance=False)))
    generator = torch.Generator().manual_seed(1)
    noisy, source = torch.randn(2, 3, 2, 16, 16, generator=generator)
    pose, embedding = torch.randn(3, 4, generator=generator), torch.randn(3, 5, generator=generator)
    rays, timestep = torch.zeros(3, 6, 16, 16), torch.tensor([999, 500, 0])
    with torch.no_grad():
        found = ours(noisy, timestep, source, rays, rays, pose, embedding)
        half = without(noisy, timestep, source, rays, rays, pose, embedding)
        theirs.caption_projection = None
        token = ours.pooled_token(torch.cat([embedding, pose], dim=1))[:, None]
        nothing = {"resolution": None, "aspect_ratio": None}
        expected = theirs(noisy, token, timestep, added_cond_kwargs=nothing).sample
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(half, found[:, :2], atol=1e-6)


def test_says_what_is_new_and_what_is_not_used(
    theirs: PixArtTransformer2DModel, like_the_paper: TrainConfig, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path / "a pipeline/transformer")
    for init in (tmp_path, tmp_path / "a pipeline"):
        words: list[str] = []
        model = untrained(replace(like_the_paper, init=str(init)), words.append)
        (said,) = words
        new, unused = said.split("; not used: ")
        assert "pooled_token.weight" in new
        assert "patch_condition.weight" in new
        assert "blocks" not in said
        assert "caption_projection.linear_1.weight" in unused
        assert not model.patch_condition.weight.any()


def test_other_weights_are_refused(
    theirs: PixArtTransformer2DModel, like_the_paper: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    deeper = replace(like_the_paper, model=replace(like_the_paper.model, num_layers=3))
    wider = replace(like_the_paper, model=replace(like_the_paper.model, num_heads=3))
    for config, init, expected in [
        (like_the_paper, tmp_path / "empty", "no PixArt weights at"),
        (deeper, tmp_path, "not the weights of a PixArt of 3 layers"),
        (wider, tmp_path, "of another shape than this model"),
    ]:
        with pytest.raises(InputError, match=expected):
            untrained(replace(config, init=str(init)))
