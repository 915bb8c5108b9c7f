"""What loading costs: peak memory, load time and forward time, each measured in a fresh process.

Run `python -m benchmarks`. To measure one case from other code: `benchmarks.measure.run_case`.
"""
