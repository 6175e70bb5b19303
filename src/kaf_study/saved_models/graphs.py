"""A model as a frozen TensorFlow graph: its variables constants, its functions inlined.

What an attack needs is then plain to see in the nodes: the operation at the end (a softmax, whose
input are the logits), the precision (float16 saturates early), and custom gradients that TensorFlow
can replace by the derivative of the forward graph. A graph is only taken if it gives what the model
itself gives; a model that is none (it writes to variables, looks up tables) stays as it is.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import function_pb2, graph_pb2, types_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from kaf_study import InputError
from kaf_study.saved_models.archives import one_line

# Operations at the end of a classifier that squash its logits, and keep their order.
SQUASHING = {"Softmax": "softmax", "Sigmoid": "sigmoid", "Tanh": "tanh"}
HALF = {types_pb2.DT_HALF: "float16", types_pb2.DT_BFLOAT16: "bfloat16"}
CUSTOM_GRADIENT = "_gradient_op_type"

RAISED = "it computes in {}, raised to float32"
DERIVED = (
    "custom gradients of {} operations were not saved with it; the derivative of the forward graph "
    "is taken"
)
KEPT_GRADIENTS = "its own gradients differ from the derivative of its forward graph and are kept"
NOT_FROZEN = "its graph cannot be frozen and is called as it is"
STAYS_HALF = "it computes in {}, which saturates early; it cannot be raised to float32"


@dataclass(frozen=True)
class Graph:
    """A classifier as a GraphDef without variables: `graph(x, training=False)`.

    Images (B, H, W, C) to outputs (B, classes), float32. `input` and `output` are tensor names.
    """

    graph_def: graph_pb2.GraphDef
    input: str
    output: str
    input_shape: tuple | None

    def __call__(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self._function(tf.convert_to_tensor(x))

    @cached_property
    def _function(self):
        node = self._nodes[_node_name(self.input)]
        dtype = tf.as_dtype(node.attr["dtype"].type)

        def function(x):
            (outputs,) = tf.graph_util.import_graph_def(
                self.graph_def,
                input_map={self.input: tf.cast(x, dtype)},
                return_elements=[self.output],
                name="",
            )
            return tf.cast(outputs, tf.float32)

        return tf.compat.v1.wrap_function(function, [tf.TensorSpec(self.input_shape, tf.float32)])

    @cached_property
    def _nodes(self):
        return {node.name: node for node in self.graph_def.node}

    def before_squashing(self) -> tuple["Graph", str | None]:
        """The graph up to its logits, and what was left out: "softmax", "sigmoid", "tanh", None."""
        name = self.output
        while True:
            node = self._nodes[_node_name(name)]
            if node.op in ("Identity", "Cast"):
                name = node.input[0]
            elif node.op == "IdentityN":
                name = node.input[_output_number(name)]
            else:
                break
        if node.op not in SQUASHING:
            return self, None
        logits = f"{_node_name(node.input[0])}:{_output_number(node.input[0])}"
        return replace(self, output=logits), SQUASHING[node.op]

    @property
    def factors(self) -> list[float]:
        """The single numbers that something is multiplied by; of a division, the inverse."""
        found = []
        for node in self.graph_def.node:
            for name in node.input if node.op in ("Mul", "RealDiv") else ():
                constant = self._nodes[_node_name(name)]
                if constant.op == "Const":
                    value = tf.make_ndarray(constant.attr["value"].tensor)
                    if value.size == 1 and value.item():
                        found.append(1 / value.item() if node.op == "RealDiv" else value.item())
        return found

    @property
    def precision(self) -> str | None:
        """ "float16" or "bfloat16" where something is computed in it, else None."""
        found = {HALF[t] for node in _all_nodes(self.graph_def) for t in _types(node) if t in HALF}
        return min(found, default=None)

    def in_float32(self) -> "Graph":
        """The same operations, on the same weights, in float32 throughout."""
        graph_def = graph_pb2.GraphDef()
        graph_def.CopyFrom(self.graph_def)
        for node in _all_nodes(graph_def):
            _raise(node)
        for function in graph_def.library.function:
            for argument in (*function.signature.input_arg, *function.signature.output_arg):
                if argument.type in HALF:
                    argument.type = types_pb2.DT_FLOAT
        return replace(self, graph_def=graph_def)

    def without_custom_gradients(self) -> tuple["Graph", int]:
        """The graph, differentiated operation by operation, and how many had their own gradient."""
        graph_def = graph_pb2.GraphDef()
        graph_def.CopyFrom(self.graph_def)
        count = sum(_forget_gradient(node) for node in _all_nodes(graph_def))
        return replace(self, graph_def=graph_def), count


def _node_name(tensor):
    return tensor.lstrip("^").split(":")[0]


def _output_number(tensor):
    return int(tensor.split(":")[1]) if ":" in tensor else 0


def _all_nodes(graph_def):
    yield from graph_def.node
    for function in graph_def.library.function:
        yield from function.node_def


def _types(node):
    for value in node.attr.values():
        yield value.type
        yield from value.list.type


def _raise(node):
    for value in node.attr.values():
        if value.type in HALF:
            value.type = types_pb2.DT_FLOAT
        for i, kind in enumerate(value.list.type):
            if kind in HALF:
                value.list.type[i] = types_pb2.DT_FLOAT
        if value.HasField("tensor") and value.tensor.dtype in HALF:
            array = tf.make_ndarray(value.tensor).astype("float32")
            value.tensor.CopyFrom(tf.make_tensor_proto(array))


def _gradient_name(node):
    """Of a node's custom gradient, or None; calls of functions have theirs from TensorFlow."""
    if CUSTOM_GRADIENT not in node.attr or node.op.endswith("PartitionedCall"):
        return None
    return node.attr[CUSTOM_GRADIENT].s.decode()


