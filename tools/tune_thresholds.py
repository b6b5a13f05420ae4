"""Fits score thresholds to a goal. The code is retina/cli/tune_thresholds.py."""

from retina.cli.tune_thresholds import main

if __name__ == "__main__":
    main()
