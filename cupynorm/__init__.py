"""Instance normalisation for CuPy and NumPy arrays: CUDA kernels, explicit forward and backward."""

from . import config, devices
from ._types import Saved
from .config import (
    get_batch_invariant,
    get_memory_limit,
    get_num_threads,
    set_batch_invariant,
    set_memory_limit,
    set_num_threads,
)
from .explain import explain
from .functional import (
    gradient_sums,
    instance_norm,
    instance_norm_backward,
    instance_norm_double_backward,
    instance_norm_forward,
    moments,
)
from .inference import inference_mode
from .layers import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .parameters import Parameter
from .scores import denormalize, zscore
from .statistics import GradientSums, Moments
from .warm import warmup

__version__ = "0.1.0"

__all__ = [
    "GradientSums",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "Moments",
    "Parameter",
    "Saved",
    "denormalize",
    "explain",
    "get_batch_invariant",
    "get_memory_limit",
    "get_num_threads",
    "gradient_sums",
    "inference_mode",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_double_backward",
    "instance_norm_forward",
    "moments",
    "set_batch_invariant",
    "set_memory_limit",
    "set_num_threads",
    "warmup",
    "zscore",
]

# With a usable GPU the core kernels are compiled now rather than in the first call; a failure is an error here, too.
if config.eager.get() and devices.gpu_status()[0]:
    from .cuda.backend import load_core

    load_core()
