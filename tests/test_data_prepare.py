"""Preparing text: every kind of file, bad lines, held-out documents, and a result that no kill can change."""

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tiny_models import small_bpe

from bm_jax.config import ConfigError
from bm_jax.data.prepare import prepare
from bm_jax.data.shards import open_prepared, verify
from bm_jax.data.tokenizer import load_tokenizer

TEXTS = [f"Document {i}:\nthe quick 中 brown fox number {i * i}.\n" * (1 + i % 4) for i in range(60)]


def documents_of(folder) -> dict[str, list[str]]:
    """The text of every document by split, read back through the shards."""
    tokenizer = load_tokenizer(folder)
    found = {}
    for split, stream in open_prepared(folder, tokenizer).items():
        ids, _ = stream.read(0, stream.tokens)
        ends = np.flatnonzero(ids == tokenizer.end_of_document) + 1
        assert len(ends) == stream.documents
        assert not len(ids) or ends[-1] == len(ids)
        found[split] = [tokenizer.decode(part[:-1]) for part in np.split(ids, ends)[:-1]]
    return found


def all_documents(folder) -> list[str]:
    return sorted(itertools.chain(*documents_of(folder).values()))


def lines(texts) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_kind(path: Path, kind: str) -> Path:
    """TEXTS as one file (or folder of files) of the given kind."""
    path = path / f"input.{kind}"
    if kind == "txt":
        path.mkdir()
        for number, text in enumerate(TEXTS):
            (path / f"{number:02d}.txt").write_bytes(text.encode())
    elif kind == "parquet":
        table = pyarrow.table({"other": list(range(60)), "text": TEXTS})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif kind == "jsonl":
        path.write_bytes(lines(TEXTS))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(TEXTS[:40])) + gzip.compress(lines(TEXTS[40:])))
    else:
        first = io.BytesIO()
        with zstandard.ZstdCompressor().stream_writer(first, closefd=False) as stream:
            stream.write(lines(TEXTS[:40]))
        path.write_bytes(first.getvalue() + zstandard.compress(lines(TEXTS[40:])))
    return path


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below `folder`."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("unit_bytes", [700, 10**9])
def test_every_kind_of_file(tmp_path, kind, unit_bytes):
    source = write_kind(tmp_path, kind)
    manifest = prepare(source, tmp_path / "out", validation_fraction=0.2, unit_bytes=unit_bytes, workers=1, progress=False)
    found = documents_of(tmp_path / "out")
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    assert 2 <= len(found["validation"]) <= 25
    assert found["train"] == [text for text in TEXTS if text not in found["validation"]], "order is kept"
    assert (manifest.documents("train"), manifest.documents("validation")) == tuple(map(len, found.values()))
    assert (manifest.skipped_lines, manifest.empty_documents) == (0, 0)
    assert verify(tmp_path / "out") == manifest


def test_bpe_and_several_inputs_with_a_folder(tmp_path):
    small_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in/deep").mkdir(parents=True)
    write_kind(tmp_path / "in/deep", "parquet")
    write_kind(tmp_path / "in", "jsonl.gz")
    (tmp_path / "in/ignored.csv").write_text("a,b")
    (tmp_path / "note.txt").write_text("one more")
    inputs = [tmp_path / "in", tmp_path / "note.txt"]
    manifest = prepare(inputs, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", workers=1, progress=False)
    assert all_documents(tmp_path / "out") == sorted([*TEXTS, *TEXTS, "one more"])
    assert manifest.inputs == ("input.parquet", "input.jsonl.gz", "note.txt")
    assert manifest.tokenizer_ids == 401


def test_many_ids_need_uint32(tmp_path):
    import tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_bytes(lines(["w5 w69999", "w1"]))
    manifest = prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path, progress=False)
    assert manifest.dtype == "uint32"
    streams = open_prepared(tmp_path / "out")
    ids = [streams[s].read(0, streams[s].tokens)[0].tolist() for s in ("train", "validation")]
    assert sorted(ids) == [[1, 70_000], [5, 69_999, 70_000]]


