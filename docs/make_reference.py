"""Write docs/cli.md, the command reference, from the help of the commands."""

from pathlib import Path

import click

from rwkv_edge.cli import cli

WIDTH = 100


def page() -> str:
    """The page: every command's help as it is printed."""
    parts = ["# Commands\n\nMade from `--help` by `make docs`.\n"]
    with click.Context(cli, info_name="rwkv-edge", terminal_width=WIDTH, **cli.context_settings) as top:
        parts.append(f"```\n{cli.get_help(top)}\n```\n")
        for name, command in cli.commands.items():
            with click.Context(command, info_name=name, parent=top, terminal_width=WIDTH) as ctx:
                parts.append(f"## {name}\n\n```\n{command.get_help(ctx)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page())
