"""Finds labels that are likely wrong. The code is retina/cli/audit.py."""

from retina.cli.audit import main

if __name__ == "__main__":
    main()
