"""Many streaming clients against one server, a third of them leaving early: no error, no leak, the same answers as alone.

    python benchmarks/serve_load.py [--clients 200] [--seconds 120] [--model DIR | --url URL]

Without --model and --url a small random model is made and served on the CPU by a process of its own. Each client asks
again and again: a request drawn from a pool, read as a stream; one in three closes its connection at a random moment.
Afterwards every request of the pool is made once more, alone, and every completed answer must be that one, as must what
the cut ones had got so far. Memory, threads and open files of the server are read from /proc: at the start (after a round
of the whole pool, so that everything is compiled), in the middle, and at the end, when nothing runs any more. The exit
status is 1 after an error, a mismatch, or a leak: a thread, slot or file that stays, or memory that grows by more than
--growth from the middle to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tyro

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the of and to in a is that it was for on are as with his they at be this from have or by one had not but what".split()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Load a server with streaming clients."""

    clients: int = 200
    """Connections at once."""
    seconds: float = 120
    pool: int = 64
    """Different requests."""
    max_tokens: int = 48
    """Most tokens that a request of the pool asks for."""
    cancel: float = 1 / 3
    """Share of requests that are left early."""
    slots: int = 16
    """Of the server that is started."""
    growth: float = 0.05
    """Memory that may be gained from the middle to the end, as a share."""
    seed: int = 0
    model: str | None = None
    """A model directory to serve instead of the small one."""
    url: str | None = None
    """A server that runs already; its process is then not looked at."""


@dataclasses.dataclass
class Result:
    """What came back for one request."""

    number: int
    """Of the request in the pool."""
    text: str = ""
    finish: str | None = None
    first: float | None = None
    """Seconds to the first token."""
    tokens: int = 0
    cancelled: bool = False
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What the server's process holds."""

    memory: int
    """Resident, in bytes."""
    threads: int
    files: int

    @classmethod
    def of(cls, process: int) -> Footprint:
        """Read it from /proc."""
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        files = len(os.listdir(f"/proc/{process}/fd"))
        return cls(int(values["VmRSS"].split()[0]) * 1024, int(values["Threads"]), files)

    def __str__(self) -> str:
        return f"{self.memory / 2**20:.1f} MiB, {self.threads} threads, {self.files} files"


def make_pool(settings: Arguments) -> list[dict[str, Any]]:
    """Requests of many kinds, all with seeds, so that each has one answer."""
    draw = random.Random(settings.seed)
    pool = []
    for number in range(settings.pool):
        request: dict[str, Any] = {
            "prompt": " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 10, 40]))),
            "max_tokens": draw.randint(1, settings.max_tokens),
            "temperature": draw.choice([0, 0.7, 1.0, 1.3]),
            "seed": number,
        }
        extras = {
            "top_p": draw.uniform(0.5, 1),
            "top_k": draw.randint(1, 100),
            "min_p": draw.uniform(0, 0.1),
            "repetition_penalty": draw.uniform(1, 1.5),
            "presence_penalty": draw.uniform(-1, 1),
            "frequency_penalty": draw.uniform(-1, 1),
            "logit_bias": {str(draw.randint(0, 255)): draw.uniform(-5, 5)},
            "stop": [draw.choice("aeiou"), "\n\n"],
            "logprobs": draw.randint(0, 5),
        }
        for name in draw.sample(sorted(extras), draw.choice([0, 0, 1, 2, 3])):
            request[name] = extras[name]
        pool.append(request)
    return pool


