"""`make demo`: load the embedded model, show its induction heads, compare lean with stock loading.

`python -m demo.demo --quick` leaves the comparison out, which needs some 6 GB of free memory and
1.4 GB of disk.
"""

from __future__ import annotations

import argparse
import logging
import sys

from rich.console import Console

_WIDTH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what tl_fastload does.")
    parser.add_argument("--quick", action="store_true", help="only the embedded model")
    options = parser.parse_args()
    # A pipe or a log has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    # bitsandbytes warns of a CPU kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    with console.status("importing TransformerLens"):
        from demo import first_look
    console.rule("The embedded model")
    first_look.show(console)
    if not options.quick:
        from demo import versus_stock

        console.rule("A model big enough to matter")
        versus_stock.show(console)


if __name__ == "__main__":
    main()
