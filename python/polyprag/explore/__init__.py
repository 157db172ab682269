"""A page on this machine that shows what happens between a question and its answer."""

from polyprag.explore.server import Explorer, open_server

__all__ = ["Explorer", "open_server"]
