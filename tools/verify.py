"""Repeats the proof of an exported file, without torch. The code is retina/cli/verify.py."""

from retina.cli.verify import main

if __name__ == "__main__":
    main()
