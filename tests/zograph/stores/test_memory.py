from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from zograph.stores.header import build_header

LAYERS = 4

CHILD = """
import sys
from pathlib import Path
import torch
from zograph.export import save_streamed
from zograph.loading import from_pretrained
from zograph.parameters import parameter_table
from zograph.stores.base import padded, page_aligned
from zograph.stores.disk import DiskStore
from zograph.stores.folder import open_work_folder
from zograph.stores.source import as_tensor, source_of

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

model = from_pretrained(sys.argv[1])
table = parameter_table(model)
Path("/proc/self/clear_refs").write_text("5")
start = peak()
store = DiskStore(open_work_folder(Path(sys.argv[3])), table, source_of(model))
moved = 0
for name, info in table.items():
    buffer = page_aligned(padded(info.bytes))
    moved += store.read(name, buffer)
    store.write(name, buffer.fill_(1), 1)

def read(name):
    buffer = page_aligned(padded(table[name].bytes))
    store.read(name, buffer)
    return as_tensor(table[name], buffer)

save_streamed(model, read, Path(sys.argv[2]))
print(moved, peak() - start, max(p.bytes for p in table.values()))
"""


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    state = {k: (t.dtype, tuple(t.shape)) for k, t in model.state_dict().items()}
    header = build_header((k, dtype, shape) for k, (dtype, shape) in state.items())
    total = sum(t.nbytes for t in model.state_dict().values())
    assert total > 250e6
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(header)
        f.truncate(len(header) + total)  # zeros that take no space
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "out"), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
    )
    assert done.returncode == 0, done.stderr
    moved, grown, largest = (int(x) for x in done.stdout.split())
    assert moved == total
    assert grown < 2.5 * largest, f"{grown} bytes for tensors of at most {largest}"
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert abs(written - total) < 1e5
