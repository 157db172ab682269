"""The command ``explore``."""

from __future__ import annotations

import sys
import webbrowser
from contextlib import ExitStack
from typing import Annotated

import typer

from polyprag._polyprag import Store
from polyprag.cli.common import AsJson, StorePath, err, print_json, say
from polyprag.cli.corpus import Attention, Device, Dtype
from polyprag.cli.model import AskModel
from polyprag.errors import BaseModelMissing
from polyprag.extras import remedied


def explore(
    store: StorePath,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes one that is free.")
    ] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    answers: Annotated[
        bool, typer.Option(help="Load the base model and answer; without, documents and routes alone.")
    ] = True,
    model: AskModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    as_json: AsJson = False,
) -> None:
    """Open a page on this machine: ask, and see documents, weights, experts, and both answers.

    The page is for this machine alone. Ctrl-C ends it.

    Example: `polyprag explore wiki.polyprag`

    Example: `polyprag explore wiki.polyprag --no-answers --no-browser --port 8321`
    """
    from polyprag.explore import Explorer, open_server

    with ExitStack() as stack:
        opened = stack.enter_context(Store.open(store))
        engine, why = None, None if answers else "answers are off (--no-answers)"
        # Before a model is loaded, so that a port that is taken is told at once.
        server = stack.enter_context(open_server(Explorer(opened, None, why), port))
        if answers:
            try:
                from polyprag.engine import Engine

                opening = Engine.open(opened, model, device=device, dtype=dtype, attention=attention)
                engine = stack.enter_context(opening)
            except (BaseModelMissing, ImportError) as error:
                if model is not None:
                    raise
                reason = remedied(error) if isinstance(error, ImportError) else str(error)
                why = f"no answers: {' '.join(reason.split())}"
                say(f"Documents and routes alone; {why}", "yellow", err)
        server.explorer = Explorer(opened, engine, why)
        stack.callback(server.explorer.close)
        if as_json:
            print_json({"url": server.url, "store": str(store), "answers": engine is not None})
        else:
            say(f"{server.url} shows {store}; Ctrl-C ends it")
        sys.stdout.flush()  # whoever started this may be waiting for the line
        if browser:
            webbrowser.open(server.url)
        server.serve_forever()
