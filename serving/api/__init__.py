"""The HTTP side of the server: it reads and writes the job store and files, never a model. Start at `serving.api.app`."""

from serving.api.app import create_app

__all__ = ["create_app"]
