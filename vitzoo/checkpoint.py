"""Read the authors' checkpoint files exactly as published, without ever running what a pickle asks for.

`.pth` files carry training state beside the weights: an `argparse.Namespace`, a yacs or OmegaConf config, an
optimizer. torch's `weights_only` reader refuses such files as a whole. It is used here all the same: every
class that a file names and torch does not know is replaced by an inert stand-in, which keeps arguments and
does nothing; a file that names something able to act (`os.system`, `eval`, ...) is refused outright. This
file imports nothing of vitzoo.
"""

from __future__ import annotations

import collections
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals
from torch.nn import functional as F

WEIGHT_KEYS = ("model", "state_dict", "module", "model_state_dict", "net", "model_ema", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")

# Top-level packages whose members can act on the machine. A file that names one is refused rather than
# disarmed: nobody publishes weights that need them, so the file is not what it claims to be.
_ACTING = frozenset(
    "os posix nt sys subprocess shutil socket pty runpy importlib ctypes code codeop webbrowser operator "
    "pickle marshal imp asyncio multiprocessing threading signal tempfile urllib http requests platform "
    "commands pdb timeit cProfile profile bdb pip setuptools distutils _io io".split()
)
_BUILTINS = ("builtins", "__builtin__", "__builtins__")
_HARMLESS_BUILTINS = frozenset(
    "set frozenset dict list tuple int float bool str bytes complex bytearray slice range object".split()
)


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message says which file, why, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        state_dict: name -> tensor, wrapper keys and `module.`-like prefixes removed.
        key: the wrapper key they were under ("model", "model_ema", ...), "" for a flat file.
        path: the file.
    """

    state_dict: dict[str, Tensor]
    key: str
    path: Path


class _Record:
    """Stands in for a class of the file: making one gives an empty OrderedDict.

    torch's reader lets OrderedDicts take both items (yacs configs are dicts) and attributes (namespaces).
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return collections.OrderedDict()


class _Opaque:
    """Stands in for a class whose state is no dict (one with slots, say): accepts it and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _harmless() -> dict[str, Any]:
    """Return what is read for what it is: the NumPy scalars that training loops leave in their files."""
    scalar, reconstruct = np._core.multiarray.scalar, np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    named: dict[str, Any] = {"numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named[f"{module}.scalar"], named[f"{module}._reconstruct"] = scalar, reconstruct
    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    return named | {f"numpy.dtypes.{kind.__name__}": kind for kind in kinds}


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """Yield the pickle streams of a torch file, zip or legacy."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with archive.open(name) as stream:
                        yield stream
    else:
        with path.open("rb") as stream:
            # magic number, protocol, system, object, storage keys; raw storages follow
            for _ in range(5):
                yield stream


def _globals(path: Path) -> set[str]:
    """Return the "module.name" of every global the file's pickles refer to, reading opcodes only."""
    found: set[str] = set()
    for stream in _pickles(path):
        strings: list[str] = []
        for opcode, arg, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(arg).replace(" ", ".", 1))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]))
            elif isinstance(arg, str):
                strings.append(arg)
    return found


