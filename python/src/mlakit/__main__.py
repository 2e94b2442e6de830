"""`python -m mlakit` is the command `mlakit`."""

from mlakit.cli import main

if __name__ == "__main__":
    main()
