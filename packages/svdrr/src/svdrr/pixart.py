"""PixArt's public weights in a ViewTransformer of PixArt's shape: which of theirs is which of ours."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from svdrr import hub
from svdrr.errors import InputError
from svdrr.transformer import ViewTransformer

OUTSIDE_BLOCKS = {
    "patch": ["pos_embed.proj"],
    "time_embedding.0": ["adaln_single.emb.timestep_embedder.linear_1"],
    "time_embedding.2": ["adaln_single.emb.timestep_embedder.linear_2"],
    "modulation.1": ["adaln_single.linear"],
    "final_modulation": ["scale_shift_table"],
    "final": ["proj_out"],
}
IN_A_BLOCK = {
    "modulation": ["scale_shift_table"],
    "attention.query": ["attn1.to_q"],
    "attention.key_value": ["attn1.to_k", "attn1.to_v"],
    "attention.out": ["attn1.to_out.0"],
    "cross_attention.query": ["attn2.to_q"],
    "cross_attention.key_value": ["attn2.to_k", "attn2.to_v"],
    "cross_attention.out": ["attn2.to_out.0"],
    "mlp.0": ["ff.net.0.proj"],
    "mlp.2": ["ff.net.2"],
}
"""Our layers, and PixArt's, of which two may be one of ours."""


class Loaded(NamedTuple):
    """new: our parameters that PixArt has none of, left as they were. unused: PixArt's tensors that we have none of."""

    new: list[str]
    unused: list[str]


def load(model: ViewTransformer, init: str) -> Loaded:
    """Puts the weights of a PixArtTransformer2DModel into the model.

    init: its folder, or a hub id or a folder of a pipeline that has it as `transformer`. The source's channels beside
    the noisy latent stay as they are, zero in an untrained model. PixArt's learned variances are left out where the
    model has none. Raises InputError where the weights cannot be had, or are of another shape.
    """
    part = "" if (Path(init) / "config.json").exists() else "transformer"

    def read() -> tuple[PixArtTransformer2DModel, dict]:
        return PixArtTransformer2DModel.from_pretrained(
            init, subfolder=part, local_files_only=True, use_safetensors=True, output_loading_info=True
        )

    try:
        network, found = hub.had(init, [f"transformer/{name}" for name in hub.DIFFUSERS_FILES], read)
    except hub.UNREADABLE as error:
        raise InputError(
            f"no PixArt weights at {init} ({hub.reason(error)}): give --init its folder or hub id"
        ) from error
    if missing := found["missing_keys"]:
        raise InputError(
            f"the weights at {init} lack {len(missing)} of a PixArt's, {missing[0]} among them: get them again"
        )
    theirs = network.state_dict()
    area = model.config.patch_size**2
    ours = mapped(theirs, model.config.num_layers, model.final.out_features // area, area)
    there = model.state_dict()
    wrong = [name for name in ours if name not in there or there[name].shape != ours[name].shape]
    if not ours or wrong:
        raise InputError(f"the weights at {init} are of another shape than this model ({', '.join(wrong[:3])})")
    new = model.load_state_dict(ours, strict=False, assign=True).missing_keys
    used = {name for _, parts in _names(model.config.num_layers) for name in parts}
    unused = [name for name in theirs if name not in used]
    return Loaded(new, unused)


def mapped(theirs: Mapping[str, Tensor], num_layers: int, outputs: int, area: int) -> dict[str, Tensor]:
    """PixArt's tensors by our names and in our shapes. Raises InputError where one is missing.

    outputs: channels, those of the noise before those of the variance. area: latent pixels of a patch.
    """
    ours = {}
    for name, parts in _names(num_layers):
        if missing := set(parts) - theirs.keys():
            raise InputError(f"these are not the weights of a PixArt of {num_layers} layers: no {', '.join(missing)}")
        ours[name] = torch.cat([theirs[part] for part in parts])
    ours["patch.weight"] = ours["patch.weight"].flatten(1)
    for name in ("final.weight", "final.bias"):  # PixArt's outputs are channel by channel within a pixel, ours not
        ours[name] = ours[name].unflatten(0, (area, -1))[:, :outputs].transpose(0, 1).flatten(0, 1)
    return ours


def _names(num_layers: int) -> Iterator[tuple[str, list[str]]]:
    """Our tensors' names, each with PixArt's."""
    layers = dict(OUTSIDE_BLOCKS)
    for index in range(num_layers):
        for ours, theirs in IN_A_BLOCK.items():
            layers[f"blocks.{index}.{ours}"] = [f"transformer_blocks.{index}.{part}" for part in theirs]
    for ours, theirs in layers.items():
        ends = [""] if ours.endswith("modulation") else [".weight", ".bias"]
        for end in ends:
            yield ours + end, [part + end for part in theirs]
