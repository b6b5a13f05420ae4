"""Scores a detector. The code is retina/cli/eval.py."""

from retina.cli.eval import main

if __name__ == "__main__":
    main()
