"""What the package does on one CUDA device, measured in six minutes.

Without a device it can be tried out on the CPU, with tiny models: `--dry-run`.
"""
