"""One X-ray in, the view from any other direction out: SV-DRR, trained and sampled."""

__version__ = "0.1.0"
