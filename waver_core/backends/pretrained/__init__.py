"""Backends that load weights: imported lazily, one file each."""
