"""The command ``serve``."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from polyprag.cli.common import AsJson, StorePath, check_store, err, print_json, say
from polyprag.cli.corpus import Attention, Device, Dtype
from polyprag.cli.model import AskModel


def serve(
    store: StorePath,
    host: Annotated[
        str, typer.Option(help="Address to listen at; the default can be reached from this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes any that is free.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model in requests. Default: the store's, without its suffix."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Answers that are decoded together, each with its own route.")
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Answers that may wait for a place; more are refused with 429.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that may be asked for.")] = 512,
    max_cached_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Answers in the batch times the longest of them, with its prompt: bounds their memory.",
        ),
    ] = 65_536,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1_048_576,
    timeout: Annotated[float, typer.Option(help="Seconds of one answer, waiting included.")] = 120.0,
    grace: Annotated[
        float, typer.Option(help="Seconds that running answers have when the server is told to stop.")
    ] = 30.0,
    poll: Annotated[
        float,
        typer.Option(help="Seconds between two looks for a newer generation; 0: only on SIGHUP."),
    ] = 5.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key that requests have to give. Default: the environment variable "
            "`POLYPRAG_API_KEY`; without either, none is needed.",
            readable=False,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name under which the server may be asked, besides localhost and addresses in numbers; "
            "may be given often, `*` for any."
        ),
    ] = None,
    model: AskModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    allow_base_mismatch: Annotated[
        bool, typer.Option(help="Serve although the weights of the base model differ from the store's.")
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(case_sensitive=False, help="What is logged: this and what is worse."),
    ] = "info",
    as_json: AsJson = False,
) -> None:
    """Serve a store over HTTP, as OpenAI's chat completions; `/health` and `/metrics` too.

    Each question is answered with its own route, many in one batch. New generations of the store are taken
    over while answers run. SIGTERM and Ctrl-C let them come to their end.

    Example: `polyprag serve wiki.polyprag --port 8000`
    """
    check_store(store)
    from polyprag.serving import ServeSettings, api_key
    from polyprag.serving import serve as run

    key = api_key(api_key_file)
    if key is None and not _loopback(host):
        say(f"Whoever reaches {host} can ask: set POLYPRAG_API_KEY to want a key", "yellow", err)
    settings = ServeSettings(
        name=name,
        max_batch=max_batch,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        max_body=max_body,
        max_cached_tokens=max_cached_tokens,
        timeout=timeout,
        grace=grace,
        poll=poll,
        api_key=key,
        allowed_hosts=tuple(allowed_host or ()),
    )

    def ready(url: str) -> None:
        if as_json:
            print_json({"url": url, "store": str(store)})
        else:
            say(f"Serving {store} at {url}")
        sys.stdout.flush()  # whoever started this may be waiting for the line

    run(
        store,
        model,
        settings,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        attention=attention,
        allow_base_mismatch=allow_base_mismatch,
        log_level=log_level,
        ready=ready,
    )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
