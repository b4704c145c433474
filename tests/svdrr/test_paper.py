"""The paper's model, as small as can be: it trains, goes on bit for bit, is saved with its CLIP, and samples."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from svdrr import clip, radiograph
from svdrr import vae as autoencoder
from svdrr.checkpoint import load, newest
from svdrr.config import TrainConfig
from svdrr.data import draw_augmentations, draw_pairs, encode_batch, read_batch
from svdrr.errors import InputError
from svdrr.latents import cached
from svdrr.pipeline import SVDRRPipeline
from svdrr.presets import svdrr_xl
from svdrr.sample import sample
from svdrr.shards import open_folder
from svdrr.start import untrained
from svdrr.train import train

transformers = pytest.importorskip("transformers", reason="the extra svdrr[clip] is not installed")

EMBEDDING, SIDE = 6, 16


@pytest.fixture
def encoder(tmp_path: Path) -> torch.nn.Module:
    """A random CLIP of one layer that sees 16 pixels; in `tmp_path / clip`."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, projection_dim=EMBEDDING, num_hidden_layers=1, num_attention_heads=2,
        image_size=SIDE, patch_size=8,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    return clip.load(str(tmp_path / "clip"))


@pytest.fixture
def paper(tiny: TrainConfig, encoder: torch.nn.Module, tmp_path: Path) -> TrainConfig:
    """The preset svdrr-xl, but for its size, its steps, and where its frozen parts come from."""
    torch.manual_seed(1)
    AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8), latent_channels=2, norm_num_groups=2,
        scaling_factor=0.13025,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    config = svdrr_xl()
    return replace(
        config,
        vae=replace(config.vae, latent_channels=2, batch=32, default=str(tmp_path / "vae")),
        model=replace(config.model, num_layers=2, num_heads=2, head_dim=8, image_embedding=EMBEDDING),
        stages=tuple(
            replace(stage, size=size, batch=2, steps=steps, learning_rate=1e-3)
            for stage, size, steps in zip(config.stages[:2], (16, 32), (2, 1), strict=True)
        ),
        image_encoder=str(tmp_path / "clip"),
        mixed_precision="no",
        drop_source=0.2,
        drop_stream=0.2,
        warmup_steps=1,
        log_every=1,
        validate_every=3,
        sample_every=3,
        validation_pairs=2,
        checkpoint_every=1,
        keep_checkpoints=10,
    )


def test_trains_goes_on_bit_for_bit_is_saved_and_samples(
    paper: TrainConfig, make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(patients=3)
    run, unbroken, stops = tmp_path / "run", train(paper, shards, tmp_path / "unbroken"), 0
    while not (run / "model").is_dir():
        train(paper, shards, run, max_minutes=0)
        stops += 1
    assert stops > 3
    for part, name in (("transformer", "diffusion_pytorch_model"), ("image_encoder", "model")):
        ours, theirs = (load_file(folder / f"model/{part}/{name}.safetensors") for folder in (run, unbroken))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []

    record = json.loads((run / "config.json").read_text())["config"]
    assert record["image_encoder_digest"] == clip.digest(clip.load(str(tmp_path / "clip")))
    assert json.loads((run / "vae/config.json").read_text())["scaling_factor"] == 0.13025  # its own, not measured
    lines = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines if "learning_rate" in line] == 3 * [1e-3]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)

    pipeline = SVDRRPipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.guidance_scale == 3
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    source = torch.from_numpy(open_folder(shards)[0].images(32, [3]))[None]

    def sampled(**settings: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(source, (0, 0), [(30, 10), (90, 0)], generator=generator, **settings).line_integrals

    views = sampled()
    assert views.shape == (2, 1, 32, 32)
    assert views.isfinite().all()
    assert len(pipeline.scheduler.timesteps) == 20
    assert torch.equal(views, sampled(image_embedding=clip.embed(pipeline.image_encoder, source), guidance_scale=3.0))
    assert not torch.equal(views, sampled(image_embedding=torch.zeros(1, EMBEDDING)))

    radiograph.write_png(tmp_path / "x.png", source[0, 0].numpy(), {})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"has parts of transformers, .*: pip install 'svdrr\[clip\]'"):
        sample(tmp_path / "x.png", (30, 0), (0, 0), run, 0, 1, tmp_path / "y.png")


