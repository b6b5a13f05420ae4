"""Trains a detector. The code is retina/cli/train.py."""

from retina.cli.train import main

if __name__ == "__main__":
    main()
