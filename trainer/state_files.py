"""A state (tensors by name) in files: written by several processes, read by any number of them, without pickle.

    rank_00000.safetensors    what process 0 writes: whole tensors, or its pieces of them
    rank_00000.json           written after it: {format, rank, tensors: {name: {dtype, shape, offset, size, crc32}}}

A tensor of the global shape `shape` may lie in several files; each holds the piece [offset, offset + size) of every
dimension, of a whole tensor all of it. A reader fills whole tensors and local shards from the pieces that overlap
them, so the cut may differ between writer and reader. The CRC-32 of a piece is compared when it is read; the json
carries one of its own. FSDP2's tensors are DTensors cut along one dimension as torch.chunk cuts.
Read next: train_state.py (when they are written), engine.py (who makes a state), ../common/checksums.py.
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
MAX_JSON_BYTES = 256 << 20  # bytes; a tensor takes some 200 of them
MAX_DIMENSIONS = 16
DISK_SPACE_ADVICE = "free some space or choose another --out_dir"
SAFETENSORS_DTYPES = {  # https://github.com/huggingface/safetensors: format
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

TensorDict = dict[str, Tensor]  # "model.<parameter>" and "optimizer.<parameter>.<exp_avg, …>"
Ints = tuple[int, ...]


class DamagedStateFile(Exception):
    """A json file that is not intact. `folder`: where it is."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}")
        self.folder = path.parent


@dataclass(frozen=True)
class TensorPiece:
    """Where a piece of a tensor lies: in the tensor, and in the file of process `rank`."""

    offset: Ints
    size: Ints
    rank: int = 0
    crc32: str = ""

    def overlap(self, other: "TensorPiece") -> tuple[Ints, Ints]:
        """The start and the end of what both cover, in the whole tensor; empty where an end is not above its start."""
        starts = tuple(map(max, self.offset, other.offset))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True))
        return starts, tuple(ends)

    def slices(self, starts: Ints, ends: Ints) -> tuple[slice, ...]:
        """The region starts ... ends of the whole tensor, in this piece's own coordinates."""
        return tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, self.offset, strict=True))


@dataclass(frozen=True)
class SavedTensor:
    """A tensor as the json files describe it."""

    dtype: str
    shape: Ints
    pieces: list[TensorPiece]