def test_the_average_is_the_weights_and_the_token_learns_ten_times_as_fast(
    paper: TrainConfig, shards: Path, tmp_path: Path
) -> None:
    """In its first step with a gradient Adam moves a weight by its rate, whatever the gradient.

    That is the second one, for the last layer begins at zero. 1 % is for the smallest gradients.
    """
    run = train(replace(paper, stages=(replace(paper.stages[0], steps=2),)), shards, tmp_path / "run")
    state, start = load(newest(run / "checkpoints")), untrained(paper).state_dict()
    weights = state.part("model")
    assert all(torch.equal(value, weights[name]) for name, value in state.part("ema").items())
    moved = {name: (value - start[name]).abs().max().item() for name, value in weights.items()}
    assert moved["pooled_token.bias"] == pytest.approx(10 * moved["blocks.1.mlp.2.bias"], rel=0.01)


@pytest.mark.parametrize("augmented", [0.0, 0.5])
def test_a_source_has_its_embedding_from_the_cache_or_made_anew(
    encoder: torch.nn.Module, shards: Path, tmp_path: Path, augmented: float
) -> None:
    """What is augmented is embedded as it then looks; 2^-11 is half a unit of the cache's 16 bits."""
    opened, pairs = open_folder(shards)[:3], draw_pairs(open_folder(shards)[:3], 6, 0.0, seed=3)

    def embed(images: torch.Tensor) -> torch.Tensor:
        return clip.embed(encoder, images)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return images[..., ::4, ::4]

    def embeddings(reader: Callable | None) -> torch.Tensor:
        read = read_batch(opened, reader, pairs, draw_augmentations(6, augmented, seed=4), 32, 8)
        batch = encode_batch(read, encode, 32, True, torch.device("cpu"), embed)
        return batch.condition["image_embedding"]

    kept = embeddings(cached(opened, 32, encode, "both", tmp_path, embed=embed))
    fresh = embeddings(None)
    assert torch.allclose(kept, fresh, rtol=2**-11, atol=1e-5)
    plain = torch.cat(
        [
            embed(torch.from_numpy(opened[s].images(32, [v]))[None])
            for s, v in zip(pairs.shard, pairs.source, strict=True)
        ]
    )
    chosen = [rng is not None for rng in draw_augmentations(6, augmented, seed=4)]
    assert 0 < sum(chosen) < 6 or not augmented
    assert [not torch.allclose(*rows, atol=1e-4) for rows in zip(fresh, plain, strict=True)] == chosen


