"""Why a model could not be had from a folder or from the Hub, in words for one line."""

from huggingface_hub.errors import LocalEntryNotFoundError


def reason(error: Exception) -> str:
    """The first sentence of what diffusers or transformers say, but where it hides that the Hub was out of reach."""
    if isinstance(error.__context__, LocalEntryNotFoundError):
        return "the Hub is out of reach, and its cache on this machine has none"
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
