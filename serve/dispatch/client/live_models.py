"""The present settings of a process that opens calls, and the facts in the files of its models."""

from __future__ import annotations

import asyncio

from ...models.model_files import ModelFiles, Units
from ...models.structures import unknown_structures
from ...settings.application import Settings
from .attempts import Attempts


class LiveModels:
    """Keeps the settings, the models' files and `attempts` in step."""

    def __init__(self, attempts: Attempts, units: Units) -> None:
        """`units`: returns the reference work of each model."""
        self._attempts, self._units = attempts, units
        self._settings: Settings | None = None
        self.files = ModelFiles(set(), {}, {})

    @property
    def begun(self) -> bool:
        """Return whether settings have come."""
        return self._settings is not None

    @property
    def settings(self) -> Settings:
        """The present settings. Raises `RuntimeError` before the first ones."""
        if self._settings is None:
            raise RuntimeError("this replica got no user_config")
        return self._settings

    async def set(self, settings: Settings) -> None:
        """Serve the models of these settings from now on."""
        files = await asyncio.to_thread(ModelFiles.read, settings, self._units)
        self._settings = settings
        self._set_files(files)

    async def look_again(self) -> None:
        """Find out whether weights that were not there have been pulled.

        The work of their model is then known.
        """
        if not self.files.unknown:
            return
        settings = self.settings
        if self.files.unknown != await asyncio.to_thread(unknown_structures, settings):
            files = await asyncio.to_thread(ModelFiles.read, settings, self._units)
            if settings is self.settings:  # and no other settings have come meanwhile
                self._set_files(files)

    def _set_files(self, files: ModelFiles) -> None:
        self.files = files
        self._attempts.set_models(self.settings.models, files.work)
