"""`python -m tierd` is the same program as `tierd`."""

from tierd.cli.main import main

if __name__ == "__main__":
    main()
