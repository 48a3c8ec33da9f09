"""``python -m saigen``."""

from saigen.cli import main

if __name__ == "__main__":
    main()
