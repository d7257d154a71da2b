"""The library that the four planes share. It never imports Ray and does nothing at import."""

__version__ = "0.1.0"
