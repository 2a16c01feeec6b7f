"""The program: `rwkv-edge`, or `python -m rwkv_edge`."""

import sys


def main() -> None:
    """Run the command line; an interrupt is no error, not even while it is being imported."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
