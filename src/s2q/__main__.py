"""`python -m s2q` is the command line."""

from s2q.cli import main

if __name__ == "__main__":
    main()
