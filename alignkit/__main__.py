"""`python -m alignkit` is `alignkit`."""

from alignkit.cli.entry import main

if __name__ == "__main__":
    main()
