"""An interpreter for PTX, the text that NVRTC emits before machine code: what was really compiled, run in NumPy.

The host layer runs the sources; this runs the compiler's output. All threads of a block are one NumPy axis, blocks run
one after another. It stops on any access outside a buffer, on misaligned accesses, on divergent barriers and warp
operations, on reads of bytes never written or still owed by an asynchronous copy, and on races in shared memory.
"""
