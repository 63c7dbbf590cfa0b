"""`python -m flow_pl`: the same as `flow-pl`."""

from flow_pl.cli import main

if __name__ == "__main__":
    main()
