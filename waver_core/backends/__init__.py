"""Implementations of the capabilities in `contracts`: `embedded` needs no weights, `pretrained` loads real models."""