@pytest.mark.parametrize("unit_bytes", [60, 10**9])
def test_bad_lines_are_skipped_counted_and_named(tmp_path, unit_bytes):
    bad = [b'{"text": "cut', b'{"txt": "x"}', b'{"text": 7}', b"[1]", b'{"text": "\xff\xfe"}', b'{"text": "\\ud800"}']
    content = b"\n".join([lines(["first"]).strip(), *bad, b"", b'{"text": ""}', lines(["last"]).strip()])
    (tmp_path / "a.jsonl").write_bytes(content)
    manifest = prepare(tmp_path / "a.jsonl", tmp_path / "out", unit_bytes=unit_bytes, workers=1, progress=False)
    assert all_documents(tmp_path / "out") == ["first", "last"]
    assert (manifest.skipped_lines, manifest.empty_documents) == (6, 1)
    wanted = ["2: not JSON", "3: no field 'text'; it has 'txt'", "4: field 'text' is int", "5: expected a JSON object"]
    wanted += ["6: not UTF-8", "7: field 'text' contains half"]
    for example, text in zip(manifest.skipped_examples, wanted, strict=True):
        assert example.startswith(f"a.jsonl, line {text}")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    message = r"no documents\. 1 lines or files were skipped: latin\.txt: not UTF-8 text at byte 1 .*iconv"
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "latin.txt", tmp_path / "out", progress=False)
    (tmp_path / "good.txt").write_bytes("\ufeffdéjà vu".encode())
    manifest = prepare([tmp_path / "good.txt", tmp_path / "latin.txt"], tmp_path / "both", progress=False)
    assert manifest.skipped_lines == 1
    assert all_documents(tmp_path / "both") == ["déjà vu"]


def test_null_and_missing_columns_of_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", None, "two"]}), tmp_path / "a.parquet")
    manifest = prepare(tmp_path / "a.parquet", tmp_path / "out", text_field="body", progress=False)
    assert manifest.skipped_examples == ("a.parquet, line 2: field 'body' is NoneType, not text",)
    with pytest.raises(ConfigError, match=r"a\.parquet has no column 'text'; it has 'body'.*--text-field"):
        prepare(tmp_path / "a.parquet", tmp_path / "other", progress=False)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_truncated_input_is_refused(tmp_path, kind):
    source = write_kind(tmp_path, kind)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"input\..*(damaged|not a readable)"):
        prepare(source, tmp_path / "out", progress=False)


def test_a_large_text_file_is_divided_at_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {i} says\n" + "a few words 中 more\n" * (i % 9 + 1) for i in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    prepare(tmp_path / "a.txt", tmp_path / "out", document_bytes=2000, validation_fraction=0.3, progress=False)
    found = documents_of(tmp_path / "out")
    pieces = found["train"] + found["validation"]
    assert len(found["validation"]) > 2
    assert all(piece.startswith("Paragraph ") and len(piece.encode()) < 2500 for piece in pieces)
    assert sorted(" ".join(pieces).split()) == sorted(" ".join(paragraphs).split())
    (tmp_path / "b.txt").write_text("中" * 5000, encoding="utf-8")
    manifest = prepare(tmp_path / "b.txt", tmp_path / "out-b", document_bytes=1000, progress=False)
    assert manifest.skipped_lines == 0, "a cut must not divide a character"
    assert "".join(all_documents(tmp_path / "out-b")) == "中" * 5000


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_splits_get_a_document(tmp_path, fraction):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:5]))
    prepare(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=fraction, unit_bytes=100, progress=False)
    sizes = sorted(len(found) for found in documents_of(tmp_path / "out").values())
    assert sizes == [1, 4]
    verify(tmp_path / "out")


def test_nothing_is_held_out_when_it_cannot_be(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["same"] * 3))
    manifest = prepare(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0.9999, progress=False)
    assert (manifest.documents("train"), manifest.documents("validation")) == (3, 0)
    (tmp_path / "b.jsonl").write_bytes(lines(TEXTS))
    manifest = prepare(tmp_path / "b.jsonl", tmp_path / "out-b", validation_fraction=0, progress=False)
    assert (manifest.documents("train"), manifest.documents("validation")) == (60, 0)


def test_equal_documents_stay_together(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 3))
    prepare(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0.4, unit_bytes=900, workers=1, progress=False)
    found = documents_of(tmp_path / "out")
    assert set(found["train"]).isdisjoint(found["validation"])
    assert len(found["validation"]) > 6


def test_empty_and_missing_input(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name in ("empty.txt", "blank.jsonl"):
        with pytest.raises(ConfigError, match="the input contains no documents"):
            prepare(tmp_path / name, tmp_path / f"out-{name}", progress=False)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"folder contains no \.txt, \.jsonl"):
        prepare(tmp_path / "folder", tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match=r"no file or folder some/name\. A data set of the hub is written hf:some/name"):
        prepare("some/name", tmp_path / "out", progress=False)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ConfigError, match=r"a\.csv is not a kind of file"):
        prepare(tmp_path / "a.csv", tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="given 2 times"):
        prepare([tmp_path / "empty.txt"] * 2, tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="no input"):
        prepare([], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [{"validation_fraction": 1.0}, {"workers": 0}, {"unit_bytes": 0}, {"document_bytes": -1}])