def test_clip_sees_grey_on_a_fixed_scale_as_its_own_preparation_makes_it(encoder: torch.nn.Module) -> None:
    """Against Pillow's bicubic, with which CLIP was trained; it weighs pixels with 1e-4, deviations are 0.26."""
    p = 10 * torch.rand(1, 1, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    encoder.register_forward_pre_hook(lambda _, __, named: seen.append(named["pixel_values"]), with_kwargs=True)
    clip.embed(encoder, p)
    values = (p / 8).clamp(0, 1)[0, 0].numpy()
    mean, deviation = np.reshape(clip.MEAN, (3, 1, 1)), np.reshape(clip.DEVIATION, (3, 1, 1))
    small = np.asarray(Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 1)
    assert np.allclose(seen[0][0].numpy(), (small - mean) / deviation, atol=1e-3)
    assert torch.equal(clip.embed(encoder, p + 8), clip.embed(encoder, p + 9))


def test_of_a_whole_clip_it_is_the_half_that_sees(tmp_path: Path) -> None:
    """As the Hub has it, with its text's half, and in 16 bits; the embedding is that of the whole."""
    half = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    half["projection_dim"] = EMBEDDING
    text = {**half, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**half, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING)
    whole = transformers.CLIPModel(config).half()
    whole.save_pretrained(tmp_path)
    encoder, seen = clip.load(str(tmp_path)), []
    encoder.register_forward_pre_hook(lambda _, __, named: seen.append(named["pixel_values"]), with_kwargs=True)
    found = clip.embed(encoder, 8 * torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
    whole = whole.float().eval()
    with torch.no_grad():
        expected = whole.visual_projection(whole.vision_model(seen[0]).pooler_output)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6)
    assert expected.abs().max() > 0.1


def test_embeddings_of_another_encoder_are_never_found(
    paper: TrainConfig, encoder: torch.nn.Module, shards: Path, tmp_path: Path
) -> None:
    before = clip.digest(encoder)
    with torch.no_grad():
        encoder.visual_projection.weight += 1
    assert clip.digest(encoder) != before
    run = train(paper, shards, tmp_path / "run", max_minutes=0)
    encoder.save_pretrained(tmp_path / "clip")
    with pytest.raises(InputError, match=rf"its image_encoder_digest is {before}, not .*: give another --out"):
        train(paper, shards, run)


def test_an_encoder_that_cannot_be_used_is_refused_in_one_line_before_anything_is_written(
    paper: TrainConfig, shards: Path, tmp_path: Path
) -> None:
    weights = load_file(tmp_path / "clip/model.safetensors")
    for name in ("cut", "partial", "pickled"):
        transformers.CLIPVisionConfig.from_pretrained(tmp_path / "clip").save_pretrained(tmp_path / name)
    (tmp_path / "cut/model.safetensors").write_bytes((tmp_path / "clip/model.safetensors").read_bytes()[:-100])
    save_file(dict(list(weights.items())[1:]), tmp_path / "partial/model.safetensors", {"format": "pt"})
    torch.save(weights, tmp_path / "pickled/pytorch_model.bin")
    wider = replace(paper.model, image_embedding=EMBEDDING + 1)
    for config, words in [
        (replace(paper, image_encoder=str(tmp_path / "nowhere")), "nowhere cannot be read"),
        (replace(paper, image_encoder=str(tmp_path / "cut")), "cut cannot be read"),
        (replace(paper, image_encoder=str(tmp_path / "pickled")), "pickled cannot be read"),
        (replace(paper, image_encoder=str(tmp_path / "partial")), "partial lacks 1 of a CLIP's weights"),
        (replace(paper, model=wider), "clip makes 6 numbers, and the model of svdrr-xl wants 7"),
        (replace(paper, image_encoder=None), "wants an image_embedding, and no image_encoder makes one"),
    ]:
        with pytest.raises(InputError, match=words) as refused:
            train(config, shards, tmp_path / "run")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # what diffusers gives the Hub
def test_without_a_network_it_is_one_line(paper: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name that no cache has; offline by the Hub's own switch, so that nobody waits for a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for fetch in (autoencoder.load, clip.load, lambda name: untrained(replace(paper, init=name))):
        with pytest.raises(InputError, match=r"nobody/has-this .*\(the Hub is out of reach, and its cache .*\)"):
            fetch("nobody/has-this")


def test_what_comes_from_the_hub_is_said_before_it_is_fetched(
    paper: TrainConfig, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the image encoder nobody/has-this cannot be read"):
        train(replace(paper, image_encoder="nobody/has-this"), shards, tmp_path / "run")
    assert "from the Hub, or its cache on this machine: nobody/has-this\n" in capsys.readouterr().err


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers: pip install 'svdrr\[clip\]'"):
        clip.load("openai/clip-vit-large-patch14")


def test_a_pipeline_wants_the_encoder_that_fits(paper: TrainConfig, encoder: torch.nn.Module, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    other = untrained(replace(paper, model=replace(paper.model, image_embedding=EMBEDDING + 1)))
    with pytest.raises(InputError, match="an image_embedding of 7 numbers, and this image_encoder makes 6"):
        SVDRRPipeline(vae, other, None, image_encoder=encoder)
