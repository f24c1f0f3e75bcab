"""The Python code that jinja makes of a chat template, extended by code that counts its work.

Jinja compiles a template to Python. This generator adds code that charges the budget of a
rendering: steps at the head of every loop and macro, and the size of what is printed, joined,
sliced or compared.
"""

from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators

_NODES_OF_A_STEP = 100


class BoundedCodeGenerator(CodeGenerator):
    """Writes Python code that charges the budget of its context."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._costs: dict[int, int] = {}
        self._conditions: set[int] = set()

    def write_commons(self) -> None:
        """Writes the head of a root or block function."""
        super().write_commons()
        self.writeline("budget = context.budget")
        self.writeline("concat = budget.concat")
        for name in ("tick", "read", "text", "shown", "checked", "sliced"):
            self.writeline(f"budget_{name} = budget.{name}")

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Visits a node; the condition of a loop is a step."""
        if id(node) not in self._conditions:
            return super().visit(node, *args, **kwargs)
        self._conditions.remove(id(node))
        self.write("budget_tick() and (")
        super().visit(node, *args, **kwargs)
        self.write(")")
        return None

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        """Writes statements; those of a loop, macro or block begin with their steps."""
        if cost := self._costs.pop(id(nodes), 0):
            self.writeline(f"budget_tick({cost})")
        super().blockvisit(nodes, frame)

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        """Writes the module."""
        for block in node.find_all(nodes.Block):
            self._count(block)
        super().visit_Template(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """Writes a loop."""
        self._count(node)
        if node.test is not None:
            self._conditions.add(id(node.test))
        super().visit_For(node, frame)

    def macro_body(self, node: nodes.Macro | nodes.CallBlock, frame: Frame) -> Any:
        """Writes the function of a macro or call block."""
        self._count(node)
        return super().macro_body(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Writes a comparison; it reads both sides if both can be long."""
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        if any(operand.op in ("in", "notin") for operand in node.ops):
            is_short = all(map(_is_written_out, operands[1:]))
        else:
            is_short = any(map(_is_written_out, operands))
        if is_short and len(operands) == 2:
            super().visit_Compare(node, frame)
            return
        self.write("(")
        self._visit_read(node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._visit_read(operand.expr, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Writes ``~``, which checks sizes before it joins texts."""
        join = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            join = "(markup_join if context.eval_ctx.volatile else str_join)"
        self.write(f"{join}(budget_checked((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Writes a lookup; what is sliced counts."""
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("budget_sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            if bound is None:
                self.write("None")
            else:
                self.visit(bound, frame)
            self.write(", ")
        self.write("))")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """Writes a mapping; keys are read when they are hashed."""
        self.write("{")
        for item in node.items:
            self._visit_read(item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile:
            self.write("(escape if context.eval_ctx.autoescape else str)(budget_shown(")
        elif frame.eval_ctx.autoescape:
            self.write("escape(budget_shown(")
        else:
            self.write("budget_text((")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("))")

    def _visit_read(self, node: nodes.Expr, frame: Frame) -> None:
        if isinstance(node, nodes.Const):
            self.visit(node, frame)
            return
        self.write("budget_read(")
        self.visit(node, frame)
        self.write(")")

    def _count(self, node: Any) -> None:
        """Notes how many steps each run of a node's body takes."""
        size = sum(1 for part in node.body for _ in part.find_all(nodes.Node))
        self._costs[id(node.body)] = 1 + size // _NODES_OF_A_STEP


def _is_written_out(node: nodes.Expr) -> bool:
    """Whether a value is a literal in the template, so that it is short."""
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(map(_is_written_out, node.items))
    return isinstance(node, nodes.Const)
