"""Checkpoints: the full training state while a run goes on, the immunised backbone at its end.

Both are Orbax checkpoints with two additions. Orbax stores no checksum over array chunks: one
flipped byte in a large array comes back silently as other numbers. So every checkpoint here
carries, as a JSON item beside the arrays, a SHA-256 digest of each leaf (over its dtype, shape and
bytes) and one of the JSON record itself; and ``files.json``, written before the commit, with the
SHA-256 of each file. Nothing is handed out before all of them agree, and the message names the
file that is damaged.

Leaves are stored flat, as ``{"0003.opt_state.0.trace": array}``, so any pytree can be saved
(NamedTuples, optax states, typed PRNG keys, empty arrays, Python scalars) and any Orbax tool can
read the arrays.

**What a training state should hold** so that a resumed run is the run that was interrupted: the
trained parameters, the optimiser's state, batch statistics if they train, the step, the PRNG key,
and the data position. In jaximm batch ``t`` and key ``t`` are functions of (seed, t), so the step
*is* the data position; a loader with a position of its own (an iterator's state as bytes) goes in
as a uint8 array, or into ``metadata`` if it is JSON.

**Devices.** A restore takes its shardings from the abstract state of the run that restores: any
number of devices, any mesh.

**Several processes.** All of them enter the block and call the same methods with the same
arguments, on a file system that all of them see. A leaf is a global array (replicated or sharded)
or host data that is equal everywhere. Each process writes its own shards and digests them where
they lie: only digests travel. Records, deletions and renames are the first process's. Whatever one
process finds damaged, all refuse. What is to lie in parts on several devices is read part by part,
by whoever holds the part, and is nowhere whole: its recorded blocks are compared where one lies
within a part, the digests of the files stand for the rest. Everything else is read into host memory
before it is placed.
"""

from jaximm.checkpoint.backbone import (
    Immunised,
    load_backbone,
    load_immunised,
    save_backbone,
    save_immunised,
)
from jaximm.checkpoint.disk import FORMAT, MANIFEST, READABLE, CheckpointError
from jaximm.checkpoint.leaves import content_hash
from jaximm.checkpoint.training import Restored, TrainCheckpoints

__all__ = [
    "FORMAT",
    "MANIFEST",
    "READABLE",
    "CheckpointError",
    "Immunised",
    "Restored",
    "TrainCheckpoints",
    "content_hash",
    "load_backbone",
    "load_immunised",
    "save_backbone",
    "save_immunised",
]
