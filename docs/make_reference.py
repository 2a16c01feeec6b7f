"""Write the reference pages: docs/cli.md from the help of the commands, docs/api.md from signatures and docstrings.

Signatures are the source's own text, found by `ast`: the same with every version of Python and numpy.
"""

import ast
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path

import click

import rwkv_edge
from rwkv_edge.cli import cli

WIDTH = 100

# what app and tool writers use; everything else may change without a word
PUBLIC = {
    "rwkv_edge": ["open_bundle", "Model", "Generation", "Token", "Sampling", "State", "Chat", "export"],
    "rwkv_edge.runtime.generate": ["Stats"],
    "rwkv_edge.convert": ["quantize", "Written"],
    "rwkv_edge.quantize": ["plan"],
    "rwkv_edge.check": ["check", "Report", "Row", "Difference"],
    "rwkv_edge.proof": ["Proof"],
    "rwkv_edge.evaluate": ["evaluate", "last_words", "documents", "Evaluation", "Score", "Cost", "WordScore", "Estimate"],
    "rwkv_edge.bench": ["bench", "Bench", "Speed"],
    "rwkv_edge.inspection": ["inspect", "Inspection", "TensorRow"],
    "rwkv_edge.forecast": ["Forecast"],
}
GIVEN = ("Model", "Generation")  # by a function: how they are made is no part of the API
TYPES = {  # names that signatures use
    "rwkv_edge.runtime.session": ["Array", "Tokens"],
    "rwkv_edge.runtime.generate": ["Logits"],
    "rwkv_edge.convert": ["Progress"],
    "rwkv_edge.spec": ["Shape"],
}


def cli_page() -> str:
    """Every command's help as it is printed."""
    parts = ["# Commands\n\nMade from `--help` by `make docs`.\n"]
    with click.Context(cli, info_name="rwkv-edge", terminal_width=WIDTH, **cli.context_settings) as top:
        parts.append(f"```text\n{cli.get_help(top)}\n```\n")
        for name, command in cli.commands.items():
            with click.Context(command, info_name=name, parent=top, terminal_width=WIDTH) as ctx:
                parts.append(f"## {name}\n\n```text\n{command.get_help(ctx)}\n```\n")
    return "\n".join(parts)


def api_page() -> str:
    """Every public name with its signature and docstring, and the tree of errors."""
    parts = [
        "# Python API\n\nMade from signatures and docstrings by `make docs`.\n",
        f"Types in signatures; `settings` are the fields of [Sampling](#sampling), each as an option:\n\n{_code(_types())}",
    ]
    for module, names in PUBLIC.items():
        home = import_module(module)
        parts.append(f"## {module}\n\n{_text(inspect.cleandoc(home.__doc__ or ''))}")
        for name in names:
            x = getattr(home, name)
            node = _definition(x, name)
            parts += _class(node, x) if isinstance(node, ast.ClassDef) else _function(node, x)
    from rwkv_edge import errors

    parts.append(f"## rwkv_edge.errors\n\n{_text(inspect.cleandoc(errors.__doc__ or ''))}")
    for name, x in vars(errors).items():
        if isinstance(x, type) and (x.__bases__ != (rwkv_edge.RwkvEdgeError,) or "__init__" in vars(x)):  # beyond the tree
            parts += _class(_definition(x, name), x)
    return "\n".join(parts)


def _types() -> str:
    found = []
    for module, names in TYPES.items():
        source = _source(import_module(module))
        assigned = [n for n in ast.parse(source).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in names]
        assert len(assigned) == len(names), f"{module} has not all of {names}"
        found += [ast.get_source_segment(source, n) or "" for n in assigned]
    return "\n".join(found)


Function = ast.FunctionDef


def _definition(x: object, name: str) -> Function | ast.ClassDef:
    """Where a function or a class is defined."""
    for node in ast.parse(_source(x)).body:
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{name} is defined nowhere")


def _source(x: object) -> str:
    return Path(inspect.getsourcefile(x)).read_text("utf-8")


def _class(node: ast.ClassDef, x: object) -> list[str]:
    """A class with its fields or its constructor, then its public methods and properties."""
    decorators = [f"@{ast.unparse(d)}" for d in node.decorator_list]
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    functions = [n for n in node.body if isinstance(n, Function)]
    fields = [ast.get_source_segment(_source(x), n) for n in node.body if isinstance(n, ast.AnnAssign)]
    inside = [field for field in fields if field and not field.startswith("_")]
    inside += [_signature(n, x) for n in functions if n.name == "__init__" and node.name not in GIVEN]
    code = "\n".join([*decorators, f"class {node.name}{bases}:" if inside else f"class {node.name}{bases}"])
    code += "".join("\n" + textwrap.indent(part, "    ") for part in inside)
    parts = [_entry(f"### {node.name}", code, node)]
    for n in functions:
        if not n.name.startswith("_"):
            parts += _function(n, x, f"{node.name}.")
    return parts


def _function(node: Function, x: object, prefix: str = "") -> list[str]:
    return [_entry(f"{'####' if prefix else '###'} {prefix}{node.name}", _signature(node, x), node)]


def _signature(node: Function, x: object) -> str:
    """The text from `def` to the colon, annotations without quotes."""
    lines = _source(x).splitlines()
    a = node.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    for said in (*(argument.annotation for argument in arguments), node.returns):
        if isinstance(said, ast.Constant) and isinstance(said.value, str):
            i = said.lineno - 1
            lines[i] = re.sub(rf'(: |-> )"{re.escape(said.value)}"', rf"\1{said.value}", lines[i])
    decorators = [f"@{ast.unparse(d)}" for d in node.decorator_list]
    text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])).removesuffix(":")
    return "\n".join([*decorators, text])


def _entry(heading: str, code: str, node: Function | ast.ClassDef) -> str:
    return "\n".join(filter(None, (heading + "\n", _code(code), _text(ast.get_docstring(node)))))


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _text(docstring: str | None) -> str:
    return f"```text\n{docstring}\n```\n" if docstring else ""


PAGES = {"cli.md": cli_page, "api.md": api_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        Path(__file__).with_name(name).write_text(page(), "utf-8")
