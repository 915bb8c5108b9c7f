"""A load onto the CPU, then the same in a forked child, in a process that has CUDA: run on its own.

python -m benchmarks.gpu_report.forked FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from benchmarks.gpu_report.stand_ins import stand_in_for_datasets


def main(folder: str) -> None:
    """Print as JSON whether the load has initialised CUDA, and how the child's load ended."""
    stand_in_for_datasets()
    import torch

    from tl_fastload.cli.bench.loads import lean_load

    load = lean_load(folder, "float32", True, device="cpu", progress=False)
    load()
    initialised = bool(torch.cuda.is_initialized())
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads have not come along
        try:
            load()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"cuda_initialised_by_a_cpu_load": initialised, "forked_load_status": status}))


if __name__ == "__main__":
    main(sys.argv[1])
