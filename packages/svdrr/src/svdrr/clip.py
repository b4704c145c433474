"""What a frozen CLIP sees of a view: one vector for the whole image, which SV-DRR tells its model of the source.

The network is that of `transformers`, the extra `svdrr[clip]`, which is imported only when one is loaded.
"""

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from svdrr import hub
from svdrr.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

WHITE = 8.0
"""The line integral that is white, and black is 0: a fixed scale, that of the autoencoder, and never the image's own,
so that the vector says how much a patient attenuates. Bone is bright, as in the films that CLIP may have seen; what is
beyond white, as in some lateral views, is clipped, for no photograph goes on there."""

FILES = ("config.json", "model.safetensors*", "model-*.safetensors")
"""Of an encoder on the Hub."""

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the colours of CLIP's training images."""


def load(name: str) -> "CLIPVisionModelWithProjection":
    """A CLIP's image encoder with its projection, in float32, from a folder or from the Hub by its id.

    Raises InputError where `transformers` is missing, or where there is none in whole safetensors.
    """
    try:
        from transformers import CLIPVisionModelWithProjection
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(f"the image encoder {name} needs transformers: pip install 'svdrr[clip]'") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or it lists all weights of the text's half, which we do without

    def read() -> "tuple[CLIPVisionModelWithProjection, dict]":
        return CLIPVisionModelWithProjection.from_pretrained(
            name, local_files_only=True, use_safetensors=True, output_loading_info=True
        )

    try:
        encoder, found = hub.had(name, FILES, read)
    except hub.UNREADABLE as error:
        raise InputError(
            f"the image encoder {name} cannot be read ({hub.reason(error)}): put a CLIP with its "
            "model.safetensors there, or into the Hub's cache"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"the image encoder {name} lacks {len(missing)} of a CLIP's weights, {missing[0]} among them")
    return encoder.float().requires_grad_(False).eval()


def embed(encoder: "CLIPVisionModelWithProjection", line_integrals: Tensor) -> Tensor:
    """Line integrals [B, 1, N, N] to embeddings [B, E], as CLIP's projection gives them, not normalised."""
    side = encoder.config.image_size
    grey = (line_integrals / WHITE).clamp(0, 1)
    grey = functional.interpolate(grey, (side, side), mode="bicubic", antialias=True).clamp(0, 1)  # it overshoots
    mean, deviation = (grey.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return encoder(pixel_values=(grey - mean) / deviation).image_embeds


def digest(encoder: "CLIPVisionModelWithProjection") -> str:
    """SHA-256 of everything that decides the embeddings: weights and what is done with them."""
    config = encoder.config
    settings = (config.image_size, config.num_attention_heads, config.hidden_act, config.layer_norm_eps)
    return hub.digest(settings, encoder)
