"""A case's layers as an ONNX graph for ONNX Runtime: one LSTM node per layer, built directly from the parameters.

ONNX orders the gates i, o, f, g where PyTorch has i, f, g, o, and an LSTM node returns (T, D, B, H), which is brought
to (T, B, D*H) for the next layer. (An export through `torch.onnx` gives the same nodes with more around them.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.workloads import Layer, Problem

Array = NDArray[Any]
_OPSET, _IR = 17, 8  # old enough for every ONNX Runtime in use


def _iofg(weight: Tensor) -> Array:
    i, f, g, o = weight.detach().cpu().numpy().reshape(4, -1, *weight.shape[1:])
    return np.concatenate([i, o, f, g])


def build_model(problem: Problem) -> bytes:
    """The serialised ONNX model: inputs ``x`` (and ``lengths``, ``h0``, ``c0``), outputs ``y``, ``h_n``, ``c_n``."""
    from onnx import TensorProto, helper, numpy_helper

    case, nodes, constants = problem.case, [], []
    hidden, directions = case.hidden, case.directions

    def constant(name: str, value: Array) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", case.input])]
    if case.ragged:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"]))
    initial = ["", ""]
    if problem.hx is not None:
        rows: list[str | int | None] = [case.layers * directions, "B", hidden]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, rows) for name in ("h0", "c0")]
    if directions == 2:
        constant("merged", np.array([0, 0, -1], dtype=np.int64))
    source, last_h, last_c = "x", [], []
    for layer in range(case.layers):
        suffixes = [f"_l{layer}"] + [f"_l{layer}_reverse"] * (directions - 1)
        w, r, b = (f"{name}{layer}" for name in ("W", "R", "bias"))
        constant(w, np.stack([_iofg(problem.state["weight_ih" + s]) for s in suffixes]))
        constant(r, np.stack([_iofg(problem.state["weight_hh" + s]) for s in suffixes]))
        both = [[_iofg(problem.state[name + s]) for name in ("bias_ih", "bias_hh")] for s in suffixes]
        constant(b, np.stack([np.concatenate(pair) for pair in both]))
        if problem.hx is not None:
            span = [
                np.array([value], dtype=np.int64) for value in (layer * directions, (layer + 1) * directions)
            ]
            bounds = [constant(f"span{layer}_{end}", value) for end, value in enumerate(span)]
            initial = [f"h0_{layer}", f"c0_{layer}"]
            nodes += [helper.make_node("Slice", [name[:2], *bounds], [name]) for name in initial]
        raw, h, c = f"raw{layer}", f"last_h{layer}", f"last_c{layer}"
        arguments = [source, w, r, b, "lengths" if case.ragged else "", *initial]
        direction = "bidirectional" if directions == 2 else "forward"
        nodes.append(
            helper.make_node("LSTM", arguments, [raw, h, c], hidden_size=hidden, direction=direction)
        )
        source = "y" if layer == case.layers - 1 else f"y{layer}"
        if directions == 1:
            axis = constant(f"axis{layer}", np.array([1], dtype=np.int64))
            nodes.append(helper.make_node("Squeeze", [raw, axis], [source]))
        else:
            nodes.append(helper.make_node("Transpose", [raw], [f"turned{layer}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"turned{layer}", "merged"], [source]))
        last_h.append(h)
        last_c.append(c)
    nodes.append(helper.make_node("Concat", last_h, ["h_n"], axis=0))
    nodes.append(helper.make_node("Concat", last_c, ["c_n"], axis=0))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "h_n", "c_n")]
    graph = helper.make_graph(nodes, "lstm", inputs, outputs, constants)
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR)
    return bytes(model.SerializeToString())


def onnx_layer(problem: Problem, threads: int) -> Layer:
    """ONNX Runtime's session for a problem, called on tensors without copies of the input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads spin within a run, which is the fast setting, but must not go on while another provider is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(build_model(problem), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Array] = {}
    if problem.lengths is not None:
        feeds["lengths"] = problem.lengths.int().numpy()
    if problem.hx is not None:
        feeds["h0"], feeds["c0"] = (state.numpy() for state in problem.hx)
    names = ["y", "h_n", "c_n"]

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, h, c = session.run(names, {"x": x.numpy(), **feeds})
        return torch.from_numpy(y), torch.from_numpy(h), torch.from_numpy(c)

    return run
