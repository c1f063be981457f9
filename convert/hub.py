"""Checkpoints by their name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bm_jax.model_directory import COMPANIONS
from convert.archives import NAMES, ArchiveError

DESCRIPTION = ("config.json", "tokenizer.json", *COMPANIONS)


def is_hub_name(source: str | os.PathLike[str]) -> bool:
    """Whether this is `owner/name` and not something on this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not Path(source).parent.exists()


def download(name: str, revision: str | None = None) -> tuple[Path, str]:
    """The checkpoint `owner/name` at a branch, tag or commit (None for its main branch), in the hub's cache folder.

    Where the repository has the weights both as safetensors and pickled, only the former are fetched.

    Returns:
        The folder, and the commit.

    Raises:
        ArchiveError: huggingface_hub is not installed, the hub cannot be reached, or it has no such checkpoint.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise ArchiveError(f"{name} is not on this machine; for the hub: pip install 'blackmamba-jax[hub]'") from None
    try:
        if constants.HF_HUB_OFFLINE:
            for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
                wanted = [weights, *DESCRIPTION]
                folder = Path(
                    huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=wanted)
                )
                if any(folder.glob(weights)):
                    return folder, folder.name
        info = huggingface_hub.model_info(name, revision=revision)
        there = [file.rfilename for file in info.siblings or []]
        stems = [re.escape(name).replace(r"\.", r"(-\d+-of-\d+)?\.", 1) + r"(\.index\.json)?" for name in NAMES]
        weights = next((found for stem in stems if (found := [file for file in there if re.fullmatch(stem, file)])), None)
        if weights is None:
            raise ArchiveError(f"{name} has no {' or '.join(NAMES)}, nor an index of several; it has {', '.join(there)}")
        wanted = [*weights, *(file for file in DESCRIPTION if file in there)]
        folder = huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=wanted)
    except ArchiveError:
        raise
    except Exception as error:  # of the network, of the hub, of the cache: all end here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = "" if revision is None else f" at {revision}"
        raise ArchiveError(f"{name}{at} is not on this machine and could not be downloaded: {reason}") from error
    return Path(folder), info.sha or ""
