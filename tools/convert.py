"""Converts Pascal VOC and YOLO data sets. The code is retina/cli/convert.py."""

import sys

from retina.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