def _forget_gradient(node):
    """Take its custom gradient off a node; returns whether it had one."""
    if _gradient_name(node) is None:
        return False
    del node.attr[CUSTOM_GRADIENT]
    return True


# --------------------------------------------------------------------------- from a function


def attackable(concrete: Any, argument: str | None = None) -> tuple[Callable, list[str]]:
    """A concrete function (images -> outputs) as what is best attacked, and what was done to it.

    Where the function has custom gradients, the derivative of the forward graph is taken only if
    it is the same; one that differs is the author's intent (through a rounding, say) and kept.

    Args:
        concrete: of one float input with an unknown batch size, and one output.
        argument: the keyword under which it takes its images; None: by position.

    Returns:
        f(x, training=False), a `Graph` if it could be frozen, and remarks.
    """
    (spec,) = _tensors(concrete.structured_input_signature)
    shape = tuple(spec.shape) if spec.shape.rank is not None else None

    def call(x, training=False):
        x = tf.cast(x, spec.dtype)
        (outputs,) = tf.nest.flatten(concrete(**{argument: x}) if argument else concrete(x))
        return outputs

    vars(call).update(input_shape=shape, function=concrete)
    graph, own_gradients = _frozen(concrete, shape)
    if graph is None or not _agree(call, graph, gradients=False):
        return call, [NOT_FROZEN]
    if own_gradients and not _agree(call, graph, gradients=True):
        return call, [KEPT_GRADIENTS]
    half = graph.precision
    if half is None:
        return graph, []
    raised, x = graph.in_float32(), _images(shape)
    try:
        is_possible = raised(x).shape == graph(x).shape
    except Exception:  # an operation that does not exist in float32
        is_possible = False
    return (raised, [RAISED.format(half)]) if is_possible else (graph, [STAYS_HALF.format(half)])


def _tensors(structure):
    return [part for part in tf.nest.flatten(structure) if isinstance(part, tf.TensorSpec)]


