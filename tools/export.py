"""Writes a detector as one file that other runtimes run, and proves it. The code is retina/cli/export.py."""

from retina.cli.export import main

if __name__ == "__main__":
    main()
