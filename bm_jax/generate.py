"""Text from the command line: `python -m bm_jax.generate RUN_OR_MODEL_DIR --prompt "Once upon a time"`.

One prompt is streamed as it is written; several are completed together and printed one after another, each under a line
with its number. The text goes to standard output, everything else to standard error. The exit status is 0, 1 after an
error in the directory or the request, 2 after one in the command line.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated, Any, Literal

import tyro

from bm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Complete prompts with a trained model."""

    directory: tyro.conf.Positional[str]
    """A model directory, or the directory of a training run (its newest checkpoint is used)."""
    prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """Text to continue; repeat for several prompts."""
    max_tokens: int = 256
    """Most tokens drawn for each prompt."""
    temperature: float = 1.0
    """0 takes the most likely token every time."""
    top_k: int | None = None
    """Draw from this many most likely tokens only."""
    top_p: float | None = None
    """Draw from the fewest most likely tokens that have this probability together."""
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Make ids of the prompt and the completion less likely; 1 for none."""
    presence_penalty: float = 0.0
    """Make ids of the completion less likely."""
    frequency_penalty: float = 0.0
    """Make ids of the completion less likely, once for each time."""
    n: int = 1
    """Completions of each prompt."""
    seed: int = 0
    """The same seed gives the same text; of several prompts each has the next one."""
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")] = ()
    """End before this text appears; repeat for several."""
    weights: Literal["int8"] | None = None
    """int8 quantises the weights, for half the memory; None leaves them in the model's compute dtype."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (the process's own when None); the exit status."""
    request = tyro.cli(Arguments, prog="python -m bm_jax.generate", args=arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        if not request.prompt:
            raise ConfigError('there is no prompt; give one with --prompt "some text"')
        _complete(request)
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read the text has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _complete(request: Arguments) -> None:
    from bm_jax.language_model import LanguageModel  # imports jax, which --help need not wait for

    options: dict[str, Any] = {
        field.name: getattr(request, field.name)
        for field in dataclasses.fields(request)
        if field.name not in ("directory", "prompt", "weights")
    }
    model = LanguageModel.load(request.directory, weights=request.weights)
    if len(request.prompt) * request.n == 1:
        del options["n"]
        pieces = model.stream(request.prompt[0], **options)
        print(request.prompt[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
        return
    # Of the same draws a weak model would make the same text after every prompt.
    options["seed"] = [(request.seed + number) % 2**32 for number in range(len(request.prompt))]
    completions = model.generate(request.prompt, **options)
    prompts = [prompt for prompt in request.prompt for _ in range(request.n)]
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        print(f"--- {number} of {len(completions)} ---\n{prompt}{completion.text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
