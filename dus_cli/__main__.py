"""`python -m dus_cli` is `dus`."""

from dus_cli.cli import main

if __name__ == "__main__":
    main()
