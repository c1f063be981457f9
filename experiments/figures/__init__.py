"""One command a figure, `python -m experiments.figures.NAME`, each from a small file of metrics and without an accelerator."""
