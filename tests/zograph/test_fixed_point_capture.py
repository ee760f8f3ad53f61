from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zograph
from tests.zograph.test_contract import reference  # noqa: F401
