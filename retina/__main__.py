"""`python -m retina COMMAND`: the same as `retina COMMAND`."""

from retina.cli.main import main

if __name__ == "__main__":
    main()
