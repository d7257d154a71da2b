"""Serving: the cascade (rewrite, base, refine, decode) behind HTTP on Ray Serve (Waver §2.2, §4.5, §4.6)."""
