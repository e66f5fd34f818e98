"""Speed, memory and exactness beside other libraries, measured in one run: python -m benchmarks.search --quick."""
