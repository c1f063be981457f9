"""A model over HTTP: `python -m bm_jax.serve RUN_OR_MODEL_DIR --port 8000`, with OpenAI's API and a page to try it.

    POST /v1/completions, /v1/chat/completions (where the model has a chat template)
    GET  /v1/models, /healthz, /metrics, and / for the page

The line that says where it listens goes to standard output once the model is loaded and compiled; everything else to
standard error. SIGINT or SIGTERM end it: what runs may finish first, see `--shutdown-seconds`. The exit status is 0
then, 1 after an error in the directory or the address, 2 after one in the command line. Needs the `serve` extra.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bm_jax.config import ConfigError
from bm_jax.server.request_fields import Limits

if TYPE_CHECKING:
    from bm_jax.engine import Engine

KEY_VARIABLE = "BM_JAX_API_KEY"
INSTALL = "the server needs a few more packages: pip install 'blackmamba-jax[serve]'"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serve a trained model over HTTP."""

    directory: tyro.conf.Positional[str]
    """A model directory, or the directory of a training run (its newest checkpoint is used)."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface of this machine."""
    port: int = 8000
    """0 takes any free port."""
    api_key: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY")] = ()
    """Clients must show this key; repeat for several. Others on this machine can read it here, so rather set BM_JAX_API_KEY
    in the environment."""
    model_name: str | None = None
    """What clients call the model; the directory's name where it is not given."""
    slots: int = 8
    """Completions written at once."""
    queue: int = 256
    """Completions that may wait; more are refused with status 429."""
    room: int = 8192
    """Tokens of prompt and completion together that each slot can hold, for a model with attention layers."""
    weights: Literal["int8"] | None = None
    """int8 quantises the weights, for half the memory; None leaves them in the model's compute dtype."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Limits)


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (the process's own when None); the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # strangers must not fill the log
    try:
        _serve(tyro.cli(Arguments, prog="python -m bm_jax.serve", args=arguments))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _serve(request: Arguments) -> None:
    keys = tuple(key for key in (*request.api_key, os.environ.get(KEY_VARIABLE, "")) if key)
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ConfigError("an API key must be printable ASCII without spaces")
    try:
        from bm_jax.server.app import Service
        from bm_jax.server.http_server import Server, listen
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "prometheus_client", "jinja2", "h11"):
            raise
        raise ConfigError(f"{INSTALL} ({error.name} is missing)") from None
    from bm_jax.server.chat_template import ChatTemplate

    if not 0 <= request.port < 2**16:
        raise ConfigError(f"--port must be from 0 to 65535, got {request.port}")
    with listen(request.host, request.port) as bound:
        if not keys and not _is_loopback(bound):
            warning = (
                "WARNING: this server is open to everyone who can reach this machine, without an API key. "
                f"Set {KEY_VARIABLE}, or listen on 127.0.0.1."
            )
            print(warning, file=sys.stderr, flush=True)
        engine = _start_engine(request)
        name = request.model_name or Path(request.directory).resolve().name
        try:
            chat = ChatTemplate.load(Path(request.directory), engine.model.tokenizer)
            service = Service(engine, name, limits=request.limits, api_keys=keys, chat=chat, local=_is_loopback(bound))
            server = Server(service)
            # Until uvicorn listens to signals itself, and when it raises them again at its end.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: setattr(server, "should_exit", True))
            host, port = bound.getsockname()[:2]
            where = f"[{host}]" if ":" in host else host
            bound.listen(2048)
            print(f"serving {name} at http://{where}:{port}", flush=True)
            server.run(sockets=[bound])
        finally:
            engine.close(0)


def _start_engine(request: Arguments) -> Engine:
    """Load the model and compile what it needs."""
    from bm_jax.engine import Engine
    from bm_jax.language_model import LanguageModel

    model = LanguageModel.load(request.directory, max_prompt_tokens=request.limits.prompt_tokens, weights=request.weights)
    engine = Engine(model, slots=request.slots, queue=request.queue, room=request.room)
    engine.start()
    try:
        engine.warm()
    except BaseException:
        engine.close(0)
        raise
    return engine


def _is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


if __name__ == "__main__":
    sys.exit(main())
