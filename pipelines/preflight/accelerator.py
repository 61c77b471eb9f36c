"""Whether the GPUs that Ray counts on a node are there, and this build of torch fits them."""

import re
from collections.abc import Sequence


def accelerator_trouble(promised: float) -> tuple[str, str] | None:
    """Reason and remedy where a node's GPUs cannot be computed on; None where they can.

    Takes no memory of the GPUs, which others may be using.
    """
    import torch

    uncounted = "start Ray there with --num-gpus 0"
    if torch.version.hip is not None:
        return None
    if torch.version.cuda is None:
        return (
            f"Ray counts {promised:g} GPUs, and torch {torch.__version__} is a build without CUDA",
            f"install a CUDA build of torch there, or {uncounted}",
        )
    found, capabilities = _driver()
    if found:
        return (
            f"Ray counts {promised:g} GPUs, and {found}",
            f"install or mend the NVIDIA driver there, or {uncounted}",
        )
    kernels = (torch._C._cuda_getArchFlags() or "").split()
    for capability in capabilities:
        if not fits(kernels, capability):
            return (
                f"torch {torch.__version__} has no kernels for compute capability "
                f"{capability[0]}.{capability[1]}, only {' '.join(kernels)}",
                "install a build of torch for these GPUs",
            )
    return None


def _driver() -> tuple[str, list[tuple[int, int]]]:
    """What is wrong with the driver, "" if nothing, and the compute capabilities it knows."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver answers ({error})", []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        capabilities = [tuple(pynvml.nvmlDeviceGetCudaComputeCapability(h)) for h in handles]
    except pynvml.NVMLError as error:
        return f"the NVIDIA driver does not tell of them ({error})", []
    finally:
        pynvml.nvmlShutdown()
    return ("" if capabilities else "the NVIDIA driver knows none"), capabilities


def fits(kernels: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether kernels (`sm_90`, `compute_90`) run on a device: those of its generation up to its
    own, or older ones that are compiled anew for it.
    """
    for kernel in kernels:
        form, digits = re.match(r"(sm|compute)_(\d+)", kernel).groups()  # type: ignore[union-attr]
        of = (int(digits[:-1]), int(digits[-1]))
        if of <= capability and (form == "compute" or of[0] == capability[0]):
            return True
    return False
