"""A plugin for Hydra: the groups `lfq/quant`, `lfq/schedule` and `lfq/technique` exist in every app."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LfqSearchPath(SearchPathPlugin):
    """Appends `lfq_lightning/conf`, after the app's own folders."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # By its folder and not as `pkg://`, which would import torch into every app beside which this is installed.
        found = find_spec("lfq_lightning")
        if found is not None and found.origin is not None:
            search_path.append(provider="lfq_lightning", path=f"file://{Path(found.origin).parent / 'conf'}")
