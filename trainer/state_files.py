"""Sharded state files: tensors by name, written by several processes, read by any number of them, without pickle.

    rank_00000.safetensors    the tensors, or pieces of tensors, that rank 0 writes
    rank_00000.json           written after it: {format, rank, tensors: {name: {dtype, shape, offset, size, crc32}}}

`shape` is the global shape. A file holds the piece [offset, offset + size) of each dimension, for an unsharded tensor
all of it. A reader fills tensors and shards from all pieces that overlap them, so writer and reader may shard
differently. Every piece has a CRC-32, which is verified when it is read; the json has its own checksum. FSDP2's tensors
are DTensors that are sharded along one dimension, as by torch.chunk.
Read next: train_state.py (when they are written), engine.py (the state), ../common/checksums.py.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checksums import checksum, has_valid_checksum, with_checksum, write_with_checksum
from common.errors import UserError
from common.files import atomic_write, write_json

STATE_FORMAT = 2  # 1 was torch.distributed.checkpoint's, whose metadata is a pickle
MAX_JSON_BYTES = 256 << 20  # limit against damaged files; a tensor takes about 200 bytes
MAX_DIMENSIONS = 16
DISK_SPACE_ADVICE = "free some space or choose another --out_dir"
SAFETENSORS_DTYPES = {  # https://github.com/huggingface/safetensors, section "Format"
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

TensorDict = dict[str, Tensor]  # "model.<parameter>" and "optimizer.<parameter>.<exp_avg, …>"
Ints = tuple[int, ...]


class DamagedStateFile(Exception):
    """A json file is missing or damaged. `folder`: its folder."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.folder = path.parent


@dataclass(frozen=True)
class TensorPiece:
    """A piece of a tensor: its offset and size in the tensor, and the rank whose file holds it."""

    offset: Ints
    size: Ints
    rank: int = 0
    crc32: str = ""

    def overlap(self, other: "TensorPiece") -> tuple[Ints, Ints]:
        """Return (starts, ends) of the intersection in global coordinates; empty if an end is not above its start."""
        starts = tuple(map(max, self.offset, other.offset))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True))
        return starts, tuple(ends)

    def slices(self, starts: Ints, ends: Ints) -> tuple[slice, ...]:
        """Convert the global region starts ... ends into slices of this piece."""
        return tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, self.offset, strict=True))


@dataclass(frozen=True)
class SavedTensor:
    """A saved tensor: dtype, global shape and pieces, from the json files."""

    dtype: str
    shape: Ints
    pieces: list[TensorPiece]


