"""A store behind an OpenAI-compatible HTTP endpoint: each request its own route, all in one batch."""

from polyprag.serving.app import ServeSettings, create_app
from polyprag.serving.server import api_key, serve

__all__ = ["ServeSettings", "api_key", "create_app", "serve"]
