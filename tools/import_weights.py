"""Converts the weights of other programs. The code is retina/cli/import_weights.py."""

from retina.cli.import_weights import main

if __name__ == "__main__":
    main()
