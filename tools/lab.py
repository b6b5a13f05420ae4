"""The focal lab: losses, detectors and recipes, measured. The code is retina/cli/lab.py."""

from retina.cli.lab import main

if __name__ == "__main__":
    main()
