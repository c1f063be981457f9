"""Checkpoints of PyTorch models to this project and back: BlackMamba, Mamba, Jamba, Mixtral."""

from convert.convert import compare, export_checkpoint, import_checkpoint

__all__ = ["compare", "export_checkpoint", "import_checkpoint"]
