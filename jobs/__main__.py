"""The console script `mar`, and `python -m jobs`. Handles Ctrl-C and SIGTERM even before the command line is imported."""

from jobs.leaving import leave_at_once


def main() -> None:
    """See `jobs.cli.main`."""
    leave_at_once()
    from jobs.cli import main as run

    run()


if __name__ == "__main__":
    main()