# ---- local pieces ----------------------------------------------------------------------------------------------------
def local_piece(tensor: Tensor) -> tuple[Tensor, TensorPiece]:
    """Return this process's local tensor (no copy) and its position in the global tensor."""
    if not hasattr(tensor, "device_mesh"):
        return tensor.detach(), TensorPiece((0,) * tensor.dim(), tuple(tensor.shape))
    dtensor: Any = tensor.detach()
    local, offset, placements = dtensor.to_local(), [0] * tensor.dim(), dtensor.placements
    if len(placements) != 1 or not (placements[0].is_shard() or placements[0].is_replicate()):
        raise NotImplementedError(f"DTensor with placements {placements}")
    if placements[0].is_shard():
        dim, mesh = placements[0].dim, dtensor.device_mesh
        rows, most = tensor.shape[dim], -(-tensor.shape[dim] // mesh.size())
        offset[dim] = min(mesh.get_local_rank() * most, rows)
        assert local.shape[dim] == min(most, rows - offset[dim]), "not sharded as by torch.chunk"
    return local, TensorPiece(tuple(offset), tuple(local.shape))


def select_written_tensors(state: TensorDict, rank: int, world_size: int, replicated: bool) -> TensorDict:
    """Return the tensors that this process writes: its shards, and its part of the replicated tensors.

    Replicated tensors are distributed over the processes so that all write about equally many bytes.
    `replicated`: whether every process holds all plain tensors. If not, plain tensors of `state` exist only here.
    """
    loads, mine = [0] * world_size, {}
    for name, tensor in state.items():
        if replicated and not hasattr(tensor, "device_mesh"):
            writer = loads.index(min(loads))
            loads[writer] += tensor.numel() * tensor.element_size()
            if writer != rank:
                continue
        mine[name] = tensor
    return mine


# ---- writing ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CopiedPiece:
    """A copy of a piece in CPU memory, with the global shape of its tensor."""

    data: Tensor
    shape: Ints
    piece: TensorPiece


def host_copy(tensor: Tensor, target: Tensor | None = None) -> Tensor:
    """Copy a tensor to `target`, else to new memory of the CPU.

    From CUDA the copy is queued, into pinned memory: record an event and wait for it before reading.
    """
    if target is None:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return target.copy_(tensor, non_blocking=tensor.is_cuda)


def copy_to_cpu(state: TensorDict, before: dict[str, CopiedPiece]) -> dict[str, CopiedPiece]:
    """Copy the local piece of every tensor to the CPU (host_copy): training may then change the tensors.

    Reuses the buffers of the copies `before` where they fit, because writing to newly allocated memory is slower.
    """
    copies = {}
    for name, tensor in state.items():
        local, piece = local_piece(tensor)
        if not local.numel():
            continue  # a tensor with fewer rows than processes has empty shards
        reusable = before.get(name)
        fits = reusable is not None and reusable.piece == piece and reusable.data.dtype == local.dtype
        data = host_copy(local, reusable.data if reusable and fits else None)
        copies[name] = CopiedPiece(data, tuple(tensor.shape), piece)
    return copies


def write_state(folder: Path, rank: int, parts: dict[str, CopiedPiece]) -> None:
    """Write the two files of a process, the json last. Raises UserError if that fails.

    safetensors format: length of the header (8 bytes, little-endian), JSON header, bytes of the tensors.
    """
    names = sorted(parts, key=lambda name: (-parts[name].data.element_size(), name))  # aligns every tensor
    header, descriptions, at = {}, {}, 0
    for name in names:
        data = parts[name].data
        end = at + data.numel() * data.element_size()
        header[name] = {"dtype": SAFETENSORS_DTYPES[data.dtype], "shape": list(data.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(folder / f"{rank_file_stem(rank)}.safetensors", DISK_SPACE_ADVICE) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            part = parts[name]
            descriptions[name] = {
                "dtype": dtype_name(part.data),
                "shape": part.shape,
                "offset": part.piece.offset,
                "size": part.piece.size,
                "crc32": write_with_checksum(file, tensor_bytes(part.data)),
            }
    content = with_checksum({"format": STATE_FORMAT, "rank": rank, "tensors": descriptions})
    write_json(folder / f"{rank_file_stem(rank)}.json", content, indent=None)


def rank_file_stem(rank: int) -> str:
    return f"rank_{rank:05d}"


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """Return the memory of a contiguous CPU tensor as uint8, (bytes,). No copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_checked_json(path: Path) -> dict[str, Any]:
    """Read a json file and verify its checksum. Raises DamagedStateFile if it is missing, too large or damaged."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DamagedStateFile(path, f"is damaged (larger than {MAX_JSON_BYTES} bytes)")
        content = json.loads(path.read_bytes())
        is_intact = isinstance(content, dict) and has_valid_checksum(content)
    except OSError as error:
        raise DamagedStateFile(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise DamagedStateFile(path, "is damaged (no JSON)") from None
    if not is_intact:
        raise DamagedStateFile(path, "is damaged (its checksum differs)")
    if content.get("format") != STATE_FORMAT:
        raise DamagedStateFile(path, f"has format {str(content.get('format'))[:20]}, this version reads {STATE_FORMAT}")
    return content


class SavedState:
    """The state in a folder that `ranks` processes wrote. The constructor reads the json files, `load` the tensors.

    Both raise UserError, ending in `advice`, if a file is missing or damaged. `tensors`: the saved tensors by name.
    """

    def __init__(self, folder: Path, ranks: int, advice: str) -> None:
        self.folder, self.advice = folder, advice
        self.tensors: dict[str, SavedTensor] = {}
        self.verified: set[tuple[str, int]] = set()
        for rank in range(ranks):
            path = folder / f"{rank_file_stem(rank)}.json"
            try:
                content = read_checked_json(path)
            except DamagedStateFile as error:
                raise self.make_error(str(error)) from None
            tensors = content.get("tensors")
            if content.get("rank") != rank or not isinstance(tensors, dict):
                raise self.make_error(f"{path} is not the file of rank {rank}")
            for name, entry in tensors.items():
                self.add_piece(path, rank, name, entry)

    def make_error(self, text: str) -> UserError:
        return UserError(f"{text}: {self.advice}")

    def add_piece(self, path: Path, rank: int, name: str, entry: Any) -> None:
        try:
            dtype, crc32 = entry["dtype"], entry["crc32"]
            shape, offset, size = (parse_sizes(entry[key]) for key in ("shape", "offset", "size"))
        except (KeyError, TypeError, ValueError):
            raise self.make_error(f"{path}: the entry of {name[:80]} is not valid") from None
        saved = self.tensors.setdefault(name, SavedTensor(dtype, shape, []))
        fits = len(shape) == len(offset) == len(size) <= MAX_DIMENSIONS
        if not fits or any(o + n > s for o, n, s in zip(offset, size, shape, strict=True)):
            raise self.make_error(f"{path}: {name[:80]} has a piece outside its shape")
        if (saved.dtype, saved.shape) != (dtype, shape):
            raise self.make_error(f"{path}: {name[:80]} has another shape or dtype than in the file of another rank")
        saved.pieces.append(TensorPiece(offset, size, rank, crc32))

    def load(self, state: TensorDict) -> None:
        """Fill the tensors of `state`, plain tensors or DTensors, in place.

        Raises UserError if one is missing or has another shape or dtype. Files are memory-mapped, tensors not copied.
        """
        from safetensors import SafetensorError, safe_open

        wanted: dict[int, list[tuple[str, TensorPiece, TensorPiece, Tensor]]] = {}
        for name, tensor in state.items():
            local, here = local_piece(tensor)
            for piece in self.overlapping_pieces(name, tensor, here):
                wanted.setdefault(piece.rank, []).append((name, piece, here, local))
        for rank, pieces in sorted(wanted.items()):
            path = self.folder / f"{rank_file_stem(rank)}.safetensors"
            try:
                with safe_open(path, "pt") as file:
                    for name, piece, here, local in pieces:
                        region = here.overlap(piece)
                        stored = self.verify_piece(path, name, piece, file.get_tensor(name))
                        local[here.slices(*region)].copy_(stored[piece.slices(*region)])
            except (SafetensorError, OSError, ValueError) as error:
                raise self.make_error(f"cannot read {path} ({str(error).splitlines()[0][:120]})") from None

    def overlapping_pieces(self, name: str, tensor: Tensor, here: TensorPiece) -> list[TensorPiece]:
        """Return the saved pieces that overlap the local piece `here`. Raises UserError if they do not cover it."""
        saved = self.tensors.get(name)
        if saved is None:
            raise self.make_error(f"{self.folder} does not hold {name}")
        wanted = (dtype_name(tensor), tuple(tensor.shape))
        if (saved.dtype, saved.shape) != wanted:
            raise self.make_error(f"{self.folder} holds {name} as {saved.dtype} {saved.shape}, expected {wanted}")
        found, covered = [], 0
        for piece in saved.pieces:
            starts, ends = here.overlap(piece)
            if count := math.prod(max(0, end - start) for start, end in zip(starts, ends, strict=True)):
                found.append(piece)
                covered += count
        if covered != math.prod(here.size):
            raise self.make_error(f"{self.folder} does not hold all of {name}")
        return found

    def verify_piece(self, path: Path, name: str, piece: TensorPiece, stored: Tensor) -> Tensor:
        """Return `stored` after checking its shape, dtype and, the first time, its checksum."""
        if tuple(stored.shape) != piece.size or dtype_name(stored) != self.tensors[name].dtype:
            raise self.make_error(f"{path} is damaged ({name} has another shape or dtype than in its .json)")
        if (name, piece.rank) not in self.verified and checksum(tensor_bytes(stored)) != piece.crc32:
            raise self.make_error(f"{path} is damaged (the checksum of {name} differs)")
        self.verified.add((name, piece.rank))
        return stored


def parse_sizes(values: Any) -> Ints:
    """Convert a JSON list of non-negative integers to a tuple. Raises ValueError for anything else."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise ValueError("not a list of integers")
    return tuple(values)
