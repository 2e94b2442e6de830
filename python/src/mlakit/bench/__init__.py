"""Benchmarks behind `mlakit bench`: data, timing and roofs. Nothing here is imported by the package itself."""
