"""Benchmarks, one file each: see `icd_lightning.evaluation.benchmark`."""
