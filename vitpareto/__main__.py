"""`python -m vitpareto`: the command, as the entry point `vitpareto` starts it."""

from vitpareto.cli import main

if __name__ == "__main__":
    main()
