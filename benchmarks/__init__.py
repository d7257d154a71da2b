"""Measurements of OpenWaver. Each is a script: ``python benchmarks/NAME.py --help``; results with ``--save``."""