@contextlib.asynccontextmanager
async def streaming(url: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Make a request and hand out the events of its stream; the connection ends with the context.

    Raises:
        RuntimeError: the status is not 200, or the stream ends before it says so.
    """
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
    body = json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)

    async def events() -> AsyncIterator[dict[str, Any]]:
        status = await reader.readline()
        if status.split()[1:2] != [b"200"]:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode(errors='replace')[-300:]}")
        async for line in reader:
            # Chunk sizes and headers are other lines; an event is one line.
            if line == b"data: [DONE]\n":
                return
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
        raise RuntimeError("the stream was cut off")

    try:
        yield events()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ask(url: str, number: int, request: dict[str, Any], leave: float | None = None) -> Result:
    """One request; with `leave`, the connection is closed after that many seconds."""
    result, began = Result(number), time.perf_counter()
    try:
        async with asyncio.timeout(leave), streaming(url, request) as events:
            async for event in events:
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                for choice in event["choices"]:
                    if result.first is None:
                        result.first = time.perf_counter() - began
                    result.text += choice["text"]
                    result.finish = choice["finish_reason"] or result.finish
                if event.get("usage"):
                    result.tokens = event["usage"]["completion_tokens"]
    except TimeoutError:
        result.cancelled = True
    except (RuntimeError, OSError, ValueError) as error:
        result.error = f"{type(error).__name__}: {error}"
    return result


async def load(url: str, pool: list[dict[str, Any]], settings: Arguments, middle: Any) -> list[Result]:
    """All the clients for the time of the run; `middle` is called when half of it is over."""
    results: list[Result] = []
    end = time.monotonic() + settings.seconds

    async def client(seed: int) -> None:
        draw = random.Random(seed)
        lately = 0.2  # seconds that an answer takes: who leaves does so while one would wait or read
        while time.monotonic() < end:
            number = draw.randrange(len(pool))
            leave = draw.uniform(0, lately) if draw.random() < settings.cancel else None
            began = time.monotonic()
            results.append(await ask(url, number, pool[number], leave))
            if leave is None:
                lately += (time.monotonic() - began - lately) / 10

    async def half() -> None:
        await asyncio.sleep(settings.seconds / 2)
        middle()

    async with asyncio.TaskGroup() as group:
        group.create_task(half())
        for number in range(settings.clients):
            group.create_task(client(settings.seed * 1_000_003 + number))
    return results


async def compare(url: str, pool: list[dict[str, Any]], results: list[Result]) -> list[str]:
    """What differs from the answers to the same requests alone; of cut ones, what they had got."""
    wrong = []
    alone = [await ask(url, number, request) for number, request in enumerate(pool)]
    for result in results:
        right = alone[result.number]
        if result.cancelled:
            same = right.text.startswith(result.text)
        else:
            same = (result.text, result.finish, result.tokens) == (right.text, right.finish, right.tokens)
        if not same and result.error is None:
            wrong.append(f"request {result.number}: {result.text!r} ({result.finish}) is not {right.text!r} ({right.finish})")
    return wrong + [f"alone: {result.error}" for result in alone if result.error]


def make_model(directory: Path) -> None:
    """A small random BlackMamba that reads and writes bytes."""
    import jax

    from bm_jax.config import MambaConfig, ModelConfig, MoeConfig
    from bm_jax.data.tokenizer import ByteTokenizer
    from bm_jax.language_model import LanguageModel
    from bm_jax.model import init_parameters

    config = ModelConfig(
        layers=("mamba", "moe"),
        repeats=2,
        width=64,
        vocab_size=257,
        mamba=MambaConfig(state_size=8),
        moe=MoeConfig(experts=4, width=64),
        compute_dtype="float32",
    )
    parameters = init_parameters(config, jax.random.key(0))
    parameters["embedding"] = parameters["embedding"] * 20  # as made, it would say the same after everything
    LanguageModel(config, parameters, ByteTokenizer()).save(directory)


@contextlib.contextmanager
def serving(settings: Arguments) -> Iterator[tuple[str, int | None]]:
    """The address of a server, and its process where it is started here."""
    if settings.url is not None:
        yield settings.url.rstrip("/"), None
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "small"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if settings.model is None:
            environment["JAX_PLATFORMS"] = "cpu"
            source = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import serve_load, pathlib\n"
            source += f"serve_load.make_model(pathlib.Path({str(directory)!r}))"
            subprocess.run([sys.executable, "-c", source], env=environment, check=True)
        command = [sys.executable, "-m", "bm_jax.serve", settings.model or str(directory), "--port", "0"]
        command += ["--slots", str(settings.slots), "--queue", str(2 * settings.clients)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if " at http://" not in line:
                    raise RuntimeError("the server did not start")
                yield line.rpartition(" at ")[2].strip(), process.pid
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()


async def engine_is_idle(url: str, seconds: float = 30) -> bool:
    """Whether nothing runs or waits in the engine, within the time."""
    place = urlsplit(url)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
        writer.write(f"GET /metrics HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n\r\n".encode())
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        if "bm_jax_engine_active 0.0" in text and "bm_jax_engine_waiting 0.0" in text:
            return True
        await asyncio.sleep(0.1)
    return False


def report(results: list[Result], wrong: list[str], footprints: list[Footprint], idle: bool, settings: Arguments) -> list[str]:
    """Print what was measured; what is amiss."""
    done = [result for result in results if not result.cancelled and result.error is None]
    errors = [result.error for result in results if result.error]
    first = sorted(result.first for result in results if result.first is not None)
    print(f"{settings.clients} clients, {settings.seconds:g} s, {settings.pool} different requests")
    cut = sum(result.cancelled for result in results)
    print(f"requests: {len(results)}: {len(done)} completed, {cut} left early, {len(errors)} errors")
    print(f"tokens/s: {sum(result.tokens for result in done) / settings.seconds:,.0f} of completed requests")
    if first:
        slow = first[min(len(first) - 1, int(0.99 * len(first)))]
        print(f"time to first token: median {statistics.median(first):.3f} s, 99th percentile {slow:.3f} s")
    print(f"mismatches: {len(wrong)} of {len(results) - len(errors)} compared")
    amiss = [*errors[:5], *wrong[:5]]
    if not done:
        amiss.append("no request was completed")
    if not idle:
        amiss.append("the engine did not become idle")
    if footprints:
        for name, footprint in zip(("start", "middle", "end"), footprints, strict=True):
            print(f"server at the {name}: {footprint}")
        start, middle, last = footprints
        if last.memory > middle.memory * (1 + settings.growth):
            amiss.append(f"memory grew from {middle.memory} to {last.memory} bytes in the second half")
        # Worker threads start when they are first needed; they must not become more while the load stays the same.
        if last.threads > middle.threads or last.files > start.files:
            amiss.append(f"threads or files stay: {last}, before {start}")
    return amiss


async def measure(url: str, process: int | None, settings: Arguments) -> list[str]:
    """The whole run; what is amiss."""
    pool = make_pool(settings)
    footprints: list[Footprint] = []

    def look() -> None:
        if process is not None:
            footprints.append(Footprint.of(process))

    warm = await asyncio.gather(*(ask(url, number, request) for number, request in enumerate(pool)))
    await engine_is_idle(url)
    look()
    results = await load(url, pool, settings, look)
    idle = await engine_is_idle(url)
    await asyncio.sleep(1)  # for the last connections to close
    look()
    wrong = await compare(url, pool, [*warm, *results])
    return report(results, wrong, footprints, idle, settings)


def main() -> int:
    """Run it; the exit status."""
    settings = tyro.cli(Arguments, description=__doc__)
    with serving(settings) as (url, process):
        amiss = asyncio.run(measure(url, process, settings))
    for line in amiss:
        print(f"AMISS: {line}", file=sys.stderr)
    return 1 if amiss else 0


if __name__ == "__main__":
    sys.exit(main())
