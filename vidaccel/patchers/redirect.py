"""Our processors are the models' own: their source, with the one attention call sent to us.

Projections, norms, rotary embeddings, the order of text and video and what is cut off afterwards are each model's own
convention, and change between releases. So none of it is written a second time here. The processor's ``__call__`` is
parsed, every call of diffusers' ``dispatch_attention_fn`` or of torch's ``scaled_dot_product_attention`` becomes a
method call on the processor, and the result is compiled once per processor class. Signature, file name and line
numbers stay, so that diffusers' look at the signature and a traceback are what they were.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import textwrap
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from ..engine.attachment import NotPickled
from ..engine.gate import ForwardGate
from ..engine.ops import attention, passed_by
from ..engine.session import Session
from ..errors import PatchError

__all__ = ["SparseProcessor", "redirected"]

_ANNOTATIONS = __future__.annotations.compiler_flag
_INPUT = "_vidaccel_input"
_METHODS = {"dispatch_attention_fn": "dispatched", "scaled_dot_product_attention": "scaled_dot_product"}


class SparseProcessor(NotPickled):
    """Base of our attention processors: carries the layer's handle and what dense calls need. Nothing of one call.

    Its subclasses, made by :func:`redirected`, are subclasses of the original's class too, and hold its attributes.
    Once the session is closed, a call runs the original, wherever the processor was kept; a copy is one of the
    original.
    """

    original: Any
    #: Whether the original attends through diffusers' dispatcher (and has a backend to choose) or through torch.
    dispatches: bool
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, original: Any) -> None:
        # among them what diffusers' set_attention_backend and enable_parallelism set on whatever sits in the layer
        self.__dict__.update(original.__dict__)
        self.original = original
        self.handle = torch.empty(0, dtype=torch.int64)
        self.session: Session | None = None
        self.gate: ForwardGate | None = None
        #: Whether the plan asks for what the layer takes.
        self.gated = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    @property
    def is_closed(self) -> bool:
        """Whether calls run the original."""
        return self.session is not None and self.session.closed

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What the original processor runs on q, k, v [B, S, H, D], with its exchange between ranks if it has one."""
        return self._dense(q, k, v, mask, self._parallel_config)

    def dense_alone(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The same without an exchange, for all tokens of some heads."""
        return self._dense(q, k, v, mask, None)

    def _dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, parallel: Any
    ) -> torch.Tensor:
        if not self.dispatches:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out: torch.Tensor = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=parallel
        )
        return out

    def dispatched(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        layer_input: torch.Tensor | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        """Stands in for ``dispatch_attention_fn``, tensors [B, S, H, D]; what is not self-attention goes there.

        Args:
            layer_input: what the layer's projections took, [B, S, C].
        """
        odd = bool(dropout_p or is_causal or enable_gqa or rest.get("attention_kwargs")) or scale is not None
        ours = attn_mask is None or isinstance(attn_mask, torch.Tensor)
        if ours and not odd and key.shape == query.shape and not _perturbed():
            hidden = layer_input if self.gated else None
            return attention(query, key, value, self.handle, attn_mask, hidden, self._token())
        self._count_other(query, key, attn_mask)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, **rest}
        out: torch.Tensor = dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **settings)
        return out

    def scaled_dot_product(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        layer_input: torch.Tensor | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        """Stands in for ``scaled_dot_product_attention``: tensors [B, H, S, D]."""
        if key.shape == query.shape and not (dropout_p or is_causal or rest or _perturbed()):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            hidden = layer_input if self.gated else None
            return attention(q, k, v, self.handle, attn_mask, hidden, self._token()).transpose(1, 2)
        self._count_other(query, key, attn_mask)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **rest)

    def _token(self) -> torch.Tensor | None:
        """What the pass began with, if that is compiled too."""
        # which hooks there are is read here, because a compiled graph notices values it has read, and no new hook
        return None if self.gate is None or self.gate.hooks is None else self.gate.token

    def _count_other(self, query: torch.Tensor, key: torch.Tensor, mask: Any) -> None:
        """Reports a call of the model's self-attention that no kernel here can run; cross-attention is none of it."""
        if query.shape == key.shape and not torch.compiler.is_compiling():
            masked = mask is not None and not isinstance(mask, torch.Tensor)
            what = (
                "without scores, for perturbed attention guidance"
                if _perturbed()
                else f"with a {type(mask).__name__} for a mask"
                if masked
                else "with options that no sparse kernel has"
            )
            passed_by(self.handle, f"the model attends {what}")

    def restore(self, module: Any) -> None:
        """Puts the original processor back, with the backend the user may have chosen meanwhile.

        A processor that somebody has put in our place since stays.
        """
        for setting in ("_attention_backend", "_parallel_config"):
            if getattr(self.original, setting, None) is not getattr(self, setting):
                setattr(self.original, setting, getattr(self, setting))
        if module.processor is self:
            module.processor = self.original


def _perturbed() -> bool:
    """Whether diffusers' perturbed attention guidance waits for a call of torch's function, to skip its scores."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode).__name__ == "AttentionScoreSkipFunctionMode" for mode in modes)


@cache
def redirected(processor: type, forget: frozenset[str] = frozenset()) -> type[SparseProcessor]:
    """A subclass of ``processor`` whose attention calls are ours.

    Args:
        processor: class of an attention processor.
        forget: local variables whose assignments are left out. For a processor that blows a mask of valid tokens up to
            [B, 1, S, S], so that the mask reaches us as the model gave it.

    Raises:
        PatchError: if the source is not at hand, is a closure, has no attention call, or no such assignments.
    """
    name = processor.__name__
    call: Any = processor.__call__
    try:
        source = textwrap.dedent(inspect.getsource(call))
    except (OSError, TypeError) as error:
        raise PatchError(f"the source of {name} is not at hand, so its attention call cannot be redirected") from error
    around = inspect.unwrap(call).__code__.co_freevars
    if around:
        raise PatchError(
            f"{name} takes {', '.join(around)} from the function or class around it, which a copy of its source cannot"
            " reach; keep values as attributes, and call super() with its arguments"
        )
    tree = ast.parse(source)
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    redirect = _Redirect(function.args, forget)
    redirect.visit(function)
    redirect.begin(function)
    if not redirect.found:
        raise PatchError(f"{name} does not call diffusers' or torch's attention function itself")
    missing = forget - redirect.forgotten
    if missing:
        raise PatchError(f"{name} does not assign {', '.join(sorted(missing))}, as the version known here does")
    ast.increment_lineno(ast.fix_missing_locations(tree), call.__code__.co_firstlineno - 1)
    made: dict[str, Any] = {}
    code = call.__code__
    # by the future statements of their module, not of this one
    flags = code.co_flags & _ANNOTATIONS
    exec(compile(tree, code.co_filename, "exec", flags=flags, dont_inherit=True), call.__globals__, made)
    members = {
        "__call__": made[function.name],
        "__doc__": f"{name} with its attention call redirected.",
        "dispatches": "dispatch_attention_fn" in redirect.found,
    }
    return type(f"Sparse{name}", (SparseProcessor, processor), members)


class _Redirect(ast.NodeTransformer):
    """Rewrites attention calls and leaves out assignments to some variables."""

    def __init__(self, arguments: ast.arguments, forget: frozenset[str]) -> None:
        self.arguments, self.forget = arguments, forget
        first, *others = (argument.arg for argument in (*arguments.posonlyargs, *arguments.args))
        self.this = first
        #: The argument that the layer's projections take, if it can be told.
        self.input = "hidden_states" if "hidden_states" in others else None
        self.found: set[str] = set()
        self.forgotten: set[str] = set()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
        if name in _METHODS:
            self.found.add(name)
            node.func = ast.Attribute(ast.Name(self.this, ast.Load()), _METHODS[name], ast.Load())
            if self.input is not None:
                node.keywords.append(ast.keyword("layer_input", ast.Name(_INPUT, ast.Load())))
        return node

    def begin(self, function: ast.FunctionDef) -> None:
        """Lets a closed processor run the original, and an open one keep its input, which it may assign to later."""
        given = self.arguments
        positional = [ast.Name(argument.arg, ast.Load()) for argument in (*given.posonlyargs, *given.args)][1:]
        passed: list[ast.expr] = [*positional]
        if given.vararg is not None:
            passed.append(ast.Starred(ast.Name(given.vararg.arg, ast.Load()), ast.Load()))
        named = [ast.keyword(argument.arg, ast.Name(argument.arg, ast.Load())) for argument in given.kwonlyargs]
        if given.kwarg is not None:
            named.append(ast.keyword(None, ast.Name(given.kwarg.arg, ast.Load())))
        this = ast.Name(self.this, ast.Load())
        original = ast.Call(ast.Attribute(this, "original", ast.Load()), passed, named)
        start: list[ast.stmt] = [ast.If(ast.Attribute(this, "is_closed", ast.Load()), [ast.Return(original)], [])]
        if self.input is not None:
            start.append(ast.Assign([ast.Name(_INPUT, ast.Store())], ast.Name(self.input, ast.Load())))
        function.body[:0] = start

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if names and names <= self.forget:
            self.forgotten |= names
            return None
        return self.generic_visit(node)
