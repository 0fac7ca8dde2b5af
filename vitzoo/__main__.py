"""`python -m vitzoo`, the same as the command `vitzoo`."""

from vitzoo.cli import main

if __name__ == "__main__":
    main()
