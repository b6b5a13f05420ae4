"""Detects objects in images. The code is retina/cli/infer.py."""

from retina.cli.infer import main

if __name__ == "__main__":
    main()