def _allowed(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the harmless globals and the names of the file's unknown ones; raise if one could act."""
    try:
        names = _globals(path)
    except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        root = module.split(".")[0]
        if root in _ACTING or (root in _BUILTINS and attribute not in _HARMLESS_BUILTINS):
            raise CheckpointError(
                f"{path} was refused: its pickle asks for {name}, which weights never need; nothing was run. "
                "Get the file again from its authors."
            )
    harmless = _harmless() if any(name.startswith("numpy.") for name in names) else {}
    return harmless, sorted(names - set(_get_allowed_globals()) - set(harmless))


def _load(path: Path) -> Any:
    harmless, unknown = _allowed(path)
    attempts: tuple[type, ...] = (_Record, _Opaque) if unknown else (_Record,)
    for attempt, base in enumerate(attempts, 1):
        classes: list[tuple[Any, str]] = [(value, name) for name, value in harmless.items()]
        for name in unknown:
            module, _, attribute = name.rpartition(".")
            classes.append((type(attribute, (base,), {"__module__": module}), name))
        try:
            with torch.serialization.safe_globals([*classes]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can make the reader raise nearly anything
            if attempt == len(attempts):
                raise CheckpointError(_damaged(path, error)) from error
    raise AssertionError("unreachable")


def _damaged(path: Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return (
        f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint, it may be truncated: {reason} "
        "Download it again and compare its size with the published one."
    )


def read_file(path: str | Path) -> Any:
    """Read a `.pth`, `.pt`, `.bin` or `.safetensors` file on the CPU without running anything in it.

    Args:
        path: the file.

    Returns:
        What was saved: usually a dict; unknown classes in it are inert objects.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged or truncated, or a pickle that asks for something able to act.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(_damaged(path, error)) from error
    return _load(path)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and any(isinstance(v, Tensor) for v in value.values())


def read_checkpoint(path: str | Path, use_ema: bool = False) -> Checkpoint:
    """Read the weights of a file as the authors publish it.

    Args:
        path: `.pth`, `.pt`, `.bin` or `.safetensors`; flat, or wrapped under one of `WEIGHT_KEYS`.
        use_ema: take the moving average (`model_ema`) where the file has one; else `model` is taken.

    Returns:
        The weights, `module.`- and `backbone.`-like prefixes removed where every name has them.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, refused (see `read_file`), or without weights.
    """
    path = Path(path).expanduser()
    content = read_file(path)
    keys = WEIGHT_KEYS if not use_ema else ("model_ema", "state_dict_ema", *WEIGHT_KEYS)
    key = next((k for k in keys if isinstance(content, Mapping) and _is_state_dict(content.get(k))), "")
    weights = content[key] if key else content
    if not _is_state_dict(weights):
        kind = (
            f"a dict of {sorted(map(str, content))[:8]}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise CheckpointError(f"{path} has no weights under any of {', '.join(WEIGHT_KEYS)}: it holds {kind}")
    state_dict = {str(k): v for k, v in weights.items() if isinstance(v, Tensor)}
    return Checkpoint(strip_prefix(state_dict), key, path)


def strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove `module.`, `backbone.`, ... where every name has it; of a segmentation file keep the backbone.

    Args:
        state_dict: name -> tensor.
    """
    names = dict(state_dict)
    for prefix in _PREFIXES:
        inside = {k.removeprefix(prefix): v for k, v in names.items() if k.startswith(prefix)}
        if inside and (len(inside) == len(names) or prefix == "backbone."):
            names = inside
    return names


def resize_pos_grid(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a table of grid positions as the DeiT line of papers does: bicubic, no antialiasing.

    timm's `resample_abs_pos_embed` antialiases and keeps the norm at float32 likewise but is up to 3% away
    from what the authors' own loaders give (DeiT, EViT and Vim call `interpolate(..., mode="bicubic",
    align_corners=False)`).

    Args:
        pos: (1, old[0] * old[1], C), row-major.
        old: grid height and width that the table has.
        new: grid height and width wanted.

    Returns:
        (1, new[0] * new[1], C), dtype of `pos`.

    Raises:
        ValueError: `pos` does not hold old[0] * old[1] rows.
    """
    if pos.shape[1] != old[0] * old[1]:
        raise ValueError(
            f"position table has {pos.shape[1]} rows, a {old[0]}x{old[1]} grid needs {old[0] * old[1]}"
        )
    if old == new:
        return pos
    grid = pos.float().reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=False)
    return grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(pos.dtype)


def misfit(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Compare weights with a model's own table.

    Args:
        state_dict: the weights to load, names as in the model.
        own: `model.state_dict()`.

    Returns:
        One sentence for each kind of difference, with the first names; empty if everything fits.
    """

    def some(names: list[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    missing = [k for k in own if k not in state_dict]
    extra = [k for k in state_dict if k not in own]
    shapes = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in state_dict.items()
        if k in own and v.shape != own[k].shape
    ]
    lines = (("missing: ", missing), ("left over: ", extra), ("shape: ", shapes))
    return [text + some(names) for text, names in lines if names]
