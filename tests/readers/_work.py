"""What both programs do: a list of jobs in JSON, inputs and outputs in safetensors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Job = dict[str, Any]
Given = dict[str, Tensor]


def work(does: dict[str, Callable[[Job, Tensor], Given]]) -> None:
    """Does the jobs of the file that is named: each has `do`, `folder`, `input` with x [B, d], and `output`."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        found = does[job["do"]](job, load_file(job["input"])["x"])
        save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, job["output"])
    print("done")
