"""Checkpoints by name, from a hub on this machine that speaks what the client of the real one asks."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_convert import CASES, make_tensors, write

from convert.hub import is_hub_name

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'blackmamba-jax[hub]'")
ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    """Serves `owner/tiny` from a folder, at the revision v1 alone; yields the environment that names it, and the requests."""
    format, layout, fields = CASES["hf-mamba"]
    folder = write(tmp_path / "on the hub", format, fields, make_tensors(format, layout, fields))
    (folder / "pytorch_model.bin").write_bytes(b"the same, pickled")
    (folder / "README.md").write_text("read me")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body, status=200, **headers):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": len(body)}).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith("/api/models/owner/tiny/revision/"):
                if self.path.rpartition("/")[2] not in ("v1", COMMIT):
                    return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
                files = [{"rfilename": path.name} for path in folder.iterdir()]
                return self.answer(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": files}).encode())
            if self.path.startswith(f"/api/models/owner/tiny/tree/{COMMIT}"):
                files = [{"type": "file", "path": p.name, "oid": "0", "size": p.stat().st_size} for p in folder.iterdir()]
                return self.answer(json.dumps(files).encode(), Content_Type="application/json")
            prefix = f"/owner/tiny/resolve/{COMMIT}/"
            if not self.path.startswith(prefix):
                return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            content = (folder / self.path.removeprefix(prefix)).read_bytes()
            return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}, asked
        server.shutdown()


def convert(environment, *arguments):
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "0"} | environment  # another test's module asks for 1
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_checkpoint_by_name_and_revision(hub, tmp_path):
    environment, asked = hub
    done = convert(environment, "import", "owner/tiny", tmp_path / "model", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "model/source.json").read_text())
    assert (kept["source"], kept["revision"]) == ("owner/tiny", COMMIT)
    assert not any(path.endswith((".bin", ".md")) for path in asked)
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    done = convert(offline, "import", "owner/tiny", tmp_path / "again", "--revision", COMMIT)
    assert done.returncode == 0, done.stderr
    done = convert(offline, "import", "owner/other", tmp_path / "none")
    assert "owner/other is not on this machine" in done.stderr
    done = convert({}, "import", tmp_path / "on the hub", tmp_path / "local")
    assert done.returncode == 0, done.stderr
    done = convert({}, "verify", tmp_path / "local", tmp_path / "model")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("owner/tiny", ("--revision", "v2"), "owner/tiny at v2 is not on this machine and could not be downloaded"),
        ("owner/other", (), "owner/other is not on this machine and could not be downloaded"),
        (ROOT, ("--revision", "v1"), "revision 'v1' is of the hub"),
    ],
)
def test_what_the_hub_lacks(hub, source, more, message, tmp_path):
    done = convert(hub[0], "import", source, tmp_path / "model", *more)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()


def test_no_network(tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    done = convert(environment, "import", "owner/tiny", tmp_path / "model")
    assert done.returncode == 1
    assert "owner/tiny is not on this machine and could not be downloaded" in done.stderr


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    found = [name for name in ("a/b", "mine/b", "/a/b", "a", "a/b/c", "./a", "state-spaces/mamba-2.8b") if is_hub_name(name)]
    assert found == ["a/b", "state-spaces/mamba-2.8b"]
    assert np.all([not is_hub_name(tmp_path / "a"), not is_hub_name(tmp_path)])
