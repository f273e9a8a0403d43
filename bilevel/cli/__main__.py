"""``python -m bilevel.cli``."""

from bilevel.cli.main import main

if __name__ == "__main__":
    main()
