"""Looks a data set over before it is trained on. The code is retina/cli/doctor.py."""

from retina.cli.doctor import main

if __name__ == "__main__":
    main()
