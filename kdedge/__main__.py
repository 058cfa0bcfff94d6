"""`python -m kdedge`, the same as `kdedge`."""

from kdedge.cli import main

if __name__ == "__main__":
    main()
