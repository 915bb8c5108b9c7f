"""`python -m tl_fastload`: the same as the command `tl-fastload`."""

from tl_fastload.cli import main

if __name__ == "__main__":
    main()
