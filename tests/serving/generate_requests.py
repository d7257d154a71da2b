"""Requests that several tests make."""

from __future__ import annotations

from typing import Any

from serving.generate_request import GenerateRequest

PROMPT = "A medium-sized red disc moves to the left over a white background."


def request(**asked: Any) -> GenerateRequest:
    """The usual prompt with these fields."""
    return GenerateRequest(**{"prompt": PROMPT, **asked})