def _frozen(concrete, shape):
    """The `Graph` of a concrete function without custom gradients, and how many it had; or None."""
    try:
        frozen = convert_variables_to_constants_v2(concrete)
        ((image,), (output,)) = frozen.inputs, tf.nest.flatten(frozen.outputs)
    except Exception:  # variables that are written to, tables, several inputs
        return None, 0
    graph_def = frozen.graph.as_graph_def()
    if any(node.op in ("VarHandleOp", "VariableV2") for node in graph_def.node):
        return None, 0  # TensorFlow 1: variables that are looked up by name
    return Graph(graph_def, image.name, output.name, shape).without_custom_gradients()


def _images(shape):
    """Four images for a trial: uniform in [0, 1], unknown sizes taken as those of CIFAR-10."""
    usual = (32, 32, 3)
    sizes = usual if shape is None else shape[1:]
    sizes = [known or cifar10 for known, cifar10 in zip(sizes, usual, strict=False)]
    return tf.constant(np.random.default_rng(0).uniform(size=(4, *sizes)), tf.float32)


def _agree(call, graph, *, gradients):
    """Whether both give the same outputs, or the same gradients that are not all 0."""
    x = _images(graph.input_shape)
    found = []
    for function in (call, graph):
        try:
            if gradients:
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    outputs = tf.cast(function(x), tf.float32)
                    outputs *= tf.cos(tf.range(outputs.shape[-1], dtype=tf.float32))
                found.append(tape.gradient(outputs, x))
            else:
                found.append(function(x))
        except Exception:  # whatever a foreign graph raises
            return False
    if any(value is None for value in found):
        return False
    first, second = (np.asarray(value, "float64") for value in found)
    scale = np.abs(first).max()
    return bool((scale > 0 or not gradients) and np.abs(first - second).max() <= 1e-3 * scale)


# --------------------------------------------------------------------------- SavedModel folders


def load_saved_model(folder: Path) -> tuple[Callable, list[str]]:
    """A SavedModel's serving signature (or the object itself) as `f(x, training=False)`, remarks.

    Read as TensorFlow Serving does, the function and its variables alone: of the optimizer and the
    layers' classes, whose code may be gone, nothing is needed.
    """
    with tempfile.TemporaryDirectory(prefix="saved_model_") as trimmed:
        try:
            derived = _trim(folder, Path(trimmed))
            loaded = tf.saved_model.load(trimmed)
            argument, concrete = _entry(loaded)
        except InputError as error:
            raise InputError(f"{str(folder)!r} {error}") from None
        except Exception as error:
            raise InputError(
                f"{str(folder)!r} is not a SavedModel that can be loaded ({one_line(error)}); "
                "give the whole folder as it was exported, or the model's .keras or .h5 file"
            ) from None
    _refuse_signature(folder, concrete)
    model, remarks = attackable(concrete, argument)
    if not isinstance(model, Graph):
        vars(model)["loaded"] = loaded  # a function does not keep its variables alive by itself
    return model, [DERIVED.format(derived)] * bool(derived) + remarks


def _entry(loaded):
    """The function to call: the keyword of its images (None: by position), concrete function."""
    signatures = getattr(loaded, "signatures", {})
    if len(signatures) == 1 or "serving_default" in signatures:
        concrete = signatures.get("serving_default") or next(iter(signatures.values()))
        _, inputs = concrete.structured_input_signature
        return next(iter(inputs), None), concrete
    if not callable(loaded):
        raise InputError(
            "has no serving_default signature and cannot be called; "
            "give one that has, or the model's .keras or .h5 file"
        )
    called = getattr(loaded.__call__, "concrete_functions", [])
    specs = [s for c in called for s in _tensors(c.structured_input_signature)]
    spec = specs[0] if specs else tf.TensorSpec((None, 32, 32, 3), tf.float32)
    return None, tf.function(lambda x: loaded(x)).get_concrete_function(spec)


