"""What an exported file says of itself: how images are prepared, its classes, and who may run it.

Facts stand in the JSON file that `vitzoo.deploy` writes beside a file, and in the notes that ONNX files and archives of
ours carry.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitzoo.benchmark.runtimes import file_facts
from vitzoo.deploy.saturation import saturating_nodes, saturating_operations
from vitzoo.export.notes import PREPROCESSING, sha256
from vitzoo.export.onnx import require_packages
from vitzoo.export.openvino import read_ir
from vitzoo.export.program import open_program

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class ExportedFile:
    """A classifier in a file.

    Attributes:
        path: the file.
        shape: of its input, (B, C, H, W); None where it is free.
        num_classes: of its output; None where the file does not say.
        preprocessing: what is known of `PREPROCESSING`.
        label_names: the classes, if they are known.
        target: whom it was made for, if it is known.
        params: elements of its constants, tables and scales included.
        saturates: names of products that CPUs with AVX2 and without VNNI get wrong; see `vitzoo.deploy.saturation`.
    """

    path: Path
    shape: Shape
    num_classes: int | None
    preprocessing: dict[str, Any]
    label_names: list[str] | None
    target: str | None
    params: int
    saturates: tuple[str, ...]


def read_exported(path: str | Path) -> ExportedFile:
    """Read a file of any of our formats, its notes and the JSON file of its stem, if there is one.

    Args:
        path: `*.onnx`, `*.pt2` or `*.xml`.

    Raises:
        ExportError: an archive or an IR that cannot be loaded.
        FileNotFoundError: there is no such file, or no weights beside an IR.
        ImportError: a package is missing; the message has the line that installs it.
        ValueError: another suffix, not such a file, a JSON file that describes another one, or other than one input of
            images and one output.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path} is none of {', '.join(f'*{suffix}' for suffix in _READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    beside = _sidecar(path)
    graph = _READERS[path.suffix.lower()](path)
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ValueError(
            f"{path} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, expected images and logits"
        )
    shape, logits = graph.inputs[0], graph.outputs[0]
    if len(shape) != 4:
        raise ValueError(f"{path} takes input of {len(shape)} axes, expected images (B, C, H, W)")
    if len(logits) != 2:
        raise ValueError(f"{path} gives output of {len(logits)} axes, expected logits (B, classes)")
    facts = {**graph.facts, **beside}
    known = {**graph.facts.get("preprocessing", {}), **beside.get("preprocessing", {})}
    return ExportedFile(
        path=path,
        shape=shape,
        num_classes=logits[1] or facts.get("num_classes"),
        preprocessing={key: known[key] for key in PREPROCESSING if known.get(key) is not None},
        label_names=facts.get("label_names"),
        target=facts.get("target"),
        params=graph.params,
        saturates=tuple(graph.saturates),
    )


@dataclass(frozen=True)
class _Graph:
    """What a reader finds: free sizes as None, facts as the JSON file has them."""

    inputs: list[Shape]
    outputs: list[Shape]
    facts: dict[str, Any]
    params: int
    saturates: list[str]


def _read_onnx(path: Path) -> _Graph:
    require_packages(check=True)
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's own classes, which differ between its versions
        raise ValueError(f"{path} is not an ONNX file: {error}") from error
    constants = {tensor.name for tensor in model.graph.initializer}
    notes = _notes({entry.key: entry.value for entry in model.metadata_props})

    def shape(value: Any) -> Shape:
        return tuple(d.dim_value or None for d in value.type.tensor_type.shape.dim)

    return _Graph(
        [shape(value) for value in model.graph.input if value.name not in constants],
        [shape(value) for value in model.graph.output],
        {"preprocessing": notes, "target": notes.get("vitzoo.target")},
        round(1e6 * file_facts(path)["param_count"]),
        saturating_nodes(model.graph),
    )


def _read_program(path: Path) -> _Graph:
    program, facts = open_program(path)
    tensors = {node.name: node.meta.get("val") for node in program.graph.nodes}

    def shapes(names: Sequence[str]) -> list[Shape]:
        found = (tensors[name] for name in names)
        return [
            tuple(n if isinstance(n, int) else None for n in x.shape) for x in found if isinstance(x, Tensor)
        ]

    signature = program.graph_signature
    held = [*program.state_dict.values(), *program.constants.values()]
    return _Graph(
        shapes(signature.user_inputs),
        shapes(signature.user_outputs),
        facts,
        sum(x.numel() for x in held if isinstance(x, Tensor)),
        [],  # our kernels never saturate
    )


def _read_ir(path: Path) -> _Graph:
    model = read_ir(path)

    def shape(port: Any) -> Shape:
        return tuple(None if d.is_dynamic else d.get_length() for d in port.get_partial_shape())

    constants = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    return _Graph(
        [shape(port) for port in model.inputs],
        [shape(port) for port in model.outputs],
        {},
        sum(math.prod(op.get_output_shape(0)) for op in constants),
        saturating_operations(model),
    )


_READERS = {".onnx": _read_onnx, ".pt2": _read_program, ".xml": _read_ir}


def _notes(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the notes that `vitzoo.export` put into a file, numbers as numbers."""
    notes: dict[str, Any] = {}
    for key, text in texts.items():
        try:
            notes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            notes[key] = text
    return notes


def _sidecar(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not JSON: {error}; export the model again") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{beside} holds a {type(facts).__name__}, expected the facts of an exported file")
    hashes = {path.name: facts.get("sha256")}
    hashes |= {name: entry["sha256"] for name, entry in facts.get("companions", {}).items()}
    for name, expected in hashes.items():
        file = path.with_name(name)
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}, which is a part of {path}")
        if expected is not None and expected != sha256(file):
            raise ValueError(
                f"{beside} describes another file than {file}: its SHA-256 differs; export again"
            )
    return facts
