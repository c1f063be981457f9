"""python -m bm_jax.data prepare INPUT... OUT | verify FOLDER | info FOLDER"""

from __future__ import annotations

from typing import Annotated

import tyro

from bm_jax.config import ConfigError
from bm_jax.data.prepare import prepare
from bm_jax.data.shards import SPLITS, Manifest, read_manifest, verify

Paths = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT [INPUT ...] OUT")]


def prepare_command(
    paths: Paths,
    tokenizer: str = "byte",
    text_field: str = "text",
    validation_fraction: float = 0.01,
    workers: int | None = None,
    document_bytes: int = 1_000_000,
    unit_bytes: int = 16_000_000,
) -> None:
    """Turn text into token shards; run the same command again to continue after an interruption.

    Args:
        paths: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet files, folders of them, or
            hf:NAME?config=C&split=S; last, the folder to write.
        tokenizer: `byte`, or the path of a tokenizer.json.
        text_field: Field or column that holds the text.
        validation_fraction: Share of the documents held out.
        workers: Processes; default one for each core.
        document_bytes: Longer .txt files are divided into documents of about this size; 0 never.
        unit_bytes: Input of one shard, about.
    """
    if len(paths) < 2:
        raise ConfigError("prepare needs at least one input and, last, the folder to write")
    manifest = prepare(
        paths[:-1],
        paths[-1],
        tokenizer=tokenizer,
        text_field=text_field,
        validation_fraction=validation_fraction,
        workers=workers,
        document_bytes=document_bytes,
        unit_bytes=unit_bytes,
    )
    print(describe(manifest))


def verify_command(folder: tyro.conf.Positional[str]) -> None:
    """Check every byte of a prepared folder against its checksums."""
    print(f"{describe(verify(folder))}\nevery shard is as recorded")


def info_command(folder: tyro.conf.Positional[str]) -> None:
    """Say what a prepared folder holds."""
    print(describe(read_manifest(folder)))


def describe(manifest: Manifest) -> str:
    """A few lines about prepared data."""
    lines = [
        f"{split}: {manifest.tokens(split):,} tokens, {manifest.documents(split):,} documents, "
        f"{len(getattr(manifest.splits, split))} shards"
        for split in SPLITS
    ]
    lines.append(f"tokenizer: {manifest.tokenizer_name}, {manifest.tokenizer_ids:,} ids, {manifest.dtype}")
    if not manifest.documents("validation"):
        lines.append("nothing is held out, so no validation loss can be measured on it")
    if manifest.empty_documents:
        lines.append(f"left out: {manifest.empty_documents:,} empty documents")
    if manifest.skipped_lines:
        lines.append(f"skipped: {manifest.skipped_lines:,} lines or files that could not be used, the first of them:")
        lines += [f"  {example}" for example in manifest.skipped_examples]
    return "\n".join(lines)


def main() -> None:
    commands = {"prepare": prepare_command, "verify": verify_command, "info": info_command}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="python -m bm_jax.data")
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
