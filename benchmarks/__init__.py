"""Speed, memory and exactness, compared with other libraries: python -m benchmarks.search --quick."""
