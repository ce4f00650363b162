"""What was built, what this processor has, which kernels run (csrc/python/introspect.cpp)."""

def attach(path: str) -> None:
    """Connect to the op library at `path`, which must already be loaded."""

def isa_name() -> str:
    """The instruction set in use; empty where the requested one can't be."""

def isa_reason() -> str:
    """Why that one."""

def force_isa(name: str) -> None:
    """Use this instruction set from now on; ValueError where it can't be."""

def kernel_list() -> list[str]:
    """One "isa family dtype" for each kernel that was built."""

def build_info() -> dict[str, str]:
    """Compiler, flags and versions of the build.

    Keys: version, compiler, flags, processor, instruction_sets, sanitizers, torch, cuda and
    cuda_architectures; the last two are empty without CUDA kernels.
    """

def cpu_features() -> dict[str, bool]:
    """Instruction-set extensions, and whether they can be used here."""