# ---- what of a tensor is here ----------------------------------------------------------------------------------------
def local_piece(tensor: Tensor) -> tuple[Tensor, TensorPiece]:
    """The tensor's memory in this process, and which piece of the whole tensor it is. No copy."""
    if not hasattr(tensor, "device_mesh"):
        return tensor.detach(), TensorPiece((0,) * tensor.dim(), tuple(tensor.shape))
    dtensor: Any = tensor.detach()
    local, offset, placements = dtensor.to_local(), [0] * tensor.dim(), dtensor.placements
    if len(placements) != 1 or not (placements[0].is_shard() or placements[0].is_replicate()):
        raise NotImplementedError(f"a tensor placed as {placements}")
    if placements[0].is_shard():
        dim, mesh = placements[0].dim, dtensor.device_mesh
        rows, most = tensor.shape[dim], -(-tensor.shape[dim] // mesh.size())
        offset[dim] = min(mesh.get_local_rank() * most, rows)
        assert local.shape[dim] == min(most, rows - offset[dim]), "cut otherwise than torch.chunk cuts"
    return local, TensorPiece(tuple(offset), tuple(local.shape))


def select_written_tensors(state: TensorDict, rank: int, world_size: int, replicated: bool) -> TensorDict:
    """What this process writes: its shards, and of the tensors that every process has (`replicated`) an even share.

    Not replicated: every plain tensor in the state is this process's alone.
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
    """A piece in memory of its own on the CPU, with the global shape of its tensor."""

    data: Tensor
    shape: Ints
    piece: TensorPiece


def copy_to_cpu(state: TensorDict, before: dict[str, CopiedPiece]) -> dict[str, CopiedPiece]:
    """The local part of every tensor, copied to the CPU, so that training may change the tensors.

    The memory of the copies `before` is used again where it fits: fresh memory takes longer to fill than to copy to.
    """
    copies = {}
    for name, tensor in state.items():
        local, piece = local_piece(tensor)
        if not local.numel():
            continue  # the last processes' shards of a short tensor are empty
        reusable = before.get(name)
        fits = reusable is not None and reusable.piece == piece and reusable.data.dtype == local.dtype
        data = reusable.data if reusable and fits else torch.empty(local.shape, dtype=local.dtype)
        copies[name] = CopiedPiece(data.copy_(local), tuple(tensor.shape), piece)
    return copies


def write_state(folder: Path, rank: int, parts: dict[str, CopiedPiece]) -> None:
    """Write the two files of a process, the json last. Raises UserError when that fails.

    The safetensors format: 8 bytes for the length of the header (little-endian), a JSON header, the tensors' bytes.
    """
    names = sorted(parts, key=lambda name: (-parts[name].data.element_size(), name))  # so that each is aligned
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
    """The memory of a contiguous CPU tensor, shape (bytes,), uint8. No copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


# ---- reading ---------------------------------------------------------------------------------------------------------
def read_checked_json(path: Path) -> dict[str, Any]:
    """A json file with a checksum. Raises Damaged when it is missing, too large or not intact."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DamagedStateFile(path, "is larger than such a file can be")
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
    """The state in a folder that `ranks` processes wrote. Raises UserError ending in `advice`, here and in `load`.

    `tensors`: what is there, by name. Reads the json files here; a tensor's bytes only in `load`.
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
                raise self.make_error(f"{path} is not the file of process {rank}")
            for name, entry in tensors.items():
                self.add_piece(path, rank, name, entry)

    def make_error(self, text: str) -> UserError:
        return UserError(f"{text}: {self.advice}")

    def add_piece(self, path: Path, rank: int, name: str, entry: Any) -> None:
        try:
            dtype, crc32 = entry["dtype"], entry["crc32"]
            shape, offset, size = (parse_sizes(entry[key]) for key in ("shape", "offset", "size"))
        except (KeyError, TypeError, ValueError):
            raise self.make_error(f"{path}: {name[:80]} is not described as a tensor") from None
        saved = self.tensors.setdefault(name, SavedTensor(dtype, shape, []))
        fits = len(shape) == len(offset) == len(size) <= MAX_DIMENSIONS
        if not fits or any(o + n > s for o, n, s in zip(offset, size, shape, strict=True)):
            raise self.make_error(f"{path}: {name[:80]} has a piece outside its shape")
        if (saved.dtype, saved.shape) != (dtype, shape):
            raise self.make_error(f"{path}: {name[:80]} has another shape than in another file")
        saved.pieces.append(TensorPiece(offset, size, rank, crc32))

    def load(self, state: TensorDict) -> None:
        """Fill the tensors in place, whole ones and local shards alike. Each must be there, with its shape and dtype.

        Memory: the pages of the files that are read, no copy of a tensor.
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
        """The saved pieces that overlap what is `here` of the tensor. Together they must cover it."""
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
            raise self.make_error(f"{self.folder} holds only a part of {name}")
        return found

    def verify_piece(self, path: Path, name: str, piece: TensorPiece, stored: Tensor) -> Tensor:
        """The stored piece, after a comparison with its description and, the first time, with its checksum."""
        if tuple(stored.shape) != piece.size or dtype_name(stored) != self.tensors[name].dtype:
            raise self.make_error(f"{path} is damaged ({name} has another shape than in its .json)")
        if (name, piece.rank) not in self.verified and checksum(tensor_bytes(stored)) != piece.crc32:
            raise self.make_error(f"{path} is damaged (the checksum of {name} differs)")
        self.verified.add((name, piece.rank))
        return stored


def parse_sizes(values: Any) -> Ints:
    """A list of JSON integers of 0 or more. Raises ValueError or TypeError for anything else."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise ValueError("no list of whole numbers")
    return tuple(values)
