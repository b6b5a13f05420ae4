"""Packs the images of a data set into a few large files. The code is retina/cli/pack.py."""

from retina.cli.pack import main

if __name__ == "__main__":
    main()
