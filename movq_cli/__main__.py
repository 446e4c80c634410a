"""The entry point of `movq` and of `python -m movq_cli`, which is what `torchrun -m` starts.

It handles the stop signals before it imports anything else, because most of the start-up is imports.
"""

from __future__ import annotations

from movq_cli import signals


def main() -> None:
    """Run the command line and exit with its code."""
    signals.handle_from_start()
    from movq_cli import app

    app.main()


if __name__ == "__main__":
    main()
