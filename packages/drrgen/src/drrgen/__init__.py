"""Chest CT in, a dense sphere of physically scaled X-ray views out."""

__version__ = "0.1.0"
