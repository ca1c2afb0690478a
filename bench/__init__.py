"""Benchmarks: ``python -m bench [name] [options]``. They print ratios measured in one run on one machine."""
