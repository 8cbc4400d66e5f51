"""Is any NVIDIA part in use? The libraries that a process has loaded, and the distributions that are installed.

`shovel audit [--json] [--pid N] [--sbom FILE]` audits this Python after importing torch, or process N; exit code 1 when
something was found. The training stages call `audit()` at their end and keep it as `audit` in reports/pretrain.json and
reports/finetune.json, and as the tag `audit.nvidia` of their runs; while `policy.no_nvidia` holds, no model is promoted
whose training loaded one of NVIDIA's libraries.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path

# Names of NVIDIA's libraries and drivers. libtorch_cuda and libc10_cuda are PyTorch's, and call them.
LIBRARY = re.compile(
    r"lib(cuda|cudart|cublas\w*|cudnn\w*|cufft\w*|curand|cusolver\w*|cusparse\w*|cufile\w*|nccl|nvrtc|nvJitLink|nvToolsExt"
    r"|nvidia\w*|nvshmem\w*|nvinfer\w*|cupti|torch_cuda\w*|c10_cuda)(-\w+)?\.so"
)
DISTRIBUTION = re.compile(
    r"(nvidia|cuda|cupy|pycuda|nvtx|pynvml|tensorrt|apex|flash-attn|transformer-engine)(-.*|\d.*)?"
)


@dataclass(frozen=True)
class Audit:
    """What was found, how many libraries were looked at, and every distribution as `name==version`."""

    nvidia_libraries: list[str]
    nvidia_distributions: list[str]
    libraries: int
    distributions: list[str]

    @property
    def free(self) -> bool:
        """Whether no NVIDIA part is loaded or installed."""
        return not self.nvidia_libraries and not self.nvidia_distributions


def loaded_libraries(pid: int | str = "self") -> list[str]:
    """Paths of the shared libraries mapped into a process. Raises `ValueError` where the system does not tell."""
    maps = Path(f"/proc/{pid}/maps")
    if not maps.exists():
        raise ValueError(f"{maps} does not exist; the audit reads it, so it needs Linux and a process that runs")
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count("/") and ".so" in line}
    return sorted(paths)


def audit(pid: int | str = "self") -> Audit:
    """Look at a process and at the installed distributions of this environment."""
    libraries, installed = loaded_libraries(pid), {item.name.lower(): item.version for item in distributions()}
    nvidia = [path for path in libraries if LIBRARY.match(Path(path).name)]
    named = [name for name in sorted(installed) if DISTRIBUTION.fullmatch(name)]
    return Audit(nvidia, named, len(libraries), [f"{name}=={installed[name]}" for name in sorted(installed)])


def as_json(found: Audit) -> str:
    return json.dumps(asdict(found) | {"free": found.free}, indent=2)


def sentence(found: Audit) -> str:
    what = ", ".join(found.nvidia_libraries + found.nvidia_distributions)
    looked = f"{found.libraries} loaded libraries, {len(found.distributions)} installed distributions"
    return f"audit      {looked}: {f'NVIDIA parts: {what}' if what else 'no NVIDIA part'}"