def _refuse_signature(folder, concrete):
    inputs = _tensors(concrete.structured_input_signature)
    outputs = tf.nest.flatten(concrete.structured_outputs)
    if len(inputs) != 1 or len(outputs) != 1:
        raise InputError(
            f"the signature of {str(folder)!r} has {len(inputs)} inputs and {len(outputs)} "
            "outputs; expected a classifier with one of each"
        )
    (spec,) = inputs
    if not spec.dtype.is_floating:
        raise InputError(
            f"{str(folder)!r} takes {spec.dtype.name} images, through which no gradient passes; "
            "export it with float inputs in [0, 1]"
        )
    if spec.shape.rank is not None and spec.shape.rank > 0 and spec.shape[0] is not None:
        raise InputError(
            f"{str(folder)!r} takes batches of exactly {spec.shape[0]}; "
            "export it with an unknown batch size (None)"
        )


def _trim(folder, target):
    """Copy a SavedModel without what attacks do not need; returns the gradients that it misses.

    Left out: slots of optimizers, functions that are not called, and the names of custom gradients
    (older TensorFlow's Swish has one) whose code was not saved. TensorFlow only warns of those, and
    then fails or takes whatever gradient of this process happens to have the same name; without
    the name it derives the forward graph.
    """
    shutil.copytree(
        folder,
        target,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("saved_model.pb", "robustness"),
    )
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    served = [meta for meta in saved.meta_graphs if "serve" in meta.meta_info_def.tags]
    (meta, *_) = served or saved.meta_graphs
    if meta.HasField("object_graph_def"):  # written by TensorFlow 2
        _keep_called(meta)
    there = {g.registered_op_type for g in meta.graph_def.library.registered_gradients}
    missing = [
        node
        for node in _all_nodes(meta.graph_def)
        if _gradient_name(node) not in there and _forget_gradient(node)
    ]
    trimmed = saved_model_pb2.SavedModel(
        saved_model_schema_version=saved.saved_model_schema_version, meta_graphs=[meta]
    )
    (target / "saved_model.pb").write_bytes(trimmed.SerializeToString())
    return len(missing)


def _keep_called(meta):
    """Drop optimizer slots and the functions that neither a signature nor a call needs."""
    objects, library = meta.object_graph_def, meta.graph_def.library
    children = {c.local_name: objects.nodes[c.node_id] for c in objects.nodes[0].children}
    signatures = [objects.nodes[c.node_id] for c in children["signatures"].children]
    entries = {node.bare_concrete_function.concrete_function_name for node in signatures}
    if not entries and "__call__" in children:
        entries = set(children["__call__"].function.concrete_functions)
    for node in objects.nodes:
        del node.slot_variables[:]
        for name in set(node.function.concrete_functions) - entries:
            node.function.concrete_functions.remove(name)
    functions = {function.signature.name: function for function in library.function}
    gradients = {g.registered_op_type: g.gradient_func for g in library.registered_gradients}
    needed, found = set(), set(entries)
    while found:
        needed |= found
        called = (c for name in found for c in _called(functions[name], gradients))
        found = {name for name in called if name in functions} - needed
    for name in set(objects.concrete_functions) - needed:
        del objects.concrete_functions[name]
    for node in objects.nodes:
        if node.WhichOneof("kind") == "bare_concrete_function":
            if node.bare_concrete_function.concrete_function_name not in needed:
                node.user_object.identifier = "_generic_user_object"
    meta.graph_def.CopyFrom(
        graph_pb2.GraphDef(
            node=[node for node in meta.graph_def.node if node.op == "Const"],  # captured by some
            versions=meta.graph_def.versions,
            library=function_pb2.FunctionDefLibrary(
                function=[function for name, function in functions.items() if name in needed],
                gradient=[g for g in library.gradient if g.function_name in needed],
                registered_gradients=[
                    g for g in library.registered_gradients if g.gradient_func in needed
                ],
            ),
        )
    )


def _called(function, gradients):
    """Names of the functions that a function calls, its custom gradients' among them."""
    for node in function.node_def:
        yield gradients.get(_gradient_name(node))
        for value in node.attr.values():
            yield value.func.name
            yield from (f.name for f in value.list.func)
