"""Compares detectors. The code is retina/cli/compare.py."""

from retina.cli.compare import main

if __name__ == "__main__":
    main()