def test_options_out_of_range(tmp_path, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        prepare(tmp_path, tmp_path / "out", **option)


def test_an_existing_folder_is_not_overwritten(tmp_path):
    source = write_kind(tmp_path, "jsonl")
    out = tmp_path / "out"
    first = prepare(source, out, progress=False)
    before = tree(out)
    assert prepare(source, out, progress=False) == first, "the same again is already done"
    with pytest.raises(ConfigError, match="already holds data prepared from other inputs or with other options"):
        prepare(source, out, validation_fraction=0.5, progress=False)
    source.write_bytes(source.read_bytes() + lines(["new"]))
    with pytest.raises(ConfigError, match="or the inputs have changed"):
        prepare(source, out, progress=False)
    assert tree(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.json").write_text("precious")
    with pytest.raises(ConfigError, match="not empty and not prepared data"):
        prepare(source, tmp_path / "mine", progress=False)
    assert (tmp_path / "mine/tokenizer.json").read_text() == "precious"


def test_datasets_package(tmp_path):
    pytest.importorskip("datasets")
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/train.jsonl").write_bytes(lines(TEXTS))
    for name in (f"hf:{tmp_path}/saved", f"hf:{tmp_path}/repository?split=train"):
        out = tmp_path / f"out-{len(name)}"
        prepare(name, out, unit_bytes=1000, workers=1, progress=False)
        assert all_documents(out) == sorted(TEXTS)
    with pytest.raises(ConfigError, match="known are config and split"):
        prepare(f"hf:{tmp_path}/repository?name=x", tmp_path / "x", progress=False)


def test_without_the_datasets_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package `datasets`: pip install"):
        prepare("hf:some/name", tmp_path / "out", progress=False)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Input of some 40 units, and what an undisturbed run in one process makes of it."""
    root = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    words = np.array(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "中文", "naïve"])
    texts = [" ".join(random.choice(words, random.integers(5, 2000))) for _ in range(1500)]
    (root / "a.jsonl").write_bytes(lines(texts[:700]) + b"{broken\n" + lines(texts[700:1000]))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(lines(texts[1000:])))
    inputs = [str(root / "a.jsonl"), str(root / "b.jsonl.gz")]
    prepare(inputs, root / "expected", unit_bytes=200_000, workers=1, progress=False)
    return inputs, tree(root / "expected")


def command(inputs, out, workers) -> list[str]:
    options = ["--unit-bytes", "200000", "--workers", str(workers)]
    return [sys.executable, "-m", "bm_jax.data", "prepare", *inputs, str(out), *options]


def test_the_number_of_workers_changes_nothing(large, tmp_path):
    inputs, expected = large
    done = subprocess.run(command(inputs, tmp_path / "out", 3), check=True, capture_output=True, text=True)
    assert tree(tmp_path / "out") == expected
    assert "skipped: 1 lines" in done.stdout
    assert "a.jsonl, line 701: not JSON" in done.stdout
    assert re.search(r"100%.* (\S+)/\1 ", done.stderr), "the bar must arrive at the end"


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_restarted(large, tmp_path, workers):
    inputs, expected = large
    out = tmp_path / "out"
    kills = 0
    for wanted in (1, 4, 9, 15):  # finished units at which to kill
        with subprocess.Popen(command(inputs, out, workers), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.glob("work/*.json"))) < wanted:
                time.sleep(0.002)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                with pytest.raises(ConfigError, match=r"different|differs in: validation_fraction"):
                    _retry_while_locked(inputs, out, validation_fraction=0.5, unit_bytes=200_000, progress=False)
            process.wait()
    assert kills >= 2, "the run was too short to be killed"
    (out / "train-00003.tokens.99.partial").write_bytes(b"left by a killed worker")
    done_before = {p.name: p.stat().st_mtime_ns for p in out.glob("work/*.json")}
    assert done_before
    kept = {name: (out / f"train-{name[:5]}.tokens").stat().st_mtime_ns for name in done_before}
    subprocess.run(command(inputs, out, workers), check=True, capture_output=True)
    assert tree(out) == expected
    for name, modified in kept.items():
        assert (out / f"train-{name[:5]}.tokens").stat().st_mtime_ns == modified, "a finished unit was done again"


def _retry_while_locked(*arguments, **options) -> None:
    for _ in range(100):  # the kernel releases a killed process's lock when it is reaped
        try:
            prepare(*arguments, **options)
        except ConfigError as error:
            if "another process" not in str(error):
                raise
            time.sleep(0.05)


def test_two_at_once_are_refused(large, tmp_path):
    import fcntl

    inputs, _ = large
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process is preparing"):
        prepare(inputs, tmp_path / "out", progress=False)
    os.close(descriptor)


def test_command_line_errors_are_one_line(tmp_path):
    for arguments, message in (
        (["prepare", "nowhere.txt", str(tmp_path / "o")], "error: there is no file or folder nowhere.txt"),
        (["prepare", "only-one"], "error: prepare needs at least one input and, last, the folder"),
        (["verify", str(tmp_path)], "error: "),
        (["info", str(tmp_path)], "is not prepared data"),
    ):
        done = subprocess.run([sys.executable, "-m", "bm_jax.data", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
